"""What is known of one HTTP request while it is answered: its id, whose it is, and what it has cost."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from starlette.requests import HTTPConnection
from starlette.types import Scope

_NAME = "exchange"  # in the ASGI scope's state


@dataclass(slots=True)
class Exchange:
    """id: the client's `X-Request-Id`, else one of ours. It names nothing in the engine, where equal ids would meet.
    tenant: tells clients with different API keys apart and says nothing of the key; "" where there are no keys.
    began: when its head had been read, by `time.perf_counter`. answers: the engine's requests that it asks for and that
    have not ended. prompt_tokens, answer_tokens: of all its answers; a prompt that several answers share counts once.
    """

    id: str = ""
    tenant: str = ""
    began: float = field(default_factory=time.perf_counter)
    answers: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    _prompts: set[int] = field(default_factory=set)  # hashes of those that are counted

    def count_prompt(self, ids: list[int]) -> int:
        """How many of its tokens had not been counted."""
        key = hash(tuple(ids))
        new = 0 if key in self._prompts else len(ids)
        self._prompts.add(key)
        self.prompt_tokens += new
        return new


def begin(scope: Scope, id: str) -> Exchange:
    exchange = scope.setdefault("state", {})[_NAME] = Exchange(id)
    return exchange


def exchange_of_scope(scope: Scope) -> Exchange:
    """The request's own; a new one where no guard has made any."""
    exchange: Exchange = scope.setdefault("state", {}).setdefault(_NAME, Exchange())
    return exchange


def exchange_of(request: HTTPConnection | None) -> Exchange:
    return Exchange() if request is None else exchange_of_scope(request.scope)
