"""The two shapes that an answer has over the wire, whole and in chunks."""

from __future__ import annotations

from typing import Any, Protocol

from medusa_apar.events.texts import TokenTexts

from .answers import Delta, chat_logprobs, completion_logprobs

Entry = dict[str, Any]


class Form(Protocol):
    """Makes entries of `choices`; `object` and `chunk_object` name what they are in."""

    prefix: str
    object: str
    chunk_object: str

    def opening(self) -> Entry | None:
        """What a stream begins each choice with."""

    def part(self, delta: Delta) -> Entry:
        """A part of a stream's choice, without what it ends by."""

    def end(self) -> Entry:
        """Where a stream's choice ends; the caller adds why."""

    def whole(self, delta: Delta) -> Entry:
        """A choice in one piece."""


class ChatForm:
    prefix, object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, texts: TokenTexts, logprobs: bool) -> None:
        self._texts, self._logprobs = texts, logprobs

    def opening(self) -> Entry | None:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def part(self, delta: Delta) -> Entry:
        said: Entry = {"content": delta.text} if delta.text or not delta.calls else {}
        if delta.calls:
            said["tool_calls"] = [{"index": call.index, **call.as_json()} for call in delta.calls]
        return {"delta": said, "logprobs": self._told(delta)}

    def end(self) -> Entry:
        return {"delta": {}, "logprobs": None}

    def whole(self, delta: Delta) -> Entry:
        message: Entry = {"role": "assistant", "content": delta.text, "refusal": None}
        if delta.calls:
            message |= {"content": delta.text or None, "tool_calls": [call.as_json() for call in delta.calls]}
        return {"message": message, "logprobs": self._told(delta)}

    def _told(self, delta: Delta) -> Entry | None:
        return chat_logprobs(delta.told, self._texts) if self._logprobs else None


class CompletionForm:
    prefix, object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def __init__(self, texts: TokenTexts, logprobs: bool) -> None:
        self._texts, self._logprobs = texts, logprobs

    def opening(self) -> Entry | None:
        return None

    def part(self, delta: Delta) -> Entry:
        return self.whole(delta)

    def end(self) -> Entry:
        return {"text": "", "logprobs": None}

    def whole(self, delta: Delta) -> Entry:
        logprobs = completion_logprobs(delta.told, self._texts) if self._logprobs else None
        return {"text": delta.text, "logprobs": logprobs}
