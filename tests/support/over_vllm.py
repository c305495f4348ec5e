"""Requests of engines over the stand-in for vLLM, and what the native engine answers to the same."""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any

from hypothesis import strategies as st

from medusa_apar.engine.engine import Engine
from medusa_apar.engine.outputs import RequestOutput
from medusa_apar.engine.vllm.options import VllmOptions
from medusa_apar.engine.vllm.vllm_engine import VllmEngine
from medusa_apar.runtimes.pick import pick_runtime
from medusa_apar.threads.fork_policy import ControlTokenForks
from medusa_apar.threads.fork_rule import ForkRule
from medusa_apar.threads.request import Request, RequestOptions
from tests.support.models import CONTROL, EOS, forking_model
from tests.support.stand_in_vllm import Model, SpokenPlainly, StandIn

PROMPTS = [[7, 8, 9 + n, 10] for n in range(6)]
CONTEXT = 256
SCHEDULES = {  # of the stand-in
    "seed": st.integers(0, 2**32),
    "longest_delta": st.integers(1, 5),
    "refuses": st.sampled_from([0.0, 0.1, 0.5]),
}


@cache
def parts() -> tuple[Any, Any, Model]:
    model = forking_model(13, "wide_llama")  # some of its answers have dozens of threads
    return model, pick_runtime(model, "torch", None, "auto"), Model(model)


def request(name: str, prompt: list[int], limit: int = 24, **changes: Any) -> Request:
    how: dict[str, Any] = {"eos_ids": frozenset({EOS}), "policy": ControlTokenForks(), "rule": ForkRule.of(CONTROL)}
    return Request(name, prompt, RequestOptions(max_new_tokens=limit, **how | changes))


def native(its: Request) -> tuple[list[int], str | None, list[Any]]:
    """The native engine's text, finish reason and log-probabilities."""
    model, runtime, _ = parts()
    with Engine(model, runtime) as engine:
        engine.add(its)
        outputs = []
        while engine.unfinished:
            outputs += engine.step()
    return its.text_ids, its.finish_reason, [each for output in outputs for each in output.logprobs]


@cache
def written(number: int, limit: int = 24) -> tuple[list[int], str | None, list[Any]]:
    return native(request("alone", PROMPTS[number], limit))


def engine_of(client: StandIn, **options: Any) -> VllmEngine:
    return VllmEngine(client, CONTEXT, VllmOptions(**options), dialect=SpokenPlainly())


async def answer(engine: VllmEngine, its: Request) -> tuple[list[int], RequestOutput]:
    outputs = [output async for output in engine.generate(its)]
    assert all(output.finish_reason is None for output in outputs[:-1])
    return [token for output in outputs for token in output.token_ids], outputs[-1]


async def left_nothing(engine: VllmEngine, client: StandIn) -> None:
    """No task, no stream, no answer."""
    for _ in range(50):
        await asyncio.sleep(0)
    assert client.open == 0 and engine.stats().running == engine.stats().waiting == engine._shared.rows.total() == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}
