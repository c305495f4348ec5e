"""From a body to requests of the engine. What cannot be is refused here, before anything runs."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from medusa_apar import checks
from medusa_apar.events.texts import StopString, TokenTexts
from medusa_apar.facts import ModelFacts
from medusa_apar.new_request import engine_request
from medusa_apar.requests import CallOptions, Sampling, mode_of
from medusa_apar.threads.fork_policy import fork_policy
from medusa_apar.threads.paragraph_tree import thread_key
from medusa_apar.threads.request import Request
from medusa_apar.verify.guides import Guide

from .errors import ApiError, refused
from .prompts import chat_ids, prompts_of, tools_of
from .schemas import MOST_CHOICES, ChatBody, CompletionBody, Generation
from .tool_calls import CLOSE, call_guide

_COMPLETION_TOKENS = 16  # of an answer whose length nobody says, as OpenAI's API has it
_CHAT_TOKENS = 2048  # where the model does not say either how long a text can be
_MOST_TOLD = 1 << 19  # log-probabilities of prompts, each of which is an object for a while
# What a model's own generation config may say of answers for which the body does not.
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_SET = ("top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens", "ignore_eos")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a body is answered.

    id: of the answer; requests of the engine are named after it. pool_slots: of the engine, None where the pool grows.
    tenant: whose prompts share cached beginnings.
    """

    facts: ModelFacts
    id: str
    pool_slots: int | None = None
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Asked:
    """One HTTP request as requests of the engine.

    prompts: token ids. requests: n of each prompt, in the order of their choices; none where only the prompt is wanted.
    stops, free: as of `TextStream`. ends: tokens that are no text where an answer ends by one. echoes: what the text of
    each choice begins with. scorings: where log-probabilities of the prompts are wanted, what asks for each prompt's;
    None where it is a single token, which nothing stands before. calls: "written" where texts may hold calls of tools,
    "once" where the first of them is all that counts, "guided" where each text is one.
    """

    prompts: list[list[int]]
    requests: list[Request]
    n: int = 1
    stops: Sequence[str] = ()
    free: int = 0
    ends: frozenset[int] = frozenset()
    echoes: list[str] = field(default_factory=list)
    scorings: list[Request | None] = field(default_factory=list)
    calls: str | None = None


def chat(body: ChatBody, place: Place) -> Asked:
    """ApiError 400 for what cannot be."""
    with refused("messages"):
        prompt = chat_ids(place.facts, body.messages, tools_of(body, place.facts), fits=True)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    wanted = body.max_completion_tokens or body.max_tokens
    name = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
    default = getattr(place.facts.generation_config, "max_new_tokens", None)
    return _asked(body, place, [prompt], logprobs, _Length(name, wanted, default))


def completion(body: CompletionBody, place: Place) -> Asked:
    """ApiError 400 for what cannot be."""
    prompts = prompts_of(body, place.facts)
    echoes = []
    if body.echo:
        decode = TokenTexts.of(place.facts.tokenizer).decode
        texts = [p if isinstance(p, str) else decode(p) for p in body.prompt]
        echoes = [text for text in texts for _ in range(body.n or 1)]
    length = _Length("max_tokens", body.max_tokens, _COMPLETION_TOKENS)
    asked = _asked(body, place, prompts, body.logprobs, length, echoes)
    if not body.echo or body.logprobs is None:
        return asked
    return replace(asked, scorings=_scorings(asked, place, body.logprobs, _salt(body, place)))


def _scorings(asked: Asked, place: Place, logprobs: int, salt: dict[str, Any]) -> list[Request | None]:
    """As of `Asked`."""
    told = sum(map(len, asked.prompts)) * asked.n * (1 + logprobs)
    if told > _MOST_TOLD:
        said = f"echo with logprobs={logprobs} asks for {told} log-probabilities of prompts"
        raise ApiError(400, f"{said}, at most {_MOST_TOLD} are told.", param="logprobs")

    def scoring(index: int, prompt: list[int]) -> Request | None:
        if len(prompt) == 1:
            return None
        name = f"{place.id}-prompt-{index}"
        how = {"score_from": 1, "max_new_tokens": 1, "logprobs": logprobs, **salt}
        with refused("prompt"):
            return engine_request(place.facts, name, prompt, Sampling(), CallOptions(fork=False), **how)

    return [scoring(*each) for each in enumerate(asked.prompts)]


class _Length(NamedTuple):
    """Which field says how long an answer may be, what it says, and what counts where it says nothing."""

    name: str
    wanted: int | None
    default: int | None


def _asked(
    body: Generation,
    place: Place,
    prompts: list[list[int]],
    logprobs: int | None,
    length: _Length,
    echoes: Sequence[str] = (),
) -> Asked:
    n = body.n or 1
    if len(prompts) * n > MOST_CHOICES:
        raise ApiError(
            400, f"{len(prompts)} prompts times n={n} are more than {MOST_CHOICES} answers of one request.", param="n"
        )
    options = _call_options(body, place.facts)
    chosen = _sampling(body, place.facts)
    with refused():
        limits = [_limit(place, options, len(prompt), length) for prompt in prompts]
    shared: dict[str, Any] = {"logprobs": logprobs, "events": body.events, **_salt(body, place)}
    if body.apar and body.apar.acceptance:
        hot = chosen["temperature"] > 0
        shared["typical"] = checks.typical_acceptance(body.apar.acceptance) if hot else None
    if body.apar and body.apar.speculation == "off":
        shared["speculation"] = False
    requests: list[Request] = []
    with refused():
        sampling = Sampling(**chosen)
        for prompt, limit in zip(prompts, limits, strict=True):
            for choice in range(n if limit else 0):
                own = replace(options, seed=_seed(body.seed, choice))
                name, its = f"{place.id}-{len(requests)}", shared | {"max_new_tokens": limit}
                requests.append(engine_request(place.facts, name, prompt, sampling, own, **its))
    ends = frozenset() if body.ignore_eos or not requests else requests[0].options.eos_ids
    calls = None
    if body.may_call and not _is_formed(body):
        calls = "guided" if body.must_call else "once" if body.calls_once else "written"
    free, stops = body.min_tokens or 0, options.stop_strings or ()
    return Asked(prompts, requests, n, stops, free, ends, list(echoes), calls=calls)


def _salt(body: Generation, place: Place) -> dict[str, Any]:
    """`RequestOptions.cache_salt`, where there is one."""
    if body.cache_salt:
        return {"cache_salt": f"asked {body.cache_salt}"}
    return {"cache_salt": f"tenant {place.tenant}"} if place.tenant else {}


def _sampling(body: Generation, facts: ModelFacts) -> dict[str, Any]:
    """Arguments of `Sampling` but for the seed; OpenAI's defaults where neither body nor model says anything."""
    config = facts.generation_config
    known = {name: value for name in _DEFAULTS if (value := getattr(config, name, None)) is not None}
    asked = {name: value for name in (*_SET, "temperature") if (value := getattr(body, name)) is not None}
    if body.top_k is not None:
        asked["top_k"] = max(body.top_k, 0)  # -1 keeps all, as vLLM has it
    if body.stop_token_ids:
        with refused("stop_token_ids"):
            checks.check_named_ids("stop_token_ids", body.stop_token_ids, facts.vocabulary)
        asked["stop_token_ids"] = tuple(body.stop_token_ids)
    if body.logit_bias:
        asked["logit_bias"] = _bias(body.logit_bias)
        with refused("logit_bias"):
            checks.check_named_ids("logit_bias", asked["logit_bias"], facts.vocabulary)
    if (guide := _guide(body)) is not None:
        asked["guide"] = guide
    whole = {"temperature": 1.0} | known | asked
    if whole["temperature"] < checks.COLDEST:  # by so little the likeliest token is always chosen
        whole["temperature"] = 0.0
    return whole


def _bias(bias: dict[str, float]) -> dict[int, float]:
    wrong = next((id for id in bias if not re.fullmatch(r"-?[0-9]{1,18}", id)), None)
    if wrong is not None:
        raise ApiError(400, f"logit_bias names {wrong[:40]!r}, which is no token id.", param="logit_bias")
    return {int(id): value for id, value in bias.items()}


def _guide(body: Generation) -> Guide | None:
    if body.must_call:
        with refused("tools"):
            return call_guide([tool.model_dump(exclude_none=True) for tool in body.must_call])
    asked = body.response_format
    if asked is None or asked.type == "text":
        return None
    schema = None if asked.json_schema is None else asked.json_schema.schema_
    with refused("response_format"):
        return Guide() if schema is None else Guide.json_schema(schema)


def _is_formed(body: Generation) -> bool:
    """Whether the answer is JSON."""
    return body.response_format is not None and body.response_format.type != "text"


def _call_options(body: Generation, facts: ModelFacts) -> CallOptions:
    ours = body.apar
    fork = None if ours is None else ours.fork
    whole = "response_format" if _is_formed(body) else "tools" if body.may_call else None
    if whole is not None:  # what is parsed as a whole has to be written by one thread
        if fork not in (None, False, "off"):
            raise ApiError(400, f"apar.fork and {whole} exclude each other.", param="apar.fork")
        fork = False
    alone = next((name for name in facts.unforked if getattr(body, name)), None)
    if alone is not None and fork not in (None, False, "off"):
        raise ApiError(400, f"apar.fork and {alone} exclude each other on this engine.", param="apar.fork")
    max_threads, most = None if ours is None else ours.max_threads, facts.max_threads
    if max_threads is not None and most is not None and max_threads > most:
        raise ApiError(
            400,
            f"apar.max_threads is {max_threads}, but this server runs at most {most} threads of an answer.",
            param="apar.max_threads",
        )
    max_depth = None if ours is None else ours.max_depth
    if fork is True and facts.control_token_ids is None:
        raise ApiError(
            400, "apar.fork is true, but the model has no [Fork] and [Child] to fork with.", param="apar.fork"
        )
    stops: list[str] = [StopString(stop) for stop in body.stop or ()]
    if body.calls_once and not _is_formed(body):
        stops.append(StopString(CLOSE))
    return CallOptions(fork=fork, max_threads=max_threads, max_depth=max_depth, stop_strings=stops or None)


def _limit(place: Place, options: CallOptions, prompt: int, length: _Length) -> int:
    """Tokens of the answer, at most. ApiError 400, with the numbers, where prompt and answer cannot fit."""
    context, slots = place.facts.context, place.pool_slots
    room = _room(place, options, prompt, context)
    default = (length.default or _CHAT_TOKENS) if room is None else min(room, length.default or room)
    limit = default if length.wanted is None else length.wanted
    if room is None or limit <= room > 0:
        return limit
    code = "context_length_exceeded"
    if context is not None and (prompt >= context or prompt + limit > context):
        said = f"The model's context has {context} tokens, but the prompt has {prompt}"
        if length.wanted is not None:
            said += f" and {length.name} asks for {limit}, {prompt + limit} together"
        raise ApiError(400, f"{said}.", param=length.name if prompt < context else None, code=code)
    raise ApiError(
        400,
        f"The server keeps {slots} tokens at most, and a prompt of {prompt} tokens leaves room for an answer of "
        f"{max(room, 0)}, forks included.",
        param=length.name,
        code=code,
    )


def _room(place: Place, options: CallOptions, prompt: int, context: int | None) -> int | None:
    """Most tokens of an answer behind so long a prompt; None where nothing bounds it."""
    slots, facts = place.pool_slots, place.facts
    most = None if context is None else context - prompt
    if slots is None or most is not None and most <= 0:
        return most
    depth = facts.max_depth if options.max_depth is None else options.max_depth
    policy = fork_policy(mode_of(facts, options), None, depth, facts.tokenizer)
    positions = facts.positions

    def needed(answer: int) -> int:
        """As `admission.check_fits` has it."""
        whole = prompt + answer + policy.max_invisible_tokens(answer, depth)
        return whole if positions is None else min(whole, positions)

    return bisect_right(range(1, (slots if most is None else most) + 1), slots, key=needed)


def _seed(seed: int | None, choice: int) -> int | None:
    """The first choice has the seed itself, so that it is what n=1 gives."""
    if seed is None:
        return None
    return seed & (2**63 - 1) if choice == 0 else thread_key(seed, choice) >> 1
