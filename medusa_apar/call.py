"""One call of `generate`: what transformers hands a `custom_generate` becomes requests, and these its output."""

from __future__ import annotations

import inspect
import logging
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation import GenerationMixin

from medusa_apar.engine import admission, draft_watch
from medusa_apar.engine.engine import Engine
from medusa_apar.engine.plan import MAX_PREFILL_ROWS
from medusa_apar.engine.rescoring import Rescoring, finish, first_limit, last_limit
from medusa_apar.engine.stopping import CriteriaStop, StopConditions
from medusa_apar.events.reporter import Reporter
from medusa_apar.events.streaming import EndedOnce, TextColumns
from medusa_apar.models.families import unembedding_size
from medusa_apar.threads.paragraph_tree import thread_key
from medusa_apar.threads.request import Request, RequestOptions, Row
from medusa_apar.verify.penalties import PresenceFrequencyLogitsProcessor

from . import checks
from .output import MedusaAparOutput
from .requests import CallOptions, mode_of, shared_options, stop_string_criteria

if TYPE_CHECKING:
    from .generate import MedusaApar

logger = logging.getLogger(__name__)


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
    facts = apar.facts
    options = shared_options(facts, asked, tokenizer, bool(config.do_sample))
    mode = mode_of(facts, asked)
    ends = StopConditions.of(prepared.stopping_criteria, config, prepared.input_ids.shape[1], one_thread=mode == "off")
    ends.criteria.extend(stop_string_criteria(asked, tokenizer))
    checks.check_rescored(config, asked, mode, prepared.streamer, ends.criteria)
    options = replace(
        options,
        max_new_tokens=first_limit(ends.max_new_tokens, asked.regenerate_below),
        eos_ids=ends.eos_ids,
        processors=_processors(apar, prepared, asked),
        scores=prepared.returns_dict and bool(config.output_scores),
        logits=prepared.returns_dict and bool(config.output_logits),
    )
    return options, ends


def _processors(apar: MedusaApar, prepared: Prepared, asked: CallOptions) -> list[Callable]:
    """What transformers has prepared, with the call's penalties behind the user's own processors."""
    processors: list[Callable] = list(prepared.processors)
    penalties = asked.presence_penalty or 0.0, asked.frequency_penalty or 0.0
    if any(penalties):
        control = apar.control_token_ids
        free_ids = () if control is None else control.ids
        ours = PresenceFrequencyLogitsProcessor(prepared.input_ids.shape[1], *penalties, free_ids)
        processors.insert(_behind_the_users(processors, prepared.config), ours)
    return processors


def _behind_the_users(processors: Sequence[Callable], config: GenerationConfig) -> int:
    """Where transformers has appended what the call's settings ask for: a user's own list may end in warpers too."""
    off = {"temperature": 1.0, "top_h": None, "top_k": 0, "top_p": 1.0, "min_p": None, "typical_p": 1.0}
    off |= {"epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
    count = sum(getattr(config, name, None) not in (None, value) for name, value in off.items())
    return len(processors) - count * bool(config.do_sample) - (config.renormalize_logits is True)


def _run(engine: Engine, columns: TextColumns, streamer: EndedOnce | None) -> None:
    """Steps until nothing is unfinished. Raises what a row fails by."""
    for _ in finish(engine):
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


def callers_arguments() -> dict[str, Any]:
    """What `model.generate` itself was called with; nothing where it was not.

    transformers keeps some of it from a callable `custom_generate`: a streamer, whose reader would wait for ever, a
    tokenizer, an assistant model. They are fetched from the frames that call us. `generate` takes the tokenizers out
    of its own `kwargs`, but torch.no_grad, which wraps it, has them still.
    """
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not inspect.unwrap(GenerationMixin.generate).__code__:
        frame = cast(Any, frame.f_back)
    if frame is None:
        return {}
    wrapped = frame.f_back.f_locals.get("kwargs") if frame.f_back is not None else None
    return dict(wrapped if isinstance(wrapped, dict) else {}) | dict(frame.f_locals)
