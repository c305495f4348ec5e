"""Docstrings as Markdown, for Griffe, which reads them for the site: our lines of "name: meaning" become lists."""

from __future__ import annotations

import re
from typing import Any

try:
    from griffe import Extension
except ModuleNotFoundError:  # the tests need `listed` alone
    Extension = object  # type: ignore[misc,assignment]

_NAMES = r"[a-z_]\w*(?:, [a-z_]\w*)*"
_FIELD = re.compile(rf"({_NAMES}): (?=\S)")
_TITLE = re.compile(rf"^(?:Args|Attributes):[ \n](?={_NAMES}: )", re.MULTILINE)  # of what Griffe takes for plain text
_NEXT = re.compile(rf"(?<=\.) (?={_NAMES}: \S)")  # of several in a line


def listed(docstring: str) -> str:
    """The docstring with its "name: meaning" as items. A meaning goes on up to the next name or an empty line."""
    done: list[str] = []
    item, before = False, ""
    for line in _TITLE.sub("", docstring).split("\n"):
        item = bool(line) and (item or not before and _FIELD.match(line) is not None)
        if not item:
            done.append(line)
        elif _FIELD.match(line):
            done += map(_named, _NEXT.split(line))
        else:
            first, *further = _NEXT.split(line.strip())
            done += ["    " + first, *map(_named, further)]
        before = line
    return "\n".join(done)


def _named(field: str) -> str:
    def bullet(found: re.Match[str]) -> str:
        return "- " + ", ".join(f"`{name}`" for name in found[1].split(", ")) + ": "

    return _FIELD.sub(bullet, field, count=1)


class Docstrings(Extension):
    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)
