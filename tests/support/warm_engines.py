"""Engines that keep what they have fed, cold ones beside them, and requests for both."""

from __future__ import annotations

from functools import cache
from typing import Any

from medusa_apar.drafting.step_cost import StepCost
from medusa_apar.engine.engine import Engine
from medusa_apar.engine.options import EngineOptions
from medusa_apar.runtimes.pick import pick_runtime
from medusa_apar.threads.fork_policy import ControlTokenForks, NoForks
from medusa_apar.threads.fork_rule import ForkRule
from medusa_apar.threads.request import Request, RequestOptions
from medusa_apar.triton_kernels import reference
from tests.support.models import CONTROL, EOS, VOCAB, forking_model

COST = StepCost(((1, 10.0), (8, 14.0), (64, 70.0)), ((1, 0.5), (8, 1.0)))
BACKENDS = ("cpu", "int8", "torch", "one launch")  # the last: paths in tables, verified by the kernel's twin
LIMIT = 24


@cache
def backend(name: str) -> tuple[Any, Any]:
    model = forking_model(13, "wide_llama")  # some of its answers have dozens of threads
    compiled = name in ("cpu", "int8")
    runtime = pick_runtime(model, "cpu" if compiled else "torch", "int8" if name == "int8" else None, "auto")
    if name == "one launch":
        runtime.verify = reference.verify
    return model, runtime


def prompt(n: int, length: int = 40) -> list[int]:
    return [5 + (7 * n + 3 * k + k * k * n) % (VOCAB - 6) for k in range(length)]


def request(name: str, ids: list[int], fork: bool = True, limit: int = LIMIT, **changes: Any) -> Request:
    how: dict[str, Any] = {"eos_ids": frozenset({EOS}), "policy": ControlTokenForks() if fork else NoForks()}
    how["rule"] = ForkRule.of(CONTROL, fork=fork)
    return Request(name, ids, RequestOptions(max_new_tokens=limit, **how | changes))


def shared(name: str = "cpu", heads: Any = None, **options: Any) -> Engine:
    return Engine(*backend(name), heads, EngineOptions(prefix_cache=True, **options))


def run(engine: Engine, *its: Request) -> Any:
    for one in its:
        engine.add(one)
    while engine.unfinished:
        engine.step()
        checked(engine)
    return its[0] if len(its) == 1 else its


def checked(engine: Engine) -> None:
    engine.ledger.check()
    stats, pool = engine.stats, engine.ledger.pool
    assert (stats.live_slots, stats.cached_slots) == (pool.live, pool.cached)
    assert stats.live_slots + stats.cached_slots + stats.free_slots == (pool.max_slots or pool.capacity)
    if not engine.unfinished:
        assert pool.live == 0 and not engine.ledger._salts


def cold(name: str, ids: list[int], **changes: Any) -> Request:
    with Engine(*backend(name)) as engine:
        return run(engine, request("cold", ids, **changes))
