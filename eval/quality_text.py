"""What the text of an answer tells by itself: its lists and their heads, its details, and how much it repeats."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from medusa_apar.finetune.corpus import repeated_share
from medusa_apar.finetune.rules import is_narrative, paragraph_tree, splice
from medusa_apar.threads.list_items import ListItem, indentation

from .loops import LOOPS, looping_share

# A heading in Markdown, or a line that is bold from end to end.
_HEADING = re.compile(r"#{1,6}[ \t]+\S.*|(\*\*|__)[^*_\n]+\1:?")
_HEAD_ALONE = re.compile(r".*(?::|\*\*|__)")


@dataclass(slots=True)
class Item:
    """A list item with all that belongs to it, text[begin:end] without space at its end.

    head: its title in lower case, or its first line where it has none.
    """

    marker: ListItem
    head: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Detail:
    """What a thread of its own could write, text[begin:end], and the line before it."""

    head: str
    begin: int
    end: int


def lists_of(text: str) -> list[list[Item]]:
    """The lists of a text, each with its items in order, at least one.

    A line belongs to the item before it where it is indented deeper, follows directly, or follows a head that stands
    alone; so do nested items. A numbered list goes on behind a paragraph if its next number comes; a bulleted one does
    not. Lines of code are no items.
    """
    lists: list[list[Item]] = []
    current: list[Item] | None = None  # whose last item is being read; None outside of items
    for begin, end, blank_before, code in _lines(text):
        line = text[begin:end]
        marker = None if code else ListItem.of(line)
        if current is not None:
            last = current[-1]
            deeper = indentation(line) > last.marker.indent or (marker and last.marker.holds(line.strip()))
            alone = blank_before and _HEAD_ALONE.fullmatch(text, last.begin, last.end) is not None
            if deeper or (marker is None and (code or not blank_before or alone)):
                last.end = end
                continue
        if marker is None:
            current = None
            continue
        current = _home(marker, current, lists)
        if current is None:
            lists.append(current := [])
        current.append(Item(marker, _head(line, marker), begin, end))
    return lists


def _home(marker: ListItem, current: list[Item] | None, lists: list[list[Item]]) -> list[Item] | None:
    """The list that an item goes on with: the current one, be it by the same number as Markdown allows, or a numbered
    one behind something else."""
    if current is not None:
        last = current[-1].marker
        if marker.follows(last) or (marker.indent, marker.mark, marker.number) == (last.indent, last.mark, last.number):
            return current
    if marker.number is None:
        return None
    return next((its for its in reversed(lists) if marker.follows(its[-1].marker)), None)


def _lines(text: str) -> Iterator[tuple[int, int, bool, bool]]:
    """Begin, end without space, whether a blank line stands before, and whether it is code, of lines with text."""
    begin, blank, fenced = 0, False, False
    for line in text.split("\n"):
        if line.strip():
            fence = line.lstrip().startswith(("```", "~~~"))
            yield begin, begin + len(line.rstrip()), blank, fenced or fence
            fenced ^= fence
        blank = not line.strip()
        begin += len(line) + 1


def _head(line: str, marker: ListItem) -> str:
    return marker.title or line.split(None, 1)[1].strip("*_.:; ").casefold()


def stopped_after_one(text: str) -> bool:
    """Whether a text that its model ended announces a list and stops within the first item.

    It has one list item in all, a bullet or number 1, and ends within it. Or it has one heading and no list item, with
    an introduction before the heading: without one it would be the title of the whole.
    """
    items = [item for its in lists_of(text) for item in its]
    if items:
        return len(items) == 1 and items[0].marker.number in (None, 1) and items[0].end == len(text.rstrip())
    headings = [begin for begin, end, _, code in _lines(text) if not code and _HEADING.fullmatch(text, begin, end)]
    return len(headings) == 1 and bool(text[: headings[0]].strip())


def details(text: str, prompt: str) -> list[Detail]:
    """What the rule that made the training corpus would have threads write, whoever has written it here.

    Answers of all systems are cut alike, so that those without threads can be compared with those that have some.
    """
    found, before = [], ""
    for piece in paragraph_tree(text, is_narrative(prompt))[0].pieces:
        part = piece if isinstance(piece, str) else splice(piece)
        if not isinstance(piece, str):
            head = before.rstrip().rpartition("\n")[2].strip()
            found.append(Detail(head, len(before), len(before) + len(part)))
        before += part
    return found


def text_figures(text: str, ids: Sequence[int], ended: bool) -> dict[str, float | None]:
    """Figures of one answer by name; None where it has nothing that a figure could be of.

    ids: its tokens without special ones. ended: by itself, not by a limit. Distinct-n is of words in lower case (Li et
    al. 2016, section 5.3), repeated 4-grams of tokens; compression is zlib's ratio, bytes before over bytes after.
    """
    lists, words, data = lists_of(text), text.casefold().split(), text.encode()
    heads = [item.head for its in lists if len(its) > 1 for item in its]
    return {
        "ended": float(ended),
        "stopped_after_one": float(ended and stopped_after_one(text)),
        "has_list": float(bool(lists)),
        "items_per_list": sum(map(len, lists)) / len(lists) if lists else None,
        "duplicate_heads": 1 - len(set(heads)) / len(heads) if heads else None,
        "looping": float(looping_share(ids) > LOOPS),
        "repeated_4grams": repeated_share(list(ids)) if len(ids) >= 4 else None,
        **{f"distinct_{n}": 1 - repeated_share(words, n) if len(words) >= n else None for n in (1, 2, 3)},
        "compression": len(data) / len(zlib.compress(data, 9)) if data else None,
    }
