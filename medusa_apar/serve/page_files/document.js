// A finished answer as paragraphs and lists. Whatever a model writes is text: elements are made here, one by one, and
// nothing it says is ever read as HTML.

export function element(name, className = "", text = null) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== null) made.textContent = text;
  return made;
}

// pressed: whether it is, of one that stays so; null for others.
export function button(text, pressed = null) {
  const made = element("button", "quiet", text);
  made.type = "button";
  if (pressed !== null) made.ariaPressed = String(pressed);
  return made;
}

const ITEM = /^( *)(?:([-*•])|(\d{1,9})[.)]) +(?=\S)/;
const HEADING = /^(#{1,6}) +(?=\S)/;
const FENCE = /^ *```/;
const INLINE = /\*\*(?=\S)(.+?\S|\S)\*\*|`([^`]+)`/g;

// runs: [{end, hue}], which thread wrote the text up to each place; null for nobody in particular.
export function rendered(text, runs = null) {
  const page = new Page(text, runs);
  const root = document.createDocumentFragment();
  let [list, paragraph, code] = [null, null, null];
  for (const { from, to } of lines(text)) {
    const line = text.slice(from, to);
    if (FENCE.test(line)) {
      if (code === null) code = root.appendChild(element("pre")).appendChild(element("code"));
      else code = null;
      list = paragraph = null;
    } else if (code !== null) {
      code.append(`${line}\n`);
    } else if (!line.trim()) {
      paragraph = null;
    } else if (ITEM.test(line)) {
      const [marker, indent, , number] = line.match(ITEM);
      list = listFor(root, list, indent.length, number);
      paragraph = list.element.appendChild(element("li"));
      if (number && list.next !== Number(number)) paragraph.value = Number(number);
      list.next = Number(number) + 1;
      page.inline(paragraph, from + marker.length, to);
    } else if (HEADING.test(line)) {
      const [marker] = line.match(HEADING);
      page.inline(root.appendChild(element("h3")), from + marker.length, to);
      list = paragraph = null;
    } else if (paragraph !== null) {
      paragraph.append(element("br"));
      page.inline(paragraph, from, to);
    } else if (list !== null && /^ /.test(line)) {
      paragraph = (list.element.lastElementChild ?? list.element).appendChild(element("p"));
      page.inline(paragraph, from, to);
    } else {
      list = null;
      paragraph = root.appendChild(element("p"));
      page.inline(paragraph, from, to);
    }
  }
  return root;
}

function* lines(text) {
  for (let from = 0; from < text.length; ) {
    const found = text.indexOf("\n", from);
    const to = found < 0 ? text.length : found;
    yield { from, to };
    from = to + 1;
  }
}

// The list that an item of this indentation belongs to: that of the items before it, one within the last of them, or
// one around them.
function listFor(root, list, indent, number) {
  while (list !== null && indent < list.indent && list.outer !== null) list = list.outer;
  const name = number === undefined ? "ul" : "ol";
  if (list !== null && indent >= list.indent + 2) {
    const within = list.element.lastElementChild.appendChild(element(name));
    return { element: within, indent, outer: list, next: 1 };
  }
  if (list !== null && list.element.localName === name) return list;
  const around = list?.outer ? list.outer.element.lastElementChild : root;
  return { element: around.appendChild(element(name)), indent, outer: list?.outer ?? null, next: 1 };
}

class Page {
  constructor(text, runs) {
    Object.assign(this, { text, runs: runs ?? [] });
  }

  // Bold and code within one line.
  inline(parent, from, to) {
    let last = from;
    for (const match of this.text.slice(from, to).matchAll(INLINE)) {
      const begin = from + match.index;
      this.coloured(parent, last, begin);
      const [name, marks] = match[1] === undefined ? ["code", 1] : ["strong", 2];
      last = begin + match[0].length;
      this.coloured(parent.appendChild(element(name)), begin + marks, last - marks);
    }
    this.coloured(parent, last, to);
  }

  // Text from place to place, a span for each thread's part of it.
  coloured(parent, from, to) {
    let place = from;
    for (const run of this.runs) {
      if (run.end <= place || place >= to) continue;
      const end = Math.min(run.end, to);
      parent.append(element("span", `by hue-${run.hue}`, this.text.slice(place, end)));
      place = end;
    }
    if (place < to) parent.append(this.text.slice(place, to));
  }
}
