"""A request for `Engine.add`, made of what a caller asks for and checked before it is added anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from medusa_apar.engine.admission import check_ids
from medusa_apar.engine.stopping import TextStop
from medusa_apar.events.reporter import Reporter
from medusa_apar.events.texts import TextStream, TokenTexts
from medusa_apar.models.families import end_tokens
from medusa_apar.threads.request import Request, RequestOptions
from medusa_apar.verify.guides import compiled

from . import checks
from .facts import ModelFacts
from .requests import AnswerOptions, CallOptions, Sampling, shared_options

if TYPE_CHECKING:
    from .generate import MedusaApar

# What `AnswerOptions` and `RequestOptions` have by the same name.
_KEPT = ("max_new_tokens", "scores", "logits", "logprobs", "priority", "cache_salt", "speculation")


def request(
    apar: MedusaApar, id: str, prompt: str | Sequence[int], options: AnswerOptions | None = None, **changes: Any
) -> Request:
    """A request for `Engine.add`.

    Args:
        id: names it in its engine and its outputs.
        prompt: token ids; or a text, which the tokenizer encodes as it is, without a chat template.
        options: what is asked for; None: nothing but what `changes` name.
        changes: of `AnswerOptions`, for this request alone: max_new_tokens, sampling, fork ...

    Raises ValueError, in one sentence, for what cannot be.
    """
    if isinstance(prompt, str):
        if apar.tokenizer is None:
            raise ValueError("a prompt that is text needs the tokenizer: pass tokenizer=... to attach.")
        prompt = cast(Any, apar.tokenizer)(prompt)["input_ids"]
    its = replace(AnswerOptions() if options is None else options, **changes)
    consumer = None if isinstance(its.events, bool) else its.events
    asked = CallOptions(
        its.fork, its.fork_if, its.max_threads, its.max_depth, events=consumer, stop_strings=its.stop_strings
    )
    sampling = Sampling() if its.sampling is None else its.sampling
    kept = {name: getattr(its, name) for name in _KEPT} | {"events": its.events is True}
    return engine_request(apar.facts, id, list(cast(Sequence[int], prompt)), sampling, asked, **kept)


def engine_request(
    facts: ModelFacts, id: str, prompt_ids: Sequence[int], sampling: Sampling, asked: CallOptions, **options: Any
) -> Request:
    """A request for any engine of a model. ValueError for what cannot be, before it is added anywhere.

    A guide is compiled here, in the caller's thread: `compiled` says how long that takes.
    """
    check_ids(facts.input_vocabulary, prompt_ids)
    for name, ids in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
        checks.check_named_ids(name, ids, facts.vocabulary)
    control = () if facts.control_token_ids is None else facts.control_token_ids.ids
    if not set(control).isdisjoint(sampling.stop_token_ids):
        raise ValueError("stop_token_ids name a control token, which is never read.")
    if sampling.min_tokens > (most := options.get("max_new_tokens", RequestOptions().max_new_tokens)):
        raise ValueError(f"min_tokens={sampling.min_tokens} are more than max_new_tokens={most}.")
    tokenizer, eos_ids = facts.tokenizer, frozenset(end_tokens(facts.generation_config))
    asked, grammar = replace(asked, seed=asked.seed if sampling.seed is None else sampling.seed), None
    if sampling.guide is not None:
        asked, grammar = replace(asked, fork=False), compiled(sampling.guide, tokenizer, facts.vocabulary, eos_ids)
    shared = shared_options(facts, asked, tokenizer, sampling.temperature > 0)
    its = replace(
        shared,
        eos_ids=eos_ids,
        ignore_eos=sampling.ignore_eos,
        stop_ids=frozenset(sampling.stop_token_ids),
        stop=text_stop(asked.stop_strings, tokenizer, sampling.min_tokens),
        processors=sampling.processors(len(prompt_ids), facts.control_token_ids, eos_ids, grammar),
        watcher=None if asked.events is None else Reporter(asked.events, keep=False),
        **options,
    )
    return Request(id, list(prompt_ids), its)


def text_stop(strings: str | Sequence[str] | None, tokenizer: Any, free: int = 0) -> TextStop | None:
    """What ends a request at stop strings, none of which ends within the first `free` tokens; None without any.

    ValueError where one is empty, or there is no tokenizer to read them with.
    """
    stops = [strings] if isinstance(strings, str) else list(strings or ())
    if not stops:
        return None
    if tokenizer is None:
        raise ValueError("stop_strings need the tokenizer: pass tokenizer=... to attach.")
    if not all(stops):
        raise ValueError("one of the stop strings is empty.")
    return TextStop(TextStream(TokenTexts.of(tokenizer), stops, free))
