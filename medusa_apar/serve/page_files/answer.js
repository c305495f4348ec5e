// One answer on the page: lanes while it grows, then a text, and its lanes again for who wants to watch once more.

import { element, rendered } from "./document.js";
import { figures, Ribbon, sentence } from "./figures.js";
import { Lanes } from "./lanes.js";
import { Recording } from "./recording.js";

const FRAME = 50; // milliseconds between two pictures
const REPLAY_STEP = 140; // milliseconds that a step is held when it is watched again
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
    this.root.setAttribute("aria-busy", "false");
    this.ribbon.draw(this.recording);
    this.watched(this.recording);
    const text = element("div", "text");
    text.append(rendered(this.content, this.#runs()));
    if (!this.content.trim()) text.append(element("p", "empty", "No text."));
    this.#show(text);
    const said = this.recording.steps.length ? sentence(figures(this.recording)) : "";
    this.facts.textContent = [note, said].filter(Boolean).join(" · ");
    if (this.recording.threads.length > 1) this.root.append(this.#tools(text));
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
    const colours = tools.appendChild(button("Who wrote what", true));
    colours.addEventListener("click", () => {
      colours.ariaPressed = String(this.root.classList.toggle("plain") === false);
    });
    const again = tools.appendChild(button("Watch again", false));
    const label = tools.appendChild(element("label", "step", "Step "));
    const steps = label.appendChild(element("input"));
    Object.assign(steps, { type: "range", min: 1, max: this.recording.steps.length, value: 1 });
    const told = label.appendChild(element("output", "", "1"));
    label.hidden = true;
    let timer = null;
    const show = () => {
      told.textContent = steps.value;
      const lanes = new Lanes();
      this.#draw(lanes, Recording.of(this.events, Number(steps.value), true));
    };
    const play = () => {
      if (Number(steps.value) >= Number(steps.max)) return clearInterval(timer);
      steps.value = Number(steps.value) + 1;
      show();
    };
    steps.addEventListener("input", () => {
      clearInterval(timer);
      show();
    });
    again.addEventListener("click", () => {
      const watching = again.ariaPressed !== "true";
      again.ariaPressed = String(watching);
      label.hidden = !watching;
      clearInterval(timer);
      if (watching) {
        steps.value = 1;
        show();
        if (!calm.matches) timer = setInterval(play, REPLAY_STEP);
      } else {
        this.body.replaceChildren(text);
        this.ribbon.draw(this.recording);
        this.watched(this.recording);
      }
    });
    return tools;
  }
}

function button(text, pressed) {
  const made = element("button", "quiet", text);
  made.type = "button";
  made.ariaPressed = String(pressed);
  return made;
}
