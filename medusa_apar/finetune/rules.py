"""Where an answer splits: the rules that cut its text into a paragraph tree.

A thread is a list of pieces: text, or a child thread hanging under a `[Fork]` at that place. Sections fork after their
heading, list items after their head, paragraphs after their first sentence (APAR, section 3.2, has the last two); a
child is cut by the same rules once more. Code, maths, tables, markup, links, letters and stories stay one thread, so
that the model learns where not to fork. `splice` gives back the answer, character for character.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from medusa_apar.threads.list_items import MAX_HEAD_WORDS

MIN_FORKS = 3
MIN_NESTED_FORKS = 2  # in a child: the trunk has gone on long ago, so two are worth it
MAX_DEPTH = 2
MIN_DETAIL_WORDS = 6  # about eight tokens: a shorter child costs more steps than it saves
MIN_SENTENCE_WORDS = 3  # "Sure!" is no topic sentence
LONGEST_ABBREVIATION = 16  # characters before a stop in which to look for one

KINDS = ("sections", "titled", "items", "paragraphs", "plain")

# Why an answer stays whole, tried in this order.
UNFORKABLE = {
    name: re.compile(pattern, re.MULTILINE)
    for name, pattern in {
        # [^\S\n] and not \s, which would run on over all empty lines from each of them.
        "code": r"```|~~~|[;{}][^\S\n]*$"
        r"|^[^\S\n]*(?:def|class|import|from|function|const|let|var|public|private|return|SELECT|#include)\b"
        r".*[;:(){}=,.][^\S\n]*$",
        "maths": r"\$\$|\\\(|\\\[|\\frac|\\begin\{",
        "table": r"^.*\|.*\|",
        "markup": r"</?[A-Za-z][^<>\n]*>",
        "link": r"https?://|\bwww\.",
        "letter": r"^(?:Dear |Subject:|Sincerely|Best regards|Hi \[)",
        "story": r"^Once upon a time",
        "cjk": r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]",
    }.items()
}
_NARRATIVE = re.compile(
    r"\b(?:stor(?:y|ies)|poems?|haiku|letter|e-?mail|script|dialogue|lyrics|songs?|rap|jokes?|novel|chapter|scene|monologue)\b",
    re.IGNORECASE,
)
_EQUATION = re.compile(r"[\w)] ?= ?[-\w(]|\d ?[*/^] ?\d")
_MARKER = re.compile(r"([ \t]*)(?:(\d{1,3}[.)])|([-*+•]))[ \t]+(?=\S)")
_BOLD_HEAD = re.compile(r"(\*\*|__)[^*_\n]+\1(?:[ \t]*[:–—-](?=\s|$)|[ \t]*$)?|(\*\*|__)[^*_\n]+:\2")
_PLAIN_HEAD = re.compile(r"[^\n]*?(?::(?=\s|$)|\s[–—-](?=\s))")
_HEAD_ALONE = re.compile(r"[^\n]*(?::|\*\*|__)[ \t]*")
# A heading has a line of its own: Markdown's, a bold line, or a few words and a colon.
_HEADING = re.compile(
    r"^(?:#{1,6}[ \t]+\S[^\n]*|(?:\*\*|__)[^*_\n]+(?:\*\*|__):?|(?=[A-Z])[^\n.!?*:#]{2,60}:)[ \t]*$", re.MULTILINE
)
_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]*]*(?=\s+[\"'“‘(\[*]*[A-Z0-9])")
_ABBREVIATION = re.compile(
    r"(?:\b(?:Dr|Mr|Mrs|Ms|Prof|St|Sr|Jr|Gen|Sen|Rep|Gov|Capt|Col|Lt|Sgt|Rev|Hon|Mt|Ave|Blvd|Dept|Univ|Inc|Ltd|Co|Corp"
    r"|vs|etc|cf|al|No|Nos|Vol|Fig|Figs|Eq|Sec|Ch|Ed|Eds|pp|Lb|Oz|Ph\.D|M\.D|B\.[AS]|approx|est|e\.g|i\.e|a\.m|p\.m"
    r"|Jan|Feb|Mar|Apr|Aug|Sept?|Oct|Nov|Dec)"
    r"|\b[A-Z](?:\.[A-Z])*|(?:^|\s)\d{1,3})\.$"
)

Span = tuple[int, int]  # begin and end in a text


@dataclass(slots=True)
class Thread:
    """One thread of a paragraph tree: text pieces, and child threads where it forks."""

    pieces: list[str | Thread] = field(default_factory=list)

    @property
    def children(self) -> list[Thread]:
        return [piece for piece in self.pieces if isinstance(piece, Thread)]

    @property
    def forks(self) -> int:
        """Forks in this thread and below it."""
        return sum(1 + child.forks for child in self.children)

    @property
    def depth(self) -> int:
        """Forks on the longest way down: 0 for a thread that stays whole."""
        return max((1 + child.depth for child in self.children), default=0)


def splice(thread: Thread) -> str:
    """The reading order: each child's text in the place of its `[Fork]`."""
    return "".join(piece if isinstance(piece, str) else splice(piece) for piece in thread.pieces)


def show(thread: Thread) -> str:
    """The tree as text with its control tokens, for people."""
    parts = (piece if isinstance(piece, str) else f"[Fork]⟨[Child]{show(piece)}⟩" for piece in thread.pieces)
    return "".join(parts)


def is_narrative(prompt: str) -> bool:
    """Whether a prompt asks for a story, letter, poem...: its sentences will depend on all that came before them."""
    return bool(_NARRATIVE.search(prompt))


def paragraph_tree(text: str, narrative: bool = False, max_depth: int = MAX_DEPTH) -> tuple[Thread, str, str]:
    """An answer's tree, the rule that made it (one of KINDS), and for a plain one why it stays whole (else "").

    Fewer than three forks leave an answer whole. A narrative forks at sections and titled items only.
    """
    reason = next((name for name, pattern in UNFORKABLE.items() if pattern.search(text)), None)
    if reason is None and len(_EQUATION.findall(text)) >= 2:
        reason = "maths"
    if reason is None and max_depth > 0:
        kind, spans = _split(text, narrative, MIN_FORKS)
        if spans:
            return _cut(text, spans, narrative, max_depth - 1), kind, ""
        reason = "narrative" if narrative and _split(text, False, MIN_FORKS)[1] else "few parts"
    return Thread([text] if text else []), "plain", reason or "few parts"


def _split(text: str, narrative: bool, least: int) -> tuple[str, list[Span]]:
    """The first rule that finds `least` details or more in a text, and those details, in order and disjoint."""
    spans = _section_details(text)
    if len(spans) >= least:
        return "sections", spans
    titled, spans = _item_details(text)
    if titled >= least:
        return "titled", spans
    if not narrative:
        if len(spans) >= least:
            return "items", spans
        spans = _paragraph_details(text, least)
        if len(spans) >= least:
            return "paragraphs", spans
    return "plain", []


def _cut(text: str, spans: list[Span], narrative: bool, depth_left: int) -> Thread:
    """The text as a thread whose children are the given spans, themselves cut while there is depth left."""
    pieces: list[str | Thread] = []
    start = 0
    for begin, end in spans:
        detail = text[begin:end]
        nested = _split(detail, narrative, MIN_NESTED_FORKS)[1] if depth_left else []
        child = _cut(detail, nested, narrative, depth_left - 1) if nested else Thread([detail])
        pieces += [text[start:begin], child]
        start = end
    if start < len(text):
        pieces.append(text[start:])
    return Thread(pieces)


def _section_details(text: str) -> list[Span]:
    """What lies below each heading, where it is long enough to fork."""
    headings = [match.span() for match in _HEADING.finditer(text)]
    ends = [*(start for start, _ in headings[1:]), len(text)][: len(headings)]
    spans = []
    for (_, begin), end in zip(headings, ends, strict=True):
        end = begin + len(text[begin:end].rstrip())
        if len(text[begin:end].split()) >= MIN_DETAIL_WORDS:
            spans.append((begin, end))
    return spans


def _item_details(text: str) -> tuple[int, list[Span]]:
    """How many list items have a head, and the span of every detail long enough to fork."""
    titled, spans = 0, []
    for body, end in _items(text):
        head_end = _head_end(text, body, end)
        begin = head_end if head_end is not None else _first_sentence_end(text, body, end)
        if head_end is None and begin is not None and "\n" in text[body:begin]:
            continue  # the sentence belongs to a nested item
        if begin is not None and len(text[begin:end].split()) >= MIN_DETAIL_WORDS:
            titled += head_end is not None
            spans.append((begin, end))
    return titled, spans


def _items(text: str) -> list[Span]:
    """The bodies of top-level list items; nested items and indented lines belong to their item.

    So does a paragraph of any indent after an item that is nothing but a head.
    """
    items: list[Span] = []
    opened: int | None = None  # where the body of the item being read starts
    kind, indent, blank, end, offset = "", 0, False, 0, 0
    for line in text.splitlines(keepends=True):
        stripped = line.strip()
        marker = _MARKER.match(line)
        line_indent = len(line) - len(line.lstrip())
        if opened is not None and stripped:
            same_level = marker and line_indent <= indent and _kind(marker) == kind
            outside = blank and not marker and line_indent <= indent
            if same_level or (outside and not _HEAD_ALONE.fullmatch(text, opened, end)):
                items.append((opened, end))
                opened = None
        if opened is None and marker:
            opened = offset + marker.end()
            kind, indent = _kind(marker), line_indent
        if stripped:
            end = offset + len(line.rstrip())
        blank = not stripped
        offset += len(line)
    if opened is not None:
        items.append((opened, end))
    return items


def _kind(marker: re.Match) -> str:
    return "number" if marker[2] else marker[3]


def _head_end(text: str, body: int, end: int) -> int | None:
    """Where an item's head stops (after its colon, dash or bold), or None where it has none."""
    line_end = min(end, text.find("\n", body) if "\n" in text[body:end] else end)
    line = text[body:line_end]
    head = _BOLD_HEAD.match(line) or _PLAIN_HEAD.match(line)
    if head is None or not head[0] or head.end() == 0:
        return None
    if len(head[0].split()) > MAX_HEAD_WORDS or _first_sentence_end(line, 0, head.end()) is not None:
        return None
    if text[body + head.end() - 1] == "*" and head.end() < len(line) and ":" not in head[0]:
        return None  # bold words that open a sentence
    if _inside_quotes(head[0]):
        return None
    return body + head.end()


def _paragraph_details(text: str, least: int) -> list[Span]:
    """The part after the first sentence, for every paragraph of a text that has `least` or more."""
    blocks = [match.span() for match in re.finditer(r"\S(?:.|\n(?!\s*\n))*", text)]
    spans = []
    for start, end in blocks:
        end = start + len(text[start:end].rstrip())
        if text.startswith("#", start) or _MARKER.match(text, start):
            continue
        begin = _first_sentence_end(text, start, end)
        if begin is not None and len(text[begin:end].split()) >= MIN_DETAIL_WORDS:
            spans.append((begin, end))
    return spans if len(blocks) >= least else []


def _first_sentence_end(text: str, start: int, end: int) -> int | None:
    """Where the first sentence of text[start:end] stops, or None where nothing follows it.

    Each stop looks at what is new since the one before: a text may be thousands of them.
    """
    words = straight = opened = closed = 0
    seen = start
    for stop in _SENTENCE_END.finditer(text, start, end):
        new = text[seen : stop.end()]
        seen = stop.end()
        words += len(new.split())  # a stop is followed by space, so no word is cut
        straight, opened, closed = straight + new.count('"'), opened + new.count("“"), closed + new.count("”")
        if text[seen] == "\n" or straight % 2 == 1 or opened != closed:
            return None  # verse, or speech that goes on
        last = text[max(start, stop.start() + 1 - LONGEST_ABBREVIATION) : stop.start() + 1]
        if words >= MIN_SENTENCE_WORDS and not _ABBREVIATION.search(last):
            return seen
    return None


def _inside_quotes(text: str) -> bool:
    return text.count('"') % 2 == 1 or text.count("“") != text.count("”")
