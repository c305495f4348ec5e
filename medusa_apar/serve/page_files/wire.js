// The server's API, as any client sees it: one question and its stream of chunks.

import { keep, kept } from "./storage.js";

// What the server refuses or fails by, in its own words.
export class Refused extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    Object.assign(this, { status, retryAfter });
  }
}

// No answer, or one that broke off.
export class Gone extends Error {}

// Where OpenAI's routes lie, seen from the page.
const API = document.querySelector('meta[name="api"]').content;
const KEY = "medusa-apar key";

// For this tab alone, and forgotten with it.
export function setKey(key) {
  keep("sessionStorage", KEY, key || null);
}

export function hasKey() {
  return kept("sessionStorage", KEY) !== null;
}

function headers() {
  const key = kept("sessionStorage", KEY);
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers() });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Gone("The server does not answer.");
  }
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    const message = body?.error?.message ?? `The server answers ${response.status} ${response.statusText}.`;
    throw new Refused(response.status, message, response.headers.get("Retry-After"));
  }
  return response;
}

export async function modelName() {
  const models = await (await ask(`${API}models`)).json();
  return models.data[0].id;
}

export async function isReady() {
  try {
    return (await fetch("health", { cache: "no-store" })).ok;
  } catch {
    return false;
  }
}

// The chunks of an answer. Aborting the signal hangs up, at which the server stops within a step.
export async function* chunks(body, signal) {
  const response = await ask(`${API}chat/completions`, { method: "POST", body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        throw error.name === "AbortError" ? error : new Gone("The server went away.");
      });
      if (done) throw new Gone("The answer broke off.");
      const events = (rest + value).split(/\r?\n\r?\n/);
      rest = events.pop();
      for (const event of events) {
        const data = event.match(/^data: ?(.*)$/m)?.[1];
        if (data === "[DONE]") return;
        if (data === undefined) continue; // a comment, which keeps the connection open
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Refused(chunk.error.code ?? 500, chunk.error.message);
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
