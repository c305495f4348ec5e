"""The JSON of a request's body: what schemas are made of, and one sentence for what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError, core_schema
from starlette.requests import Request as HttpRequest

from .aside import Aside
from .errors import ApiError

_LONGEST_NAME = 100  # characters of what a client's own field is named


class Body(BaseModel):
    """An object of which every field is known and has the very type that it should have.

    A body that is wrong in a hundred thousand places costs no more than one that is wrong in one: the first unknown
    field ends it, and lists that can be long have to be `fail_fast`.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _fields_are_known(cls, value: Any) -> Any:
        if isinstance(value, dict):
            known = _names(cls)
            unknown = next((name for name in value if name not in known), None)
            if unknown is not None:
                raise PydanticCustomError("unknown_field", "is no field", {"name": unknown})
        return value


@cache
def _names(schema: type[BaseModel]) -> frozenset[str]:
    return frozenset(field.alias or name for name, field in schema.model_fields.items())


AnyBody = TypeVar("AnyBody", bound=Body)


def whole_text(value: str) -> str:
    if "\0" in value:
        raise ValueError("holds a null character")
    return value


Text = Annotated[str, AfterValidator(whole_text)]


@dataclass(frozen=True, slots=True, eq=False)
class Checked:
    """Marks a field of any type that a function looks at, where pydantic would tell of several types in many sentences.

    check: returns the field's value; raises ValueError with a sentence's second half. null is let through. schema: what
    the function takes, for those who read it.
    """

    check: Callable[[Any], Any]
    schema: dict[str, Any]
    required: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(self, _: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return self.schema if self.required else {"anyOf": [self.schema, {"type": "null"}]}

    def _checked(self, value: Any) -> Any:
        return None if value is None and not self.required else self.check(value)


def one_of(*values: Any) -> Checked:
    """One of these, and of their types: true is not 1."""

    def check(value: Any) -> Any:
        if not any(type(value) is type(known) and value == known for known in values):
            raise ValueError(f"must be one of {', '.join(map(json.dumps, values))}, not {_shown(value)}")
        return value

    return Checked(check, {"enum": list(values)})


def unsupported(reason: str) -> Any:
    """The default of a field that OpenAI's API has and this server does not: null alone is taken."""
    return Field(default=None, description=f"Not supported: {reason}.", json_schema_extra={"reason": reason})


async def read(http: HttpRequest, schema: type[AnyBody], aside: Aside) -> AnyBody:
    """The request's body. ApiError 400, naming the field, for what it should not be."""
    raw = await http.body()
    return await aside(lambda: _parsed(schema, raw), len(raw))


def _parsed(schema: type[AnyBody], raw: bytes) -> AnyBody:
    try:
        return schema.model_validate_json(raw)
    except ValidationError as error:
        raise _refusal(schema, error) from error


def _refusal(schema: type[Body], error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    kind, place, said = first["type"], first["loc"], first["msg"]
    if kind == "unknown_field":
        place = (*place, first["ctx"]["name"])
    param = _param(place)
    name = param or "the body"
    if kind == "json_invalid":
        said = f"the body is not JSON: {first['ctx']['error']}"
    elif kind == "unknown_field":
        said = f"{name} is not a field that this server knows"
    elif kind == "missing":
        said = f"{name} is missing"
    elif kind == "none_required":
        said = f"{name} is not supported: {_reason(schema, place)}"
    elif kind == "value_error":
        said = f"{name} {first['ctx']['error']}"
        param = param or next(filter(schema.model_fields.__contains__, re.findall(r"\w+", said)), None)
    elif said.startswith("Input "):
        said = f"{name}{said.removeprefix('Input')}, not {_shown(first['input'])}"
    else:
        said = f"{name}: {said}"
    return ApiError(400, f"{said}.", param=param)


def _param(place: tuple[int | str, ...]) -> str | None:
    """`messages[0].content`, as OpenAI's API writes it; a name that cannot be printed stands there as JSON."""
    text = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part if part.isprintable() else json.dumps(part)}"
        for part in place
    )
    return text.removeprefix(".")[:_LONGEST_NAME] or None


def _reason(schema: type[BaseModel], place: tuple[int | str, ...]) -> str:
    """The one that `unsupported` was given, of a field of this schema or of one within it."""
    whole = _json_schema(schema)
    entries = [whole] if len(place) == 1 else list(whole.get("$defs", {}).values())
    found = (entry.get("properties", {}).get(str(place[-1]), {}).get("reason") for entry in entries)
    return next(filter(None, found), "leave it out")


@cache
def _json_schema(schema: type[BaseModel]) -> dict[str, Any]:
    return schema.model_json_schema()


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:60]}…"


def inlined(schema: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema without references, as a route's description holds it."""
    whole = dict(_json_schema(schema))
    parts = whole.pop("$defs", {})

    def resolved(node: Any) -> Any:
        if isinstance(node, list):
            return [resolved(each) for each in node]
        if not isinstance(node, dict):
            return node
        if reference := node.get("$ref"):
            return resolved(parts[reference.rsplit("/", 1)[1]])
        return {key: resolved(value) for key, value in node.items()}

    found: dict[str, Any] = resolved(whole)
    return found
