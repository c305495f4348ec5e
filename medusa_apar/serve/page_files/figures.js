// What an answer costs, in figures and as a ribbon of its steps.

const SVG = "http://www.w3.org/2000/svg";
const [BARS, ROOM, UNIT] = [64, 36, 4]; // bars at most, pixels in height, pixels for a token

export const NOTHING = { rate: null, perStep: null, threads: null, slots: null };

export function figures(recording) {
  const last = recording.steps.at(-1);
  if (last === undefined) return NOTHING;
  const tokens = recording.live.length ? recording.written : recording.readable;
  const slots = recording.live.length ? last.used : last.slots;
  const [steps, threads] = [recording.steps.length, recording.threads.length];
  return { rate: tokens / last.seconds, perStep: tokens / steps, threads, slots, tokens, steps, seconds: last.seconds };
}

export function sentence({ tokens, steps, seconds, threads, perStep }) {
  const written = threads > 1 ? `, written by ${threads} threads` : "";
  const took = `${tokens} tokens in ${steps} steps and ${seconds.toFixed(1)} s${written}`;
  return `${took}: ${perStep.toFixed(2)} tokens a step`;
}

export function number(value, digits) {
  return value === null || !Number.isFinite(value) ? "–" : value.toFixed(digits);
}

// A bar for each step, as high as it brought tokens, in the colours of the threads that wrote them.
export class Ribbon {
  constructor() {
    this.root = document.createElementNS(SVG, "svg");
    for (const [name, value] of [["class", "ribbon"], ["aria-hidden", "true"], ["preserveAspectRatio", "none"]]) {
      this.root.setAttribute(name, value);
    }
  }

  draw(recording) {
    const steps = recording.steps.slice(-BARS);
    const highest = Math.max(1, ...steps.map(({ threads }) => total(threads)));
    const unit = Math.min(UNIT, ROOM / highest);
    this.root.setAttribute("viewBox", `0 0 ${BARS * 4} ${ROOM}`);
    this.root.replaceChildren(...steps.flatMap(({ threads }, place) => bar(threads, place, unit)));
  }
}

function total(threads) {
  return threads.reduce((sum, [, count]) => sum + count, 0);
}

function bar(threads, place, unit) {
  let y = ROOM;
  return threads.map(([hue, count]) => {
    y -= count * unit;
    const rect = document.createElementNS(SVG, "rect");
    const values = { x: place * 4, y, width: 3, height: count * unit, class: `hue-${hue}` };
    for (const [name, value] of Object.entries(values)) rect.setAttribute(name, value);
    return rect;
  });
}
