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
_NEXT = re.compile(rf"(?<=\.) (?={_NAMES}: \S)")  # of several in a line


def listed(docstring: str) -> str:
    """The docstring with its lines of "name: meaning" as items; a meaning goes on in lines that are indented deeper."""
    done: list[str] = []
    item, before = False, ""
    for line in docstring.split("\n"):
        if (item or not before) and _FIELD.match(line):
            item = True
            done += [_named(field) for field in _NEXT.split(line)]
        elif item and line.startswith("    "):
            first, *further = _NEXT.split(line)
            done += [first, *map(_named, further)]
        else:
            if item and line:
                done.append("")  # or Markdown would take it for the item's
            item = False
            done.append(line)
        before = line
    return "\n".join(done)


def _named(field: str) -> str:
    return _FIELD.sub(
        lambda found: "- " + ", ".join(f"`{name}`" for name in found[1].split(", ")) + ": ", field, count=1
    )


class Docstrings(Extension):
    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)
