// A finished answer's lanes once more, step by step.

import { button, element } from "./document.js";
import { Lanes } from "./lanes.js";
import { Recording } from "./recording.js";

const HELD = 140; // milliseconds for each step

export class Replay {
  #lanes = new Lanes();
  #timer = null;
  #last = 0;

  // draw: called with lanes and the recording they are to show. ended: called when the text is to be seen again.
  constructor(events, last, { draw, ended, calm }) {
    Object.assign(this, { events, draw, ended, calm });
    this.toggle = button("Watch again", false);
    this.label = element("label", "step", "Step ");
    this.steps = this.label.appendChild(element("input"));
    Object.assign(this.steps, { type: "range", min: 1, max: last, value: 1 });
    this.told = this.label.appendChild(element("output"));
    this.label.hidden = true;
    this.steps.addEventListener("input", () => {
      clearInterval(this.#timer);
      this.#show();
    });
    this.toggle.addEventListener("click", () => this.#switch(this.toggle.ariaPressed !== "true"));
  }

  #switch(on) {
    clearInterval(this.#timer);
    this.toggle.ariaPressed = String(on);
    this.label.hidden = !on;
    if (!on) return this.ended();
    this.steps.value = 1;
    this.#show();
    if (!this.calm) this.#timer = setInterval(() => this.#play(), HELD);
  }

  #play() {
    if (this.steps.value === this.steps.max) return clearInterval(this.#timer);
    this.steps.stepUp();
    this.#show();
  }

  #show() {
    const step = this.steps.valueAsNumber;
    this.told.textContent = `${step} of ${this.steps.max}`;
    if (step < this.#last) this.#lanes = new Lanes(); // threads that have not begun yet have no lane
    this.#last = step;
    const ends = step === Number(this.steps.max);
    this.draw(this.#lanes, Recording.of(this.events, step, !ends));
  }
}
