"""Docstrings as Markdown, for Griffe, which reads them for the site: our lines of "name: meaning" become lists.

What comments say of the fields of a dataclass is put behind its docstring.
"""

from __future__ import annotations

import re
from typing import Any

try:  # the tests need only the functions
    from griffe import Extension
except ModuleNotFoundError:
    Extension = object

_NAMES = r"[a-z_]\w*(?:, [a-z_]\w*)*"
_FIELD = re.compile(rf"({_NAMES}): (?=\S)")
_TITLE = re.compile(rf"^(?:Args|Attributes):[ \n](?={_NAMES}: )", re.MULTILINE)  # of what Griffe takes for plain text
_NEXT = re.compile(rf"(?<=\.) (?={_NAMES}: \S)")  # of several in a line

_COMMENT = re.compile(r" +# (.*)")
_COMMENTED = re.compile(r"    (\w+): .*?  # (?!type: )(.*)")
_BARE = re.compile(r"    ([a-z]\w*): ")  # private ones are nobody's business


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


def commented(fields: str) -> list[str]:
    """What comments say of a class's fields, as items: beside a field, or above some that have none beside them."""
    items: list[str] = []
    block, names = "", list[str]()

    def end_block() -> None:
        if block and names:
            items.append(f"- {', '.join(f'`{name}`' for name in names)}: {block[0].lower()}{block[1:]}")

    for line in fields.split("\n"):
        if above := _COMMENT.fullmatch(line):
            if names:
                end_block()
                block, names = "", []
            block = f"{block} {above[1]}".strip()
        elif beside := _COMMENTED.fullmatch(line):
            end_block()
            block, names = "", []
            items.append(f"- `{beside[1]}`: {beside[2]}")
        elif field := _BARE.match(line):
            names.append(field[1])
    end_block()
    return items


class Docstrings(Extension):
    def on_instance(self, *, obj: Any, **more: Any) -> None:
        if obj.docstring is None:
            return
        obj.docstring.value = listed(obj.docstring.value)
        if obj.is_class and any("dataclass" in str(decorator.value) for decorator in obj.decorators):
            lines = obj.filepath.read_text(encoding="utf-8").split("\n")[obj.docstring.endlineno : obj.endlineno]
            fields = re.split(r"\n    (?:@|def )", "\n".join(lines), maxsplit=1)[0]
            if items := commented(fields):
                obj.docstring.value += "\n\n" + "\n".join(items)
