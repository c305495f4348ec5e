"""What a body says of tools: those there are, which of them has to be called, and what was called before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from .bodies import Body, Checked, Text


class ToolFunction(Body):
    """parameters: a JSON schema; by default any object."""

    name: Text
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: ToolFunction


class CalledFunction(Body):
    name: Text
    arguments: Text


class CalledTool(Body):
    id: Text
    type: Literal["function"]
    function: CalledFunction


@dataclass(frozen=True, slots=True)
class NamedTool:
    """The tool that an answer has to call."""

    name: str


def _tool_choice(value: Any) -> str | NamedTool:
    if value in ("none", "auto", "required"):
        word: str = value
        return word
    match value:
        case {"type": "function", "function": {"name": str(name), **others}, **more} if not others and not more:
            return NamedTool(name)
    raise ValueError('must be "none", "auto", "required" or {"type": "function", "function": {"name": "..."}}')


_NAMED_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string"}},
            "required": ["name"],
            "additionalProperties": False,
        },
    },
    "required": ["type", "function"],
    "additionalProperties": False,
}
TOOL_CHOICE = Checked(_tool_choice, {"anyOf": [{"enum": ["none", "auto", "required"]}, _NAMED_SCHEMA]})
