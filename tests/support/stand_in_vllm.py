"""A stand-in for vLLM's client: a tiny model's true greedy tokens, under a random schedule.

The real one takes half a minute to start; `tests/vllm` asks it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from medusa_apar import requests
from medusa_apar.engine.vllm import compat
from medusa_apar.engine.vllm.options import VllmOptions
from medusa_apar.engine.vllm.part import Part
from medusa_apar.engine.vllm.vllm_engine import VllmEngine
from medusa_apar.facts import ModelFacts
from medusa_apar.generate import MedusaApar
from medusa_apar.models.families import unembedding_size
from medusa_apar.serve.backends import NoEngine
from medusa_apar.serve.options import ServeOptions
from medusa_apar.verify.guides import Guide, compiled
from tests.support.models import EOS


class QueueOverflowError(Exception):
    """vLLM's, by its name."""


class EngineDeadError(Exception):
    """vLLM's, by its name."""


class MaxQueuedTokensError(Exception):
    """vLLM's, by its name."""


class SpokenPlainly:
    """A dialect whose prompts are paths, and whose parameters are the parts themselves."""

    is_full, is_dead = staticmethod(compat.is_full), staticmethod(compat.is_dead)

    def check(self, client: Any, part: Part) -> None:
        """Nothing is refused."""

    def prompt_of(self, part: Part) -> list[int]:
        return list(part.prompt_ids)

    def params_of(self, part: Part) -> Part:
        return part


class Model:
    """The logits of a tiny model behind paths, each of which is asked once.

    tokenizer: for answers that have to be JSON.
    """

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        self._model, self.tokenizer = model, tokenizer
        self._known = dict[tuple[int, ...], torch.Tensor]()
        self.vocabulary = unembedding_size(model)[0]

    @torch.no_grad()
    def logits(self, path: Sequence[int]) -> torch.Tensor:
        key = tuple(path)
        if key not in self._known:
            self._known[key] = self._model(input_ids=torch.tensor([key])).logits[0, -1].float()
        return self._known[key]

    def log_probs(self, path: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """And which ids are the likeliest."""
        log_probs = self.logits(path).log_softmax(-1)
        return log_probs, log_probs.argsort(descending=True, stable=True).tolist()


@dataclass
class StandIn:
    """Args:
    refuses: how likely a request finds the queue full. dies_after: tokens after which everything fails.
    fails: makes the error of a request whose path it is given; None for none. naps: whether it sleeps now and then.
    """

    model: Model
    seed: int = 0
    longest_delta: int = 3
    refuses: float = 0.0
    dies_after: int | None = None
    fails: Any = None
    naps: bool = True
    end_ids: frozenset[int] = frozenset({EOS})
    open: int = 0
    most_open: int = 0
    asked: int = 0
    written: int = 0
    errored: bool = False
    ids: set[str] = field(default_factory=set)
    ranks: dict[str, set[int | None]] = field(default_factory=dict)
    priorities: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._cached: dict[str, list[list[int]]] = {}  # paths by salt

    async def generate(
        self,
        prompt: list[int],
        sampling_params: Part,
        request_id: str,
        *,
        priority: int = 0,
        data_parallel_rank: int | None = None,
    ) -> AsyncGenerator[Any, None]:
        assert request_id not in self.ids, "vLLM would take two requests for one"
        self.ids.add(request_id)
        self.ranks.setdefault(request_id.split(".")[0], set()).add(data_parallel_rank)
        self.priorities[request_id] = priority
        self.asked += 1
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            await self._pause()
            if self._random.random() < self.refuses:
                raise self._random.choice((QueueOverflowError, MaxQueuedTokensError))
            async for output in self._written(prompt, sampling_params):
                yield output
        finally:
            self.open -= 1

    async def _written(self, prompt: list[int], params: Part) -> AsyncGenerator[Any, None]:
        assert params.max_tokens >= 1
        own: list[int] = []
        reason, scorers = None, self._scorers(prompt, params)
        cached = max((_common(prompt[:-1], path) for path in self._cached.get(params.cache_salt, ())), default=0)
        self._cached.setdefault(params.cache_salt, []).append(prompt)
        while reason is None:
            delta: list[int] = []
            for _ in range(self._random.randint(1, self.longest_delta)):
                delta.append(self._next(prompt, own, params, scorers))
                own.append(delta[-1])
                if delta[-1] in params.stop_ids and len(own) > params.min_tokens:
                    reason = "stop"
                elif len(own) >= params.max_tokens:
                    reason = "length"
                if reason is not None:
                    break
            self.written += len(delta)
            if self.dies_after is not None and self.written >= self.dies_after:
                self.errored = True
            if self.errored:
                raise EngineDeadError
            if self.fails is not None and (error := self.fails(prompt + own)) is not None:
                raise error
            yield self._output(prompt, own, delta, params, reason, cached)
            await self._pause()

    def _next(self, prompt: list[int], own: list[int], params: Part, scorers: list[Any]) -> int:
        banned = {
            ban[-1] for ban in params.banned if tuple(own[len(own) - len(ban) + 1 :]) == ban[:-1] or len(ban) == 1
        }
        if len(own) < params.min_tokens:  # as vLLM, which counts its model's end tokens whatever `ignore_eos` says
            banned |= params.stop_ids | self.end_ids
        ids, scores = torch.tensor([prompt + own]), self.model.logits(prompt + own)[None].clone()
        scores[0, sorted(banned)] = -torch.inf
        for scorer in scorers:
            scores = scorer(ids, scores)
        scores[0, sorted(banned)] = -torch.inf  # a bias or a penalty may not bring them back
        if (seed := params.sampling.seed) is not None:
            noise = torch.rand(scores.shape, generator=torch.Generator().manual_seed((seed + len(own)) % 2**63))
            scores = scores.log_softmax(-1) - (-noise.log()).log()
        return int(scores.argmax())

    def _scorers(self, prompt: list[int], params: Part) -> list[Any]:
        its = params.sampling
        guide = None if its.schema is None else Guide(its.schema)
        grammar = guide and compiled(guide, self.model.tokenizer, self.model.vocabulary, params.stop_ids)
        named = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty")
        known = {name: getattr(its, name) for name in (*named, "frequency_penalty", "logit_bias")}
        return requests.Sampling(**known, guide=guide).processors(len(prompt), None, params.stop_ids, grammar)

    def _output(
        self, prompt: list[int], own: list[int], delta: list[int], params: Part, reason: Any, cached: int
    ) -> Any:
        logprobs = None
        if (count := params.sampling.logprobs) is not None:
            start = len(own) - len(delta)
            logprobs = [self._told([*prompt, *own[: start + n]], token, count) for n, token in enumerate(delta)]
        prompts = None
        if params.prompt_logprobs is not None and len(own) == len(delta):
            prompts = [None]
            prompts += [self._told(prompt[:n], prompt[n], params.prompt_logprobs) for n in range(1, len(prompt))]
        its = SimpleNamespace(token_ids=delta, finish_reason=reason, logprobs=logprobs)
        return SimpleNamespace(
            outputs=[its], num_cached_tokens=cached, finished=reason is not None, prompt_logprobs=prompts
        )

    def _told(self, path: list[int], token: int, count: int) -> dict[int, Any]:
        log_probs, likeliest = self.model.log_probs(path)
        wanted = {*likeliest[:count], token}
        return {
            each: SimpleNamespace(logprob=log_probs[each].item(), rank=likeliest.index(each) + 1) for each in wanted
        }

    async def _pause(self) -> None:
        for _ in range(self._random.randint(1, 4)):
            await asyncio.sleep(0)
        if self.naps and self._random.random() < 0.2:
            await asyncio.sleep(self._random.random())


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


class StandInBackend:
    """What `serve.backends.VllmBackend` is, over the stand-in."""

    name = "vllm"
    pool_slots = None

    def __init__(self, load: Callable[[], MedusaApar], options: ServeOptions) -> None:
        self._load, self._options = load, options
        self.engine: Any = NoEngine()

    async def start(self) -> ModelFacts:
        self.apar = await asyncio.to_thread(self._load)
        context = self.apar.facts.context
        assert context is not None
        options = VllmOptions(self._options.max_requests, self._options.max_queue)
        self.client = StandIn(Model(self.apar.model, self.apar.tokenizer), naps=False)
        self.engine = VllmEngine(self.client, context, options, dialect=SpokenPlainly())
        return self.apar.facts
