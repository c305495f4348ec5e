"""Chat answers as paragraph trees, by rule.

A thread is a list of pieces: text, or a child thread hanging under a `[Fork]` at that place. Lists fork after an
item's head, paragraphs after their first sentence; code, maths, tables, HTML and letters stay one thread, so that
the model learns where not to fork. `splice` gives back the answer, character for character.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

MIN_FORKS = 3
MIN_DETAIL_WORDS = 6  # about eight tokens: a shorter child costs more steps than it saves
MAX_HEAD_WORDS = 12
MIN_SENTENCE_WORDS = 3  # "Sure!" is no topic sentence

_UNFORKABLE = re.compile(
    r"```|~~~"
    r"|\$\$|\\\(|\\\[|\\frac|\\begin\{"
    r"|^.*\|.*\|"
    r"|</?[A-Za-z][^<>\n]*>"
    r"|^\s*(?:def|class|import|from|function|const|let|var|public|private|return|SELECT|#include)\b.*[;:(){}=,.]\s*$"
    r"|[;{}]\s*$"
    r"|^(?:Dear |Subject:|Sincerely|Best regards|Hi \[|Once upon a time)"
    r"|[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]",
    re.MULTILINE,
)
_NARRATIVE = re.compile(
    r"\b(?:stor(?:y|ies)|poems?|haiku|letter|e-?mail|script|dialogue|lyrics|songs?|rap|jokes?|novel|chapter|scene|monologue)\b",
    re.IGNORECASE,
)
_EQUATION = re.compile(r"[\w)] ?= ?[-\w(]|\d ?[*/^] ?\d")
_MARKER = re.compile(r"([ \t]*)(?:(\d{1,3}[.)])|([-*+•]))[ \t]+(?=\S)")
_BOLD_HEAD = re.compile(r"(\*\*|__)[^*_\n]+\1(?:[ \t]*[:–—-](?=\s|$)|[ \t]*$)?|(\*\*|__)[^*_\n]+:\2")
_PLAIN_HEAD = re.compile(r"[^\n]*?(?::(?=\s|$)|\s[–—-](?=\s))")
_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]*]*(?=\s+[\"'“‘(\[*]*[A-Z0-9])")
_ABBREVIATION = re.compile(
    r"(?:\b(?:Dr|Mr|Mrs|Ms|Prof|St|Sr|Jr|Inc|Ltd|Co|Corp|vs|etc|cf|al|No|Vol|Fig|Lb|Oz|approx|e\.g|i\.e|a\.m|p\.m)"
    r"|\b[A-Z](?:\.[A-Z])*|(?:^|\s)\d{1,3})\.$"
)


@dataclass(slots=True)
class Thread:
    """One thread of a paragraph tree: text pieces, and child threads where it forks."""

    pieces: list[str | Thread] = field(default_factory=list)

    @property
    def forks(self) -> int:
        """Forks in this thread and below it."""
        return sum(1 + piece.forks for piece in self.pieces if isinstance(piece, Thread))


@dataclass(slots=True)
class Example:
    """One conversation and the paragraph tree of its last answer."""

    id: str
    messages: list[dict[str, str]]  # all but the last answer
    tree: Thread
    kind: str  # "titled", "items", "paragraphs" or "plain": the rule that forked the answer


def splice(thread: Thread) -> str:
    """The reading order: each child's text in the place of its `[Fork]`."""
    return "".join(piece if isinstance(piece, str) else splice(piece) for piece in thread.pieces)


def show(thread: Thread) -> str:
    """The tree as text with its control tokens, for people."""
    parts = (piece if isinstance(piece, str) else f"[Fork]⟨[Child]{show(piece)}⟩" for piece in thread.pieces)
    return "".join(parts)


def read_examples(paths: list[Path]) -> Iterator[Example]:
    """Examples of chat JSONL files, gzipped or not, in file order."""
    for path in paths:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                row = json.loads(line)
                *context, answer = row["messages"]
                if answer["role"] != "assistant":
                    raise ValueError(f"{path}:{number + 1}: the last message is by {answer['role']!r}, not 'assistant'")
                tree, kind = paragraph_tree(answer["content"], bool(_NARRATIVE.search(context[-1]["content"])))
                yield Example(row.get("id", f"{path.name}/{number}"), context, tree, kind)


def paragraph_tree(text: str, narrative: bool = False) -> tuple[Thread, str]:
    """The tree of an answer and the rule that made it; fewer than three forks leave the answer whole.

    A narrative forks at titled items only: its sentences depend on all that came before them.
    """
    if not _UNFORKABLE.search(text) and len(_EQUATION.findall(text)) < 2:
        titled, spans = _item_details(text)
        if titled >= MIN_FORKS or (len(spans) >= MIN_FORKS and not narrative):
            return _cut(text, spans), "titled" if titled >= MIN_FORKS else "items"
        spans = _paragraph_details(text)
        if len(spans) >= MIN_FORKS and not narrative:
            return _cut(text, spans), "paragraphs"
    return Thread([text] if text else []), "plain"


def _cut(text: str, spans: list[tuple[int, int]]) -> Thread:
    """The text as a trunk whose children are the given spans, in order and disjoint."""
    pieces: list[str | Thread] = []
    start = 0
    for begin, end in spans:
        pieces += [text[start:begin], Thread([text[begin:end]])]
        start = end
    if start < len(text):
        pieces.append(text[start:])
    return Thread(pieces)


def _item_details(text: str) -> tuple[int, list[tuple[int, int]]]:
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


def _items(text: str) -> list[tuple[int, int]]:
    """The bodies of top-level list items; nested items and indented lines belong to their item."""
    items: list[tuple[int, int]] = []
    opened: int | None = None  # where the body of the item being read starts
    kind, indent, blank, end, offset = "", 0, False, 0, 0
    for line in text.splitlines(keepends=True):
        stripped = line.strip()
        marker = _MARKER.match(line)
        line_indent = len(line) - len(line.lstrip())
        if opened is not None and stripped:
            same_level = marker and line_indent <= indent and _kind(marker) == kind
            if same_level or (blank and not marker and line_indent <= indent):
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


def _paragraph_details(text: str) -> list[tuple[int, int]]:
    """The part after the first sentence, for every paragraph of an answer that has three or more."""
    blocks = [match.span() for match in re.finditer(r"\S(?:.|\n(?!\s*\n))*", text)]
    spans = []
    for start, end in blocks:
        end = start + len(text[start:end].rstrip())
        if text.startswith("#", start) or _MARKER.match(text, start):
            continue
        begin = _first_sentence_end(text, start, end)
        if begin is not None and len(text[begin:end].split()) >= MIN_DETAIL_WORDS:
            spans.append((begin, end))
    return spans if len(blocks) >= MIN_FORKS else []


def _first_sentence_end(text: str, start: int, end: int) -> int | None:
    """Where the first sentence of text[start:end] stops, or None where nothing follows it."""
    for stop in _SENTENCE_END.finditer(text, start, end):
        sentence = text[start : stop.end()]
        short = len(sentence.split()) < MIN_SENTENCE_WORDS
        if text[stop.end()] == "\n" or _inside_quotes(sentence):
            return None  # verse, or speech that goes on
        if not short and not _ABBREVIATION.search(text[start : stop.start() + 1]):
            return stop.end()
    return None


def _inside_quotes(text: str) -> bool:
    return text.count('"') % 2 == 1 or text.count("“") != text.count("”")
