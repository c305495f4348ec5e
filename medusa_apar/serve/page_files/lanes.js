// Threads side by side while they grow: what is settled, and in grey what is guessed and being checked.

import { element } from "./document.js";
import { guessed } from "./recording.js";

const HEAD = 60; // characters of what stands before a fork

export class Lanes {
  constructor() {
    this.root = element("div", "lanes");
    this.root.setAttribute("aria-hidden", "true"); // read out once, when it has become a text
    this.lanes = new Map();
  }

  // Draws the threads as they are now.
  draw(recording) {
    const order = recording.depthFirst();
    this.root.classList.toggle("alone", order.length === 1);
    order.forEach((thread, place) => {
      const lane = this.lanes.get(thread.index) ?? this.#add(recording, thread);
      if (this.root.children[place] !== lane.root) this.root.insertBefore(lane.root, this.root.children[place] ?? null);
      lane.draw(recording, thread);
    });
  }

  #add(recording, thread) {
    const lane = new Lane(recording, thread);
    this.lanes.set(thread.index, lane);
    return lane;
  }
}

class Lane {
  constructor(recording, thread) {
    this.root = element("section", `lane hue-${thread.hue}`);
    const header = this.root.appendChild(element("header"));
    header.append(chip(thread), element("b", "", head(recording, thread)));
    this.count = header.appendChild(element("small"));
    const window = this.root.appendChild(element("div", "said"));
    const text = window.appendChild(element("div"));
    this.settled = text.appendChild(element("span"));
    this.guess = text.appendChild(element("em", "guess"));
    this.clear();
  }

  clear() {
    this.settled.replaceChildren();
    Object.assign(this, { shown: 0, forks: 0, finish: null, begun: false });
  }

  draw(recording, thread) {
    const changed = this.forks !== thread.children.length || this.finish !== thread.finish;
    if (changed || this.shown > thread.tokens.length) this.clear();
    this.#append(recording, thread, !changed);
    Object.assign(this, { forks: thread.children.length, finish: thread.finish });
    const guess = recording.checking && thread.drafted && thread.finish === null ? guessed(thread) : "";
    this.guess.textContent = this.begun ? plain(guess) : plain(guess).trimStart();
    this.root.classList.toggle("over", thread.finish !== null);
    this.count.textContent = `${thread.tokens.length}${thread.finish === null ? "" : " ✓"}`;
  }

  #append(recording, thread, isNew) {
    const forks = new Map(thread.children.map((child) => [child.forkIndex, child]));
    for (; this.shown < thread.tokens.length; this.shown += 1) {
      const index = thread.numForced + this.shown;
      const token = thread.tokens[this.shown];
      let text = recording.isVisible(thread, index) ? plain(token.text) : "";
      if (!this.begun) text = text.trimStart();
      this.begun ||= text !== "";
      const fresh = isNew && token.step >= recording.step - 1;
      if (text) this.settled.append(fresh ? element("span", `new ${token.source}`, text) : text);
      if (forks.has(index)) this.settled.append(chip(forks.get(index)));
    }
  }
}

// Without the marks of what is bold once it is a text.
function plain(text) {
  return text.replaceAll("**", "");
}

function chip(thread) {
  return element("i", `chip hue-${thread.hue}`, thread.parent === null ? "•" : String(thread.index));
}

// The end of what stands before the thread's fork: the head of the item that it details.
function head(recording, thread) {
  const parent = thread.parent;
  if (parent === null) return "trunk";
  const before = parent.tokens.slice(0, thread.forkIndex + 1 - parent.numForced);
  const said = before.filter((_, place) => recording.isVisible(parent, parent.numForced + place));
  const text = said.map((token) => token.text).join("").trim().split("\n").at(-1);
  return plain(text).slice(-HEAD) || `thread ${thread.index}`;
}
