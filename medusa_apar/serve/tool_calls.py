"""Calls of tools in an answer's text, as Hermes and Qwen write them: <tool_call>{"name": ..., ...}</tool_call>.

A text becomes what is said and what is called, the same however it is cut into pieces. What only looks like a call
stays text.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from medusa_apar.json_files import is_text, parse
from medusa_apar.verify.guides import Guide

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_DATA = ("const", "enum", "default", "examples")  # of a schema, what is none


@dataclass(frozen=True, slots=True)
class ToolCall:
    """index: among the answer's calls. arguments: a JSON object."""

    index: int
    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex}", compare=False)

    def as_json(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class ToolCalls:
    """Parts the text of one answer into what is said and what is called.

    What is said is the text without its calls and their marks, byte for byte: white space beside a call, too. The last
    call need not be closed, as the answer may stop right behind it.

    guided: the whole text is the JSON of one call, without marks around it, as `call_guide` has it written.
    once: calls behind the first are left out.

    count: calls so far.
    """

    def __init__(self, guided: bool = False, once: bool = False) -> None:
        self.count = 0
        self._guided, self._once = guided, once
        self._held = ""  # what may be or become a call
        self._looked = 0  # characters of it in which no end begins

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """What a further part of the text adds to what is said and to what is called."""
        said, calls = list[str](), list[ToolCall]()
        self._held += text
        while not self._guided and (taken := self._next()) is not None:
            self._take(*taken, said, calls)
        return "".join(said), calls

    def end(self) -> tuple[str, list[ToolCall]]:
        """What is left, now that no text follows."""
        said, calls = list[str](), list[ToolCall]()
        whole, self._held = self._held, ""
        body = whole if self._guided else whole[len(OPEN) :] if whole.startswith(OPEN) else None
        self._take(whole, body, said, calls)
        return "".join(said), calls

    def _next(self) -> tuple[str, str | None] | None:
        """Takes out of what is held a part that is text (and None), or may be a call (and what stands between its
        marks); None where more has to come first."""
        count = 0
        body: str | None = None
        if not self._held.startswith(OPEN):
            count = _first_mark(self._held)
        elif self._held[len(OPEN) :].lstrip()[:1] not in ("", "{"):
            count = len(OPEN)  # it only speaks of a call, which nobody should wait for
        elif (end := self._held.find(CLOSE, max(self._looked, len(OPEN)))) >= 0:
            count, body = end + len(CLOSE), self._held[len(OPEN) : end]
        if not count:
            self._looked = len(self._held) - len(CLOSE) + 1
            return None
        whole, self._held, self._looked = self._held[:count], self._held[count:], 0
        return whole, body

    def _take(self, whole: str, body: str | None, said: list[str], calls: list[ToolCall]) -> None:
        call = None if body is None else _call(body, self.count)
        if call is None:
            said.append(whole)
        elif not (self._once and self.count):
            calls.append(call)
            self.count += 1


def call_guide(tools: Sequence[dict[str, Any]]) -> Guide:
    """What an answer has to be that calls one of these tools of OpenAI's API. ValueError for what is no schema."""
    found = []
    for place, tool in enumerate(tools):
        function = tool["function"]
        arguments = _moved(function.get("parameters") or {"type": "object"}, f"#/anyOf/{place}/properties/arguments")
        found.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return Guide.json_schema({"anyOf": found})


def _moved(schema: Any, place: str) -> Any:
    """A schema that stands within another, at a place: its references to itself follow."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict) or "$id" in schema:  # whose references start at itself
        return schema
    moved = {name: value if name in _DATA else _moved(value, place) for name, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = place + reference[1:]
    return moved


def _first_mark(text: str) -> int:
    """Where a call begins, or may begin once more has come; the text's length where none does."""
    found = text.find(OPEN)
    if found >= 0:
        return found
    most = min(len(text), len(OPEN) - 1)
    return len(text) - next((length for length in range(most, 0, -1) if text.endswith(OPEN[:length])), 0)


def _call(body: str, index: int) -> ToolCall | None:
    """None for what is no call."""
    try:
        found = parse(body)
        name, arguments = (found["name"], found.get("arguments", {})) if isinstance(found, dict) else (None, None)
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (ValueError, KeyError, RecursionError):
        return None
    if not isinstance(name, str) or not name or not isinstance(arguments, dict) or not is_text(name + written):
        return None
    return ToolCall(index, name, written)
