"""List items as they are being written: where a title ends, what follows an item. Text alone, no tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass

_MARKER = re.compile(r"(?P<indent>[ \t]*)(?:(?P<number>\d{1,3})(?P<stop>[.)])|(?P<bullet>[-*+•]))[ \t]+(?=\S)")
_TITLE = re.compile(
    r"\*\*[^*\n]+\*\*(?: ?:| [-–—](?=\s|$))"  # **Title**: and **Title** -
    r"|\*\*[^*\n]+:\*\*"  # **Title:**
    r"|(?!https?:)[^*`:.!?\n]*[^*`:.!?\n\s\d]:(?=\s|$)"  # Title:
)


@dataclass(frozen=True, slots=True)
class ListItem:
    """A line that begins with a list marker.

    indent: columns before the marker. mark: a bullet, or what stands behind the number. title: up to its colon or dash,
    "" where there is none. only_title: whether nothing stands behind it.
    """

    indent: int
    number: int | None
    mark: str
    title: str
    only_title: bool

    @classmethod
    def of(cls, line: str) -> ListItem | None:
        marker = _MARKER.match(line)
        if marker is None:
            return None
        title = _TITLE.match(line, marker.end())
        if title is not None and len(title[0].split()) > MAX_HEAD_WORDS:
            title = None
        number = marker["number"]
        return cls(
            indent=indentation(marker["indent"]),
            number=None if number is None else int(number),
            mark=marker["stop"] or marker["bullet"],
            title=title[0].strip("*: -–—").casefold() if title else "",
            only_title=title is not None and not line[title.end() :].strip(),
        )

    @property
    def next_marker(self) -> str:
        return " " * self.indent + (self.mark if self.number is None else f"{self.number + 1}{self.mark}")

    def follows(self, other: ListItem) -> bool:
        """Whether this is the next item of the other's list."""
        number = None if other.number is None else other.number + 1
        return (self.indent, self.mark, self.number) == (other.indent, other.mark, number)

    def is_followed_by(self, begun: str) -> bool:
        """Whether a line of this indentation, of which at least one character is known, begins the next item.

        Who wrote this item may not have seen those before it, so any number will do that begins no list anew.
        """
        if self.number is None:
            return begun.startswith(self.mark) and not begun.startswith(2 * self.mark)
        marker = self.next_marker.strip()
        return marker.startswith(begun[: len(marker)].rstrip()) or (begun[0].isdigit() and begun[0] != "1")

    def holds(self, begun: str) -> bool:
        """Whether such a line belongs to this item although it is not indented: a numbered item may hold bullets."""
        return self.number is not None and begun[0] in "-*+•" and begun[:2] not in ("**", "--")


@dataclass(frozen=True, slots=True)
class ForkingItem:
    """An item that ends a text with its title.

    line_breaks: how many stand before the items of its list, 1 or 2. begin: where its line begins in the text, and
    second: that of the second item of its list. repeated: whether an item before it has the same title.
    """

    item: ListItem
    line_breaks: int
    begin: int
    second: int
    repeated: bool


def forking_item(text: str) -> ForkingItem | None:
    """The item whose title ends the text; None if it is the first of its list, or inside a code block."""
    lines = text.rstrip().split("\n")
    item = ListItem.of(lines[-1])
    if item is None or not item.only_title or text.count("```") % 2:
        return None
    begin = place = second = len(text.rstrip()) - len(lines[-1])
    line_breaks, between = 1, True
    titles: set[str] = set()
    first = None  # the earliest item found so far, which begins at `place_of_first`
    place_of_first = begin
    for line in reversed(lines[:-1]):
        place -= len(line) + 1
        if not line.strip():
            line_breaks += between
            continue
        between = False
        earlier = ListItem.of(line)
        if indentation(line) > item.indent or (earlier is not None and item.holds(line.strip())):
            continue
        if earlier is None or not (first or item).follows(earlier):
            break
        titles.add(earlier.title)
        first, second, place_of_first = earlier, place_of_first, place
    if first is None:
        return None
    return ForkingItem(item, min(line_breaks, 2), begin, second, item.title in titles)


def indentation(line: str) -> int:
    expanded = line.expandtabs(4)
    return len(expanded) - len(expanded.lstrip(" "))


def begins_item(begun: str) -> bool:
    """Whether a line may begin a list item or a heading."""
    return begun[0].isdigit() or begun[0] in "-*+•#"


MAX_HEAD_WORDS = 12
