"""One call of `generate`: what transformers hands a `custom_generate` becomes requests, and these its output."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import StopStringCriteria

from medusa_apar.engine import admission, draft_watch
from medusa_apar.engine.engine import Engine
from medusa_apar.engine.rescoring import Rescoring, first_limit, last_limit
from medusa_apar.engine.scheduler import MAX_PREFILL_ROWS
from medusa_apar.engine.stopping import CriteriaStop, StopConditions
from medusa_apar.events import Consumer
from medusa_apar.events.reporter import Reporter
from medusa_apar.events.streaming import EndedOnce, TextColumns
from medusa_apar.models.families import unembedding_size
from medusa_apar.threads.fork_policy import ForkIf, fork_mode, fork_policy
from medusa_apar.threads.fork_rule import ForkRule
from medusa_apar.threads.paragraph_tree import thread_key
from medusa_apar.threads.request import Request, RequestOptions, Row

from . import checks
from .output import MedusaAparOutput

if TYPE_CHECKING:
    from .generate import MedusaApar

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CallOptions:
    """What `MedusaApar.__call__` takes beside what transformers prepares; it says what each of them is."""

    fork: bool | str | None = None
    fork_if: ForkIf | None = None
    max_threads: int | None = None
    max_depth: int | None = None
    seed: int | None = None
    events: Consumer | None = None
    rescore: bool = False
    regenerate_below: float | None = None
    stop_strings: str | list[str] | None = None


@dataclass(slots=True)
class Prepared:
    """What transformers has prepared.

    arguments: what `generate` itself was called with, as far as it is known.
    """

    input_ids: torch.Tensor
    processors: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    config: GenerationConfig
    model_kwargs: Mapping[str, Any]
    arguments: Mapping[str, Any]
    tokenizer: Any
    streamer: EndedOnce | None
    shows_prompt: bool = False  # whether the streamer is still to be given the prompt

    @property
    def returns_dict(self) -> bool:
        return bool(self.config.return_dict_in_generate)


def answer(apar: MedusaApar, prepared: Prepared, asked: CallOptions) -> MedusaAparOutput | torch.Tensor:
    """Answers all rows of a call. ValueError or NotImplementedError, before any work, for what cannot be combined."""
    prompts = checks.unpadded(prepared.input_ids, prepared.model_kwargs.get("attention_mask"))
    options, ends = _request_options(apar, prepared, asked)
    limit = ends.max_new_tokens
    last = replace(options, max_new_tokens=last_limit(limit, asked.regenerate_below))
    admission.check_fits(apar.model, apar.options.pool_slots, prompts, last)
    reporter = None
    if prepared.returns_dict or asked.events is not None:
        reporter = Reporter(asked.events, prepared.returns_dict, limit)
    requests = _requests(prepared, prompts, replace(options, watcher=reporter), ends.criteria)
    columns = TextColumns(requests, int(prepared.config._pad_token_tensor or 0))
    # Nobody waits for one row alone: prompts are fed as fast as they can be.
    fast = replace(apar.options, max_prefill_rows=apar.options.max_prefill_rows or MAX_PREFILL_ROWS)
    with Engine(apar.model, apar.runtime, apar.heads, fast, checked=True) as engine:
        for request in requests:
            engine.add(request)
        if prepared.streamer is not None and prepared.shows_prompt:
            prepared.streamer.put(prepared.input_ids.cpu())
        _run(engine, columns, prepared.streamer)
        _remark(apar, engine, requests, limit, prepared.config)
        agreement = Rescoring(engine, requests, limit, asked.regenerate_below).run() if asked.rescore else None
    input_ids = prepared.input_ids
    sequences = torch.cat([input_ids, columns.text().to(input_ids.device)], dim=1)
    if not prepared.returns_dict:
        return sequences
    assert reporter is not None
    output = MedusaAparOutput(
        sequences=sequences,
        scores=columns.gather([request.scores for request in requests]) if options.scores else None,
        logits=columns.gather([request.logits for request in requests]) if options.logits else None,
        stats=engine.stats,
        paragraph_tree=[request.tree for request in requests],
        agreement=agreement,
        events=reporter.events,
    )
    output.tokenizer = prepared.tokenizer
    return output


def _request_options(apar: MedusaApar, prepared: Prepared, asked: CallOptions) -> tuple[RequestOptions, StopConditions]:
    """The options that all rows share, and what ends a row's text."""
    config, tokenizer = prepared.config, prepared.tokenizer
    checks.check_limits(max_threads=asked.max_threads, max_depth=asked.max_depth)
    max_depth = apar.max_depth if asked.max_depth is None else asked.max_depth
    mode = fork_mode(apar.fork if asked.fork is None else asked.fork)
    control = apar.control_token_ids
    if mode == "auto" and control is None:
        mode = "off"
    policy = fork_policy(mode, asked.fork_if, max_depth, tokenizer)
    ends = StopConditions.of(prepared.stopping_criteria, config, prepared.input_ids.shape[1], one_thread=mode == "off")
    if asked.stop_strings is not None:
        if tokenizer is None:
            raise ValueError("stop_strings need the tokenizer: pass tokenizer=... to generate or attach.")
        ends.criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=asked.stop_strings))
    checks.check_rescored(config, asked, mode, prepared.streamer, ends.criteria)
    seed = asked.seed
    if config.do_sample and seed is None:
        seed = int(torch.randint(2**62, (), dtype=torch.long, device="cpu"))
    options = RequestOptions(
        max_new_tokens=first_limit(ends.max_new_tokens, asked.regenerate_below),
        eos_ids=ends.eos_ids,
        policy=policy,
        rule=None if control is None else ForkRule.of(control, max_depth, mode == "auto"),
        fork_if=asked.fork_if if mode == "auto" else None,
        max_threads=asked.max_threads or apar.max_threads,
        seed=seed if config.do_sample else None,
        processors=prepared.processors,
        # Greedy decoding is temperature 0, where Medusa accepts the likeliest token and no other.
        typical=apar.typical if config.do_sample else None,
        scores=prepared.returns_dict and bool(config.output_scores),
        logits=prepared.returns_dict and bool(config.output_logits),
    )
    return options, ends


def _run(engine: Engine, columns: TextColumns, streamer: EndedOnce | None) -> None:
    """Steps until nothing is unfinished. Raises what a row fails by."""
    while engine.unfinished:
        outputs = engine.step()
        for output in outputs:
            if output.error is not None:
                raise output.error
        if streamer is not None:
            for column in columns.new():
                streamer.put(column)
    if streamer is not None:
        streamer.end()


def _requests(
    prepared: Prepared, prompts: list[list[int]], options: RequestOptions, criteria: list[Callable]
) -> list[Request]:
    """One a row, named by its number."""
    seen: Counter = Counter()
    requests = []
    for row, (row_ids, prompt) in enumerate(zip(prepared.input_ids.tolist(), prompts, strict=True)):
        # Equal prompts (num_return_sequences) get noise of their own, whatever else is in the batch.
        key = thread_key(prompt, seen[tuple(prompt)])
        seen[tuple(prompt)] += 1
        stop = CriteriaStop(criteria, prepared.input_ids.device) if criteria else None
        place = Row(row, len(prompts), row_ids)
        requests.append(Request(str(row), prompt, replace(options, stop=stop), key, place))
    return requests


def _remark(
    apar: MedusaApar, engine: Engine, requests: list[Request], max_new_tokens: int, config: GenerationConfig
) -> None:
    """Warnings about a call that has run."""
    if sentence := checks.cut_short(apar.model, requests, max_new_tokens):
        logger.warning(sentence)
    # A hot sample, and processors that the heads know nothing of, make good heads look bad.
    if not requests[0].sampler.before and not (config.do_sample and (config.temperature or 1.0) > 1):
        draft_watch.watch(apar.runtime, engine.stats, unembedding_size(apar.model)[0])


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a request of an engine chooses tokens, in vLLM's words and with its defaults but for the temperature.

    temperature: 0 decodes greedily, and the others are not used then. top_k: 0 keeps all tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, fits, said in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {said}.")

    def processors(self) -> list[LogitsProcessor]:
        """transformers' own, in the order in which its `generate` applies them."""
        penalty, hot = self.repetition_penalty != 1.0, self.temperature > 0
        chosen = (
            (penalty, lambda: RepetitionPenaltyLogitsProcessor(self.repetition_penalty)),
            (hot and self.temperature != 1.0, lambda: TemperatureLogitsWarper(self.temperature)),
            (hot and self.top_k > 0, lambda: TopKLogitsWarper(self.top_k)),
            (hot and self.top_p < 1.0, lambda: TopPLogitsWarper(self.top_p)),
            (hot and self.min_p > 0, lambda: MinPLogitsWarper(self.min_p)),
        )
        return [make() for wanted, make in chosen if wanted]


def engine_request(
    apar: MedusaApar, id: str, prompt_ids: list[int], sampling: Sampling, asked: CallOptions, **options: Any
) -> Request:
    """A request for an engine of `apar`. ValueError for what cannot be combined, before it is added anywhere."""
    checks.check_ids(apar.model, torch.tensor([prompt_ids], dtype=torch.long, device="cpu"), None)
    checks.check_limits(max_threads=asked.max_threads, max_depth=asked.max_depth)
    config, control = apar.model.generation_config or GenerationConfig(), apar.control_token_ids
    max_depth = apar.max_depth if asked.max_depth is None else asked.max_depth
    mode = fork_mode(apar.fork if asked.fork is None else asked.fork)
    if mode == "auto" and control is None:
        mode = "off"
    eos = config.eos_token_id
    stop = None
    if asked.stop_strings is not None:
        if apar.tokenizer is None:
            raise ValueError("stop_strings need the tokenizer: pass tokenizer=... to attach.")
        criteria = [StopStringCriteria(tokenizer=apar.tokenizer, stop_strings=asked.stop_strings)]
        stop = CriteriaStop(criteria, "cpu")
    seed = None
    if sampling.temperature > 0:
        drawn = int(torch.randint(2**62, (), dtype=torch.long, device="cpu"))
        seed = drawn if sampling.seed is None else sampling.seed
    its = RequestOptions(
        eos_ids=frozenset() if eos is None else frozenset(eos if isinstance(eos, list) else [eos]),
        stop=stop,
        policy=fork_policy(mode, asked.fork_if, max_depth, apar.tokenizer),
        rule=None if control is None else ForkRule.of(control, max_depth, mode == "auto"),
        fork_if=asked.fork_if if mode == "auto" else None,
        max_threads=asked.max_threads or apar.max_threads,
        seed=seed,
        processors=sampling.processors(),
        typical=apar.typical if seed is not None else None,
        watcher=None if asked.events is None else Reporter(asked.events, keep=False),
        **options,
    )
    return Request(id, prompt_ids, its)
