"""From the engine's outputs to what a client reads: text, log-probabilities, usage, choices.

A streamed answer and one in one piece are made of the same `Delta`s, so that they cannot differ.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from medusa_apar.engine.outputs import RequestOutput
from medusa_apar.events import StepFinished, ThreadStarted
from medusa_apar.events.texts import TextStream, TokenTexts
from medusa_apar.threads.request import TokenLogprobs

from .event_texts import EventTexts
from .tool_calls import ToolCall, ToolCalls
from .translate import Asked

_IMPOSSIBLE = -9999.0  # as vLLM writes it: JSON has no infinity


@dataclass(frozen=True, slots=True)
class Told:
    """A token's log-probabilities, and how many characters of the text stand before it, an echoed prompt's included.
    Nothing is known of that prompt's first token."""

    token: int
    logprobs: TokenLogprobs | None
    offset: int


@dataclass(slots=True)
class Delta:
    """What an output brings a choice.

    text: final. finish_reason: "stop", "length" or "tool_calls" with the last. told: of each of `token_ids`, and of an
    echoed prompt's, where asked for. calls: of tools, which are no part of the text.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    calls: list[ToolCall] = field(default_factory=list)


class Choice:
    """One choice of an answer, from its outputs.

    writes_events: None where nobody asked for events.

    echo: what it begins with; given before the first output.
    """

    def __init__(self, asked: Asked, texts: TokenTexts, writes_events: EventTexts | None = None) -> None:
        self.tokens = self.cached = 0
        self.echo: Delta | None = None
        self._ends = asked.ends
        self._text, self._before = TextStream(texts, asked.stops, asked.free), 0
        self._calls = None if asked.calls is None else ToolCalls(asked.calls == "guided", asked.calls == "once")
        self._events, self._steps, self._threads, self._began = writes_events, 0, 0, time.perf_counter()

    def take(self, output: RequestOutput) -> Delta:
        """What an output brings; `Service.run` raises for those that have failed or were aborted."""
        reason = output.finish_reason
        self.tokens += len(output.token_ids)
        self.cached = output.cached_tokens
        delta = Delta(token_ids=list(output.token_ids), finish_reason=reason)
        if self.echo is not None:
            delta.text, delta.told, self._before = self.echo.text, list(self.echo.told), len(self.echo.text)
            self.echo = None
        # An end token is written, counted and told, but it is no text, even where the tokenizer has it as a word.
        silent = reason == "stop" and output.token_ids[-1:] and output.token_ids[-1] in self._ends
        for place, token in enumerate(output.token_ids):
            if output.logprobs:
                delta.told.append(Told(token, output.logprobs[place], self._before + self._text.length))
            if not silent or place < len(output.token_ids) - 1:
                delta.text += self._text.push(token)
        if reason is not None:
            delta.text += self._text.end()
            if self._text.stopped:
                delta.finish_reason = "stop"
        if self._calls is not None:
            _part(delta, self._calls)
        self._take_events(output, delta)
        return delta

    def stats(self) -> dict[str, Any]:
        """What stands beside events. seconds: since the server has read the question."""
        seconds = time.perf_counter() - self._began
        return {"steps": self._steps, "tokens": self.tokens, "threads": self._threads, "seconds": round(seconds, 6)}

    def _take_events(self, output: RequestOutput, delta: Delta) -> None:
        if self._events is None:
            return
        for event in output.events:
            self._steps += isinstance(event, StepFinished)
            self._threads += isinstance(event, ThreadStarted)
            delta.events.append(self._events(event))


def _part(delta: Delta, calls: ToolCalls) -> None:
    """Takes calls of tools out of a delta's text. What may become one waits for the next."""
    delta.text, delta.calls = calls.push(delta.text)
    if delta.finish_reason is None:
        return
    text, last = calls.end()
    delta.text += text
    delta.calls += last
    if calls.count and delta.finish_reason == "stop":
        delta.finish_reason = "tool_calls"


def echoed(text: str, ids: Sequence[int], logprobs: Sequence[TokenLogprobs], texts: TokenTexts) -> Delta:
    """A prompt as a choice begins with it.

    logprobs: of each of its tokens but the first, which nothing stands before.
    """
    stream, told = TextStream(texts), list[Told]()
    for token, its in zip(ids, [None, *logprobs], strict=True):
        told.append(Told(token, its, min(stream.length, len(text))))
        stream.push(token)
    return Delta(text, told=told)


def joined(deltas: Iterable[Delta]) -> Delta:
    """All deltas of a choice as one."""
    whole, texts = Delta(), []
    for delta in deltas:
        texts.append(delta.text)
        whole.token_ids += delta.token_ids
        whole.told += delta.told
        whole.events += delta.events
        whole.calls += delta.calls
        whole.finish_reason = delta.finish_reason
    whole.text = "".join(texts)
    return whole


def usage(asked: Asked, choices: Sequence[Choice]) -> dict[str, Any]:
    """A prompt counts once, however many choices it has. Of one that was scored nothing was at hand: what its choices
    found in the cache the scoring had left there."""
    prompt, written = sum(map(len, asked.prompts)), sum(choice.tokens for choice in choices)
    cached = 0 if asked.scorings else sum(choice.cached for choice in choices[:: asked.n])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def chat_logprobs(told: Sequence[Told], texts: TokenTexts) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        own = texts.bytes_of(token)
        return {"token": _name(own, ""), "logprob": _finite(logprob), "bytes": list(own)}

    content = [
        entry(one.token, one.logprobs.logprob) | {"top_logprobs": [entry(*pair) for pair in one.logprobs.top]}
        for one in told
        if one.logprobs is not None
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(told: Sequence[Told], texts: TokenTexts) -> dict[str, Any]:
    """The older form. Of two tokens with the same text the likelier one is among the top."""
    names = [_name(texts.bytes_of(one.token), "bytes:") for one in told]
    values, tops = list[float | None](), list[dict[str, float] | None]()
    for one, name in zip(told, names, strict=True):
        if one.logprobs is None:
            values.append(None)
            tops.append(None)
            continue
        top: dict[str, float] = {}
        for token, logprob in one.logprobs.top:
            top.setdefault(_name(texts.bytes_of(token), "bytes:"), _finite(logprob))
        values.append(_finite(one.logprobs.logprob))
        tops.append(top | {name: _finite(one.logprobs.logprob)})
    offsets = [one.offset for one in told]
    return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _finite(logprob: float) -> float:
    """Also of what is no number."""
    return logprob if logprob > _IMPOSSIBLE else _IMPOSSIBLE


def _name(own: bytes, prefix: str) -> str:
    """A token as text; a part of a character as OpenAI's API writes it."""
    try:
        return own.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in own)
