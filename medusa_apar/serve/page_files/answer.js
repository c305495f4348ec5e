// One answer on the page: lanes while it grows, then a text, and its lanes again for who wants to watch once more.

import { button, element, rendered } from "./document.js";
import { figures, Ribbon, sentence } from "./figures.js";
import { Lanes } from "./lanes.js";
import { Recording } from "./recording.js";
import { Replay } from "./replay.js";

const FRAME = 50; // milliseconds between two pictures
const calm = matchMedia("(prefers-reduced-motion: reduce)");

export class Answer {
  events = [];
  content = ""; // what the API has said
  recording = new Recording();
  #held = []; // what the latest step has brought, shown once the guesses of the next one are known
  #drawn = 0;

  // heading: what the answer is called. watched: called with the recording at every picture.
  constructor(heading, watched) {
    this.watched = watched;
    this.root = element("article", "answer");
    this.root.setAttribute("aria-busy", "true");
    this.root.append(element("h3", "caption", heading));
    this.body = this.root.appendChild(element("div", "body"));
    this.lanes = new Lanes();
    this.ribbon = new Ribbon();
    this.facts = element("p", "facts");
    this.body.append(element("p", "waiting", "…"));
    this.root.append(this.ribbon.root, this.facts);
  }

  // A chunk of the stream. What of it is text and what events are may come in any measure.
  take(chunk) {
    this.content += chunk.choices?.[0]?.delta?.content ?? "";
    this.reason = chunk.choices?.[0]?.finish_reason ?? this.reason;
    for (const event of chunk.apar?.events ?? []) {
      this.events.push(event);
      if (event.event === "StepStarted") this.#release();
      if (event.event === "StepStarted" || this.recording.threads.length === 0) this.recording.take(event);
      else this.#held.push(event);
    }
    const now = performance.now();
    if (now - this.#drawn < FRAME * (calm.matches ? 8 : 1) || !this.recording.threads.length) return;
    this.#drawn = now;
    this.#draw(this.lanes, this.recording);
  }

  // The lanes become a text. note: what else is to be said of it.
  settle(note = "") {
    this.#release();
    this.recording.close();
    this.root.setAttribute("aria-busy", "false");
    this.ribbon.draw(this.recording);
    this.watched(this.recording);
    const text = element("div", "text");
    text.append(rendered(this.content, this.#runs()));
    if (!this.content.trim()) text.append(element("p", "empty", "No text."));
    this.#show(text);
    const said = this.recording.steps.length ? sentence(figures(this.recording)) : "";
    this.facts.textContent = [note, said].filter(Boolean).join(" · ");
    this.root.append(this.#tools(text));
  }

  #release() {
    for (const event of this.#held.splice(0)) this.recording.take(event);
  }

  #draw(lanes, recording) {
    if (this.body.firstChild !== lanes.root) this.body.replaceChildren(lanes.root);
    lanes.draw(recording);
    this.ribbon.draw(recording);
    this.watched(recording);
  }

  // Which thread wrote the text up to where; null where what the API says is not just that, a stop string cut it short.
  #runs() {
    const runs = [];
    let end = 0;
    let all = "";
    for (const [thread, token] of this.recording.text()) {
      if (!token.text) continue;
      all += token.text;
      end += token.text.length;
      if (runs.at(-1)?.hue === thread.hue) runs.at(-1).end = end;
      else runs.push({ hue: thread.hue, end });
    }
    return all.startsWith(this.content) && runs.length > 1 ? runs : null;
  }

  #show(content) {
    const swap = () => this.body.replaceChildren(content);
    document.startViewTransition && !calm.matches && !document.hidden ? document.startViewTransition(swap) : swap();
  }

  #tools(text) {
    const tools = element("div", "tools");
    if (navigator.clipboard) tools.append(this.#copy());
    if (this.recording.threads.length < 2) return tools;
    const colours = tools.appendChild(button("Who wrote what", true));
    colours.addEventListener("click", () => {
      colours.ariaPressed = String(!this.root.classList.toggle("plain"));
    });
    const again = {
      draw: (lanes, recording) => this.#draw(lanes, recording),
      ended: () => {
        this.body.replaceChildren(text);
        this.ribbon.draw(this.recording);
        this.watched(this.recording);
      },
      calm: calm.matches,
    };
    const replay = new Replay(this.events, this.recording.steps.length, again);
    tools.append(replay.toggle, replay.label);
    return tools;
  }

  #copy() {
    const copy = button("Copy");
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(this.content);
      copy.textContent = "Copied";
      setTimeout(() => (copy.textContent = "Copy"), 1500);
    });
    return copy;
  }
}
