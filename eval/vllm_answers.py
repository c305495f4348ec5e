"""The same questions answered by our own engine and by ours over vLLM, greedily and in float32: they have to be equal.

Our own engine answers in a process of its own, since importing vLLM changes what torch does in the process around it.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa_apar.engine.async_engine import AsyncEngine
from medusa_apar.engine.vllm import compat
from medusa_apar.engine.vllm.options import VllmOptions
from medusa_apar.engine.vllm.vllm_engine import VllmEngine
from medusa_apar.threads.request import Request, RequestOptions

# Blocks of 32 are the smallest that vLLM's CPU build takes. Compiling would take most of the time.
ARGS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,
    "max_model_len": 512,
    "scheduling_policy": "priority",
    "skip_tokenizer_init": True,
}


@dataclass(frozen=True, slots=True)
class Answer:
    """Our own engine's. options: of its request, with which another engine may be asked the same. forks: threads
    beside the trunk."""

    question: str
    prompt_ids: list[int]
    options: RequestOptions
    text_ids: list[int]
    text: str
    forks: int

    def request(self, name: str) -> Request:
        """One that asks the same."""
        return Request(name, list(self.prompt_ids), self.options)


def native(model: str | Path, questions: Sequence[tuple[str, str]], limit: int) -> list[Answer]:
    """What our own engine answers.

    model: as `medusa_apar.load` takes it, with a tokenizer. questions: each with where its answer forks. limit: most
    tokens of an answer.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_native, str(model), list(questions), limit).result()


def _native(model: str, questions: list[tuple[str, str]], limit: int) -> list[Answer]:
    from medusa_apar.job import quiet
    from medusa_apar.loading import load
    from medusa_apar.models.chat import encode

    quiet()
    apar = load(model, dtype="float32", device="cpu")
    tokenizer: Any = apar.tokenizer
    requests = []
    for number, (question, fork) in enumerate(questions):
        ids = encode(tokenizer, question)["input_ids"][0].tolist()
        requests.append(apar.request(str(number), ids, max_new_tokens=limit, fork=fork))
    with apar.engine() as engine:
        for request in requests:
            engine.add(request)
        while engine.unfinished:
            for output in engine.step():
                if output.error is not None:
                    raise output.error
    return [
        Answer(
            question,
            request.prompt_ids,
            request.options,
            list(request.text_ids),
            tokenizer.decode(request.text_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            len(request.tree.threads) - 1,
        )
        for (question, _), request in zip(questions, requests, strict=True)
    ]


async def opened(model: str | Path, **args: Any) -> VllmEngine:
    """Ours over a vLLM of its own, which closing it ends. args: of vLLM's `AsyncEngineArgs`, beside `ARGS`."""
    compat.check_version()
    from vllm import AsyncEngineArgs

    asked = ARGS | args
    client, counts = compat.started(AsyncEngineArgs(model=str(model), **asked))
    ranks = asked.get("data_parallel_size", 1)
    options = VllmOptions(data_parallel_size=ranks, speculates="speculative_config" in asked)
    return VllmEngine(client, asked["max_model_len"], options, counts)


async def asked_again(engine: AsyncEngine, answers: Sequence[Answer]) -> list[list[int]]:
    """The texts that an engine gives where it is asked the same, all at once."""
    return list(await asyncio.gather(*(text(engine, str(number), its) for number, its in enumerate(answers))))


async def text(engine: AsyncEngine, name: str, answer: Answer) -> list[int]:
    """The one text. Raises what its request has failed by."""
    ids: list[int] = []
    async for output in engine.generate(answer.request(name)):
        if output.error is not None:
            raise output.error
        ids += output.token_ids
    return ids
