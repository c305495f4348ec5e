"""Every field that a body can have: OpenAI's, vLLM's further ones for sampling, and our own under `apar`.

A field is honoured or refused, never ignored. Those that are taken and change nothing, on purpose: `user`, `metadata`,
`safety_identifier`, `prompt_cache_key`, `prompt_cache_retention`, `service_tier` and `store`, as they say nothing of
the answer; `name`, `description` and `strict` of a JSON schema, which is always held to, and `strict` of a tool, whose
parameters are held to where the answer has to call one, and else never. A message's `name` and `tool_call_id`
are the chat template's, and most templates read neither. null is as good as leaving a field out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from .bodies import Body, Checked, Text, one_of, unsupported, whole_text
from .tool_schemas import TOOL_CHOICE, CalledTool, NamedTool, Tool

MOST_LOGPROBS = 20  # as OpenAI's chats have it
MOST_CHOICES = 128
_MOST_STOPS = 64
_LONGEST_STOP = 1000  # characters
_MOST_ENTRIES = 1000  # of what names tokens, or whatever a client likes
_INT64 = 2**63

Count = Annotated[int, Field(ge=0, lt=_INT64)]
AtLeastOne = Annotated[int, Field(ge=1, lt=_INT64)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Share = Annotated[float, Field(ge=0, le=1)]
TokenId = Annotated[int, Field(ge=-_INT64, lt=_INT64)]  # the model says which of them it has
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]


def _few(value: Any) -> Any:
    """Before the entries are looked at."""
    if isinstance(value, dict) and len(value) > _MOST_ENTRIES:
        raise ValueError(f"has {len(value)} entries, at most {_MOST_ENTRIES} are taken")
    return value


FEW = (Field(max_length=_MOST_ENTRIES), BeforeValidator(_few))


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > _MOST_STOPS:
        raise ValueError(f"has {len(stops)} strings, at most {_MOST_STOPS} are looked for")
    if not all(stops):
        raise ValueError("holds an empty string, at which every answer would stop")
    if (longest := max(map(len, stops), default=0)) > _LONGEST_STOP:
        raise ValueError(f"holds a string of {longest} characters, at most {_LONGEST_STOP} are looked for")
    return list(map(whole_text, stops))


def _prompts(value: Any) -> list[str | list[int]]:
    """A list of prompts, be it one."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(map(_is_id, value))):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a text, a list of token ids, or a list of such, and not empty")
    for prompt in value:
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(map(_is_id, prompt))):
            raise ValueError("must be a text, a list of token ids, or a list of such")
        if isinstance(prompt, str):
            whole_text(prompt)
    return value


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _content(value: Any) -> str:
    """Parts are joined by line breaks, as vLLM does for templates that take text."""
    if isinstance(value, str):
        return whole_text(value)
    if not isinstance(value, list) or not value:
        raise ValueError("must be a text, or a list of text parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f"has a part of type {kind!r}: the model reads text alone")
        if not isinstance(part.get("text"), str) or set(part) != {"type", "text"}:
            raise ValueError("has a text part that is not {'type': 'text', 'text': '...'}")
        texts.append(whole_text(part["text"]))
    return "\n".join(texts)


def _nothing(value: Any) -> None:
    if value:
        raise ValueError("must be empty: a prompt has no such thing")


_ONE_STOP = {"type": "string", "minLength": 1, "maxLength": _LONGEST_STOP}
_STOP_SCHEMA = {"anyOf": [_ONE_STOP, {"type": "array", "items": _ONE_STOP, "maxItems": _MOST_STOPS}]}
_IDS_SCHEMA = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        _IDS_SCHEMA,
        {"type": "array", "items": {"anyOf": [{"type": "string"}, _IDS_SCHEMA]}, "minItems": 1},
    ]
}
_PARTS_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        "required": ["type", "text"],
        "additionalProperties": False,
    },
}
_CONTENT = Checked(_content, {"anyOf": [{"type": "string"}, _PARTS_SCHEMA]})
_EMPTY = Checked(_nothing, {"maxItems": 0, "type": "array"})


class StreamOptions(Body):
    """include_usage: a last chunk says how many tokens were read and written."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class JsonSchema(Body):
    name: Text
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What the answer's text must be. Such an answer does not fork."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("has a json_schema where its type is json_schema, and only there")
        return self


class Apar(Body):
    """Our own fields. None is what the server was started with.

    fork: where the answer splits. max_threads: of the answer in one step. max_depth: at which threads fork no more.
    acceptance: "typical" samples faster and is not exact. speculation: "off" guesses nothing ahead. events: the answer
    tells how its threads grew.
    """

    fork: Annotated[Any, one_of(True, False, "auto", "off", "lists")] = None
    max_threads: AtLeastOne | None = None
    max_depth: Annotated[int, Field(ge=0, le=64)] | None = None
    acceptance: Literal["exact", "typical"] | None = None
    speculation: Literal["auto", "off"] | None = None
    events: bool | None = None


class Generation(Body):
    """What both kinds of answers take."""

    model: Text | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Share | None = None
    seed: TokenId | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Annotated[Any, Checked(_stops, _STOP_SCHEMA)] = None  # a list of texts, once it is read
    stop_token_ids: TokenIds | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], *FEW] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    response_format: ResponseFormat | None = None
    user: Text | None = None
    cache_salt: Annotated[Text, Field(min_length=1)] | None = None
    return_token_ids: bool | None = None
    apar: Apar | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("has stream_options, which need stream=true")
        if self.events and (self.n or 1) > 1:
            raise ValueError("has apar.events, which tell of one answer: n must be 1")
        return self

    @property
    def events(self) -> bool:
        return bool(self.apar and self.apar.events)

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    # What chats alone have.

    @property
    def may_call(self) -> bool:
        """Whether the answer may call tools."""
        return False

    @property
    def must_call(self) -> list[Tool]:
        """Tools one of which the answer has to call; none where it need not."""
        return []

    @property
    def calls_once(self) -> bool:
        """Whether the answer ends with its first call."""
        return False


class Message(Body):
    """role: "developer" is OpenAI's newer word for "system"; of which roles there may be, the chat template decides."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Any, _CONTENT] = None  # a text, once it is read
    name: Text | None = None
    tool_calls: Annotated[list[CalledTool], Field(fail_fast=True)] | None = None
    tool_call_id: Text | None = None
    # What answers of OpenAI's API bring back with them.
    refusal: None = unsupported("a prompt has no refusals")
    audio: None = unsupported("the model reads text alone")
    function_call: None = unsupported("it is deprecated, use tool_calls")
    annotations: Annotated[Any, _EMPTY] = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("has no content")
        return self


class ChatBody(Generation):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: AtLeastOne | None = None
    max_completion_tokens: AtLeastOne | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(min_length=1, fail_fast=True)] | None = None
    tool_choice: Annotated[Any, TOOL_CHOICE] = None  # a word or a `NamedTool`, once it is read
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    # Taken, and without effect on the answer.
    metadata: Annotated[dict[str, str], *FEW] | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_retention: Text | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    # Of OpenAI's API, and refused.
    functions: None = unsupported("it is deprecated, use tools")
    function_call: None = unsupported("it is deprecated, use tool_choice")
    audio: None = unsupported("the model writes text alone")
    prediction: None = unsupported("drafts come from the server's own heads")
    web_search_options: None = unsupported("the server searches nothing")
    reasoning_effort: None = unsupported("the model does not reason apart from its answer")
    verbosity: None = unsupported("say it in the prompt")
    moderation: None = unsupported("the server judges nothing")
    prompt_cache_options: None = unsupported("prompts are cached by themselves")

    @model_validator(mode="after")
    def _chats(self) -> ChatBody:
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("has max_tokens and max_completion_tokens, which differ: give one")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("has top_logprobs, which need logprobs=true")
        for name in ("tool_choice", "parallel_tool_calls"):
            if getattr(self, name) is not None and not self.tools:
                raise ValueError(f"has {name}, but no tools")
        if isinstance(self.tool_choice, NamedTool) and not self.must_call:
            raise ValueError(f"has a tool_choice of {self.tool_choice.name[:100]!r}, which is none of the tools")
        if self.must_call and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("has a tool_choice and a response_format, each of which says what the answer has to be")
        return self

    @property
    def may_call(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def must_call(self) -> list[Tool]:
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools or () if tool.function.name == self.tool_choice.name][:1]
        return list(self.tools or ()) if self.tool_choice == "required" else []

    @property
    def calls_once(self) -> bool:
        return self.may_call and self.parallel_tool_calls is False and not self.must_call


class CompletionBody(Generation):
    prompt: Annotated[Any, Checked(_prompts, _PROMPT_SCHEMA, required=True)]  # a list of prompts, once it is read
    max_tokens: Count | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: AtLeastOne | None = None
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _completes(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("has a best_of that is not n: every answer is returned, none is chosen")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("has max_tokens=0, which needs echo=true")
        if self.events and (len(self.prompt) > 1 or self.max_tokens == 0):
            raise ValueError("has apar.events, which tell of one answer: give one prompt, and max_tokens above 0")
        return self


class TokenizeBody(Body):
    """A text, or a conversation."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("needs either prompt or messages")
        if self.messages is not None and self.add_special_tokens is not None:
            raise ValueError("has add_special_tokens, but the chat template adds them itself")
        return self


class DetokenizeBody(Body):
    model: Text | None = None
    tokens: TokenIds
