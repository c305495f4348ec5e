"""Requests of tiny engines, and how they are run to their end."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import LlamaConfig

from medusa_apar.engine.engine import Engine
from medusa_apar.runtimes.pick import pick_runtime
from medusa_apar.threads.fork_policy import ControlTokenForks, NoForks
from medusa_apar.threads.fork_rule import ForkRule
from medusa_apar.threads.request import Request, RequestOptions
from tests.support.models import CONTROL, EOS, VOCAB, WIDE, forking_model, random_model

LIMIT = 32


@cache
def parts(seed: int = 5) -> tuple[Any, Any]:
    """Model and runtime; of seed 13 the first prompt's answer has dozens of threads."""
    model = forking_model(seed, "wide_llama")
    return model, pick_runtime(model, "auto", None, "auto")


@cache
def long_parts() -> tuple[Any, Any]:
    """A model with room for long prompts, whose answers do not end by themselves."""
    config = LlamaConfig(**WIDE | {"max_position_embeddings": 8192, "num_hidden_layers": 1}, eos_token_id=EOS)
    model = random_model(config, 3, scale=3.0)
    return model, pick_runtime(model, "auto", None, "auto")


def prompt(n: int, length: int = 6) -> list[int]:
    return [5 + (7 * n + 3 * k) % (VOCAB - 6) for k in range(length)]


def request(name: str, ids: list[int], limit: int = LIMIT, fork: bool = True, **changes: Any) -> Request:
    policy = ControlTokenForks() if fork else NoForks()
    how: dict[str, Any] = {"eos_ids": frozenset({EOS}), "policy": policy, "rule": ForkRule.of(CONTROL, fork=fork)}
    return Request(name, ids, RequestOptions(max_new_tokens=limit, **how | changes))


def run(engine: Engine, *its: Request) -> tuple[Request, ...]:
    for one in its:
        engine.add(one)
    while engine.unfinished:
        engine.step()
    engine.ledger.check()
    assert engine.ledger.pool.in_use == 0
    return its


def alone(ids: list[int], its: tuple[Any, Any] | None = None, **changes: Any) -> list[int]:
    with Engine(*(parts() if its is None else its)) as engine:
        return run(engine, request("alone", ids, **changes))[0].text_ids
