"""What is known of one HTTP request while it is answered: its id, whose it is, and what it has cost."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import HTTPConnection
from starlette.types import Scope

_NAME = "exchange"  # in the ASGI scope's state


@dataclass(slots=True)
class Exchange:
    """id: the client's `X-Request-Id`, else one of ours. It names nothing in the engine, where equal ids would meet.
    tenant: tells clients with different API keys apart and says nothing of the key; "" where there are no keys.
    prompt_tokens, answer_tokens: of all its answers.
    """

    id: str = ""
    tenant: str = ""
    prompt_tokens: int = 0
    answer_tokens: int = 0


def begin(scope: Scope, id: str) -> Exchange:
    exchange = scope.setdefault("state", {})[_NAME] = Exchange(id)
    return exchange


def exchange_of_scope(scope: Scope) -> Exchange:
    """The request's own; a new one where no guard has made any."""
    return scope.setdefault("state", {}).setdefault(_NAME, Exchange())


def exchange_of(request: HTTPConnection | None) -> Exchange:
    return Exchange() if request is None else exchange_of_scope(request.scope)
