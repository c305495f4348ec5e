// What a question is asked with: kept in this browser, and carried by a link.

import { keep, kept } from "./storage.js";

const STORED = "medusa-apar settings";
const NAMES = ["fork", "temperature", "seed", "max_tokens", "compare"];

export class Settings {
  constructor(form) {
    this.form = form;
    this.#fill(read(kept("localStorage", STORED)));
    form.addEventListener("change", () => {
      keep("localStorage", STORED, JSON.stringify(this.values));
      this.#say();
    });
    this.#say();
  }

  get values() {
    const field = (name) => this.form.elements[name];
    const found = NAMES.map((name) => [name, name === "compare" ? field(name).checked : field(name).value]);
    return Object.fromEntries(found);
  }

  // The request's own fields; a number that is none is refused by the browser before.
  body() {
    const { fork, temperature, seed, max_tokens } = this.values;
    return {
      temperature: Number(temperature),
      ...(seed !== "" && { seed: Number(seed) }),
      max_tokens: Number(max_tokens),
      apar: { fork, events: true },
    };
  }

  // The question that the page's address carries, with what it is to be asked with.
  fromAddress() {
    const carried = new URLSearchParams(location.hash.slice(1));
    this.#fill(Object.fromEntries(carried));
    this.#say();
    return carried.get("q") ?? "";
  }

  link(question) {
    const address = new URL(location.href);
    address.hash = new URLSearchParams({ q: question, ...this.values }).toString();
    return address.href;
  }

  #fill(values) {
    for (const name of NAMES) {
      if (!(name in values)) continue;
      const field = this.form.elements[name];
      const before = field.value;
      if (name === "compare") field.checked = String(values[name]) === "true";
      else field.value = values[name];
      if (!field.checkValidity() || (name !== "seed" && field.value === "")) field.value = before;
    }
  }

  #say() {
    const { fork, temperature } = this.values;
    const forks = { auto: "forks where the model does", lists: "forks at list items", off: "one thread" }[fork];
    document.querySelector("#settings-said").textContent = `${forks}, temperature ${temperature}`;
  }
}

function read(text) {
  try {
    return JSON.parse(text) ?? {};
  } catch {
    return {};
  }
}
