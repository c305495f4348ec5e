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
from .translate import Asked

_IMPOSSIBLE = -9999.0  # as vLLM writes it: JSON has no infinity


@dataclass(frozen=True, slots=True)
class Told:
    """A token's log-probabilities, and how many characters of the text stand before it; no text that has them is one
    that echoes its prompt."""

    token: int
    logprobs: TokenLogprobs
    offset: int


@dataclass(slots=True)
class Delta:
    """What an output brings a choice.

    text: final. finish_reason: "stop" or "length" with the last. told: of each of `token_ids`, where asked for.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None


class Choice:
    """One choice of an answer, from its outputs.

    echo: what its text begins with. writes_events: None where nobody asked for events.
    """

    def __init__(
        self, asked: Asked, texts: TokenTexts, echo: str = "", writes_events: EventTexts | None = None
    ) -> None:
        self.tokens = self.cached = 0
        self._ends = asked.ends
        self._text, self._echo = TextStream(texts, asked.stops, asked.free), echo
        self._events, self._steps, self._threads, self._began = writes_events, 0, 0, time.perf_counter()

    def take(self, output: RequestOutput) -> Delta:
        """What an output brings; `Service.run` raises for those that have failed or were aborted."""
        reason = output.finish_reason
        self.tokens += len(output.token_ids)
        self.cached = output.cached_tokens
        delta = Delta(self._echo, list(output.token_ids), finish_reason=reason)
        self._echo = ""
        # An end token is written, counted and told, but it is no text, even where the tokenizer has it as a word.
        silent = reason == "stop" and output.token_ids[-1:] and output.token_ids[-1] in self._ends
        for place, token in enumerate(output.token_ids):
            if output.logprobs:
                delta.told.append(Told(token, output.logprobs[place], self._text.length))
            if not silent or place < len(output.token_ids) - 1:
                delta.text += self._text.push(token)
        if reason is not None:
            delta.text += self._text.end()
            if self._text.stopped:
                delta.finish_reason = "stop"
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


def joined(deltas: Iterable[Delta]) -> Delta:
    """All deltas of a choice as one."""
    whole, texts = Delta(), []
    for delta in deltas:
        texts.append(delta.text)
        whole.token_ids += delta.token_ids
        whole.told += delta.told
        whole.events += delta.events
        whole.finish_reason = delta.finish_reason
    whole.text = "".join(texts)
    return whole


def usage(asked: Asked, choices: Sequence[Choice]) -> dict[str, Any]:
    """A prompt counts once, however many choices it has."""
    prompt, written = sum(map(len, asked.prompts)), sum(choice.tokens for choice in choices)
    cached = sum(choice.cached for choice in choices[:: asked.n])
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
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(told: Sequence[Told], texts: TokenTexts) -> dict[str, Any]:
    """The older form. Of two tokens with the same text the likelier one is among the top."""
    names = [_name(texts.bytes_of(one.token), "bytes:") for one in told]
    values = [_finite(one.logprobs.logprob) for one in told]
    tops = []
    for one, name, value in zip(told, names, values, strict=True):
        top: dict[str, float] = {}
        for token, logprob in one.logprobs.top:
            top.setdefault(_name(texts.bytes_of(token), "bytes:"), _finite(logprob))
        tops.append(top | {name: value})
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
