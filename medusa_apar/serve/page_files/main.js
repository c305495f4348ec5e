// The page: a conversation, what it is asked with, and the server it talks to.

import { Answer } from "./answer.js";
import { element } from "./document.js";
import { figures, number, sentence } from "./figures.js";
import { Settings } from "./settings.js";
import { keep as store, kept } from "./storage.js";
import { chunks, Gone, hasKey, isReady, modelName, Refused, setKey } from "./wire.js";

const RETRY = 1500; // milliseconds between two looks at a server that is gone
const find = (selector) => document.querySelector(selector);
const [form, box, log] = [find("#ask"), find("#question"), find("#conversation")];
const settings = new Settings(form);
let messages = []; // of the conversation so far, as the API takes them
let model = null;
let running = null; // an AbortController while an answer grows

// ---- asking

async function ask(question) {
  running = new AbortController();
  const turn = new Turn(question, messages);
  setRunning(true);
  say("The answer is being written.");
  try {
    model ??= await modelName();
    const asked = [...turn.messages, { role: "user", content: question }];
    const body = { model, messages: asked, stream: true, ...settings.body() };
    if (turn.answers.length > 1) body.seed ??= Math.floor(Math.random() * 2 ** 31); // of both, as far as they go alike
    const plain = { ...body, apar: { ...body.apar, fork: "off", speculation: "off" } };
    const bodies = turn.answers.length > 1 ? [body, plain] : [body];
    const done = await Promise.allSettled(bodies.map((its, place) => follow(turn.answers[place], its)));
    const failed = done.find((its) => its.status === "rejected");
    if (failed) throw failed.reason;
    keep(question, turn);
    const found = turn.answers[0].recording;
    say(`The answer is there: ${found.steps.length ? sentence(figures(found)) : "see above"}.`);
  } catch (error) {
    explain(error, question, turn);
  } finally {
    running = null;
    setRunning(false);
  }
}

// Follows one answer to its end, however it ends.
async function follow(answer, body) {
  const signal = running.signal;
  try {
    for await (const chunk of chunks(body, signal)) answer.take(chunk);
    answer.settle(answer.reason === "length" ? "At the limit" : "");
  } catch (error) {
    const ended = answer.content ? "Broken off" : "Not answered";
    answer.settle(signal.aborted ? "Stopped" : ended);
    if (!signal.aborted) throw error;
  }
}

// What there is of an answer, however it ended, is what later turns read.
function keep(question, turn) {
  const content = turn.answers[0].content;
  if (content) turn.messages.push({ role: "user", content: question }, { role: "assistant", content });
}

function explain(error, question, turn) {
  keep(question, turn);
  if (!turn.answers[0].content) {
    turn.root.remove();
    if (!box.value) box.value = question;
  }
  if (error instanceof Gone) return waitForServer(error.message);
  if (!(error instanceof Refused)) throw error;
  if (error.status === 401) return askForKey();
  const later = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  notice(error.message + later);
}

class Turn {
  constructor(question, messages) {
    this.messages = messages; // those of the conversation it belongs to: a new one may begin meanwhile
    find("#welcome").hidden = true;
    this.root = log.appendChild(element("section", "turn"));
    const asked = this.root.appendChild(element("h2", "question"));
    asked.append(element("span", "unseen", "You asked: "), question);
    const compares = settings.values.compare;
    const own = compares ? "Threads and guesses" : "Answer";
    const columns = this.root.appendChild(element("div", compares ? "answers beside" : "answers"));
    this.answers = [new Answer(own, (recording) => show("now", recording))];
    find("#figures").classList.toggle("two", compares);
    if (compares) this.answers.push(new Answer("One thread, no guesses", (recording) => show("plain", recording)));
    if (!compares) this.answers[0].root.firstChild.classList.add("unseen");
    columns.append(...this.answers.map((answer) => answer.root));
    this.root.scrollIntoView({ block: "start" });
  }
}

function show(column, recording) {
  const found = figures(recording);
  for (const name of ["rate", "perStep", "threads", "slots"]) {
    find(`#${column}-${name}`).textContent = number(found[name], name === "perStep" ? 2 : 0);
  }
}

// ---- what is said

// To screen readers, once.
function say(text) {
  find("#status").textContent = text;
}

function notice(text) {
  find("#notice").textContent = text;
  find("#notice").hidden = text === "";
}

function setRunning(on) {
  const [send, stop] = [find("#send"), find("#stop")];
  const held = document.activeElement === (on ? send : stop);
  send.hidden = on;
  stop.hidden = !on;
  if (held) (on ? stop : box).focus(); // or the focus would be lost with the button
}

function setServer(state, text) {
  find("#server").className = state;
  find("#server-said").textContent = text;
}

// ---- the server

async function greet() {
  try {
    model = await modelName();
    setServer("up", model);
    notice("");
  } catch (error) {
    if (error instanceof Gone) await waitForServer(error.message);
    else if (error.status === 401) askForKey(hasKey());
    else await waitForServer("The server is not ready yet.");
  }
}

let waiting = false;
async function waitForServer(why) {
  if (waiting) return;
  waiting = true;
  setServer("down", "no server");
  notice(`${why} This page goes on as soon as it is back.`);
  do await new Promise((done) => setTimeout(done, RETRY)); // before the first look too: it may be ready and refuse us
  while (!(await isReady()));
  waiting = false;
  await greet();
  say("The server is back.");
}

function askForKey(wrong = false) {
  notice(wrong ? "That key is not the server's." : "");
  setServer("down", "locked");
  find("#key-form").hidden = false;
  find("#key").focus();
}

find("#key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(find("#key").value.trim());
  find("#key-form").hidden = true;
  box.focus();
  greet();
});

// ---- the form

function submit() {
  const question = box.value.trim();
  if (running || !question || !form.reportValidity()) return;
  notice("");
  box.value = "";
  ask(question);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
box.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
});
find("#stop").addEventListener("click", () => {
  running?.abort();
  box.focus();
});
for (const example of document.querySelectorAll(".example")) {
  example.addEventListener("click", () => {
    box.value = example.textContent;
    submit();
    box.focus();
  });
}
find("#link").addEventListener("click", async () => {
  const asked = box.value.trim() || messages.findLast((its) => its.role === "user")?.content || "";
  const link = settings.link(asked);
  history.replaceState(null, "", link);
  const copied = await navigator.clipboard?.writeText(link).then(() => true, () => false);
  const words = copied ? "The link is copied." : "The link is in the address bar.";
  find("#link").textContent = words;
  setTimeout(() => (find("#link").textContent = "Link to this question"), 2500);
  say(words);
});
find("#new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  log.replaceChildren();
  find("#welcome").hidden = false;
  notice("");
  box.focus();
});

// ---- light and dark

const theme = find("#theme");
theme.value = kept("localStorage", "medusa-apar theme") ?? "";
document.documentElement.dataset.theme = theme.value;
theme.addEventListener("change", () => {
  store("localStorage", "medusa-apar theme", theme.value);
  document.documentElement.dataset.theme = theme.value;
});

box.value = settings.fromAddress();
addEventListener("hashchange", () => (box.value = settings.fromAddress() || box.value));
greet();
