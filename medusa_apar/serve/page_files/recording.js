// What a request's events add up to: its threads at any step. The same rules as medusa_apar/events/recording.py and
// medusa_apar/threads/paragraph_tree.py have; medusa_apar/serve/event_texts.py writes the events.

export const HUES = 6; // of the style sheet, beside that of the trunk

export class Thread {
  constructor(index, parent, event, numForced) {
    Object.assign(this, { index, parent, numForced, tokens: [], children: [], finish: null });
    Object.assign(this, { forkIndex: event.fork_index, lineBreak: event.line_break, started: event.step });
    Object.assign(this, { endsLine: false, continuesParent: false, drafted: null });
  }

  get hue() {
    return this.parent === null ? 0 : 1 + ((this.index - 1) % HUES);
  }

  get end() {
    return this.numForced + this.tokens.length;
  }

  get depth() {
    return this.parent === null ? 0 : 1 + this.parent.depth;
  }
}

export class Recording {
  threads = [];
  steps = []; // {threads: [[hue, tokens] ...], slots, seconds} of each finished one
  step = 0;
  readable = 0; // tokens of the text that are final
  checking = false; // whether the guesses of the latest step are being checked
  #prompt = 0;
  #control = new Set();

  static of(events, step = Infinity, checking = false) {
    const recording = new Recording();
    for (const event of events) {
      if (event.step > step || (checking && event.step === step && event.event !== "StepStarted")) break;
      recording.take(event);
    }
    return recording;
  }

  get live() {
    return this.threads.filter((thread) => thread.finish === null);
  }

  // Tokens that can be seen, further ahead than `readable` while several threads write.
  get written() {
    return this.threads.reduce((sum, thread) => sum + thread.tokens.length, 0);
  }

  // The request was hung up on: nothing more will come.
  close() {
    for (const thread of this.live) thread.finish = "cancelled";
  }

  take(event) {
    const thread = this.threads[event.thread];
    this.step = event.step;
    switch (event.event) {
      case "RequestStarted":
        this.#prompt = event.prompt_ids.length;
        this.#control = new Set([event.fork_id, event.child_id]);
        break;
      case "ThreadStarted":
        this.#start(event);
        break;
      case "StepStarted":
        for (const each of this.threads) each.drafted = null;
        for (const drafted of event.drafted) this.threads[drafted.thread].drafted = drafted;
        this.checking = true;
        break;
      case "TokensAccepted":
      case "TokensInserted":
        this.#append(thread, event);
        break;
      case "ThreadContinuedParent":
        thread.continuesParent = true;
        break;
      case "ThreadFinished":
        Object.assign(thread, { finish: event.reason, endsLine: event.ends_line });
        break;
      case "StepFinished":
        this.#finish(event);
        break;
    }
  }

  isVisible(thread, index) {
    if (this.#control.has(thread.tokens[index - thread.numForced].id)) return false;
    const endsChild = thread.finish === "stop" && index === thread.end - 1;
    return !endsChild || thread.parent === null || thread.continuesParent;
  }

  depthFirst(thread = this.threads[0]) {
    return thread ? [thread, ...thread.children.flatMap((child) => this.depthFirst(child))] : [];
  }

  // [thread, its token] in reading order, children spliced in at their forks; within the limit once all have ended.
  text() {
    const found = [];
    if (this.threads.length) this.#read(this.threads[0], found);
    return this.live.length ? found : found.slice(0, this.readable);
  }

  #start(event) {
    const parent = event.parent === null ? null : this.threads[event.parent];
    const forced = parent === null ? this.#prompt : event.forced_ids.length;
    const thread = new Thread(this.threads.length, parent, event, forced);
    this.threads.push(thread);
    parent?.children.push(thread);
  }

  #append(thread, event) {
    event.token_ids.forEach((id, place) => {
      const node = event.nodes?.[place];
      const source = node === undefined ? "model" : thread.drafted.sources[node];
      thread.tokens.push({ id, text: event.texts[place], source, step: event.step });
    });
  }

  #finish(event) {
    const gained = this.threads.map((thread) => {
      let count = 0;
      while (thread.tokens.at(-1 - count)?.step === event.step) count += 1;
      return [thread.hue, count];
    });
    const threads = gained.filter(([, count]) => count);
    this.steps.push({ threads, slots: event.slots_kept, used: event.slots_used, seconds: event.seconds });
    for (const [, length] of event.text_lengths) this.readable = length;
    this.checking = false;
  }

  // Returns whether a child has taken the thread's text over, which then ends with the child's.
  #read(thread, found) {
    let index = thread.numForced;
    let next = 0;
    for (;;) {
      const child = thread.children[next];
      if (child !== undefined && child.forkIndex < index) {
        next += 1;
        if (this.#read(child, found)) continue;
        if (child.continuesParent) return true;
        index += child.finish === null || child.endsLine ? child.lineBreak : 0;
      } else if (index < thread.end) {
        if (this.isVisible(thread, index)) found.push([thread, thread.tokens[index - thread.numForced]]);
        index += 1;
      } else {
        return false;
      }
    }
  }
}

// The likeliest chain of a draft tree, as text: from the root on, always the first child.
export function guessed(thread) {
  const { parents, sources, texts } = thread.drafted;
  let text = "";
  let last = -1;
  parents.forEach((parent, node) => {
    if (parent === last && sources[node] !== "fork") {
      text += texts[node];
      last = node;
    }
  });
  return text;
}
