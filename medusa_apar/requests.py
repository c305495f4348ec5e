"""What a caller asks for: forking, sampling, limits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import StopStringCriteria

from medusa_apar.events import Consumer
from medusa_apar.threads.control_tokens import ControlTokens
from medusa_apar.threads.fork_policy import ForkIf, fork_mode, fork_policy
from medusa_apar.threads.fork_rule import ForkRule
from medusa_apar.threads.request import RequestOptions
from medusa_apar.verify.guides import Grammar, Guide, GuideLogitsProcessor
from medusa_apar.verify.min_tokens import MinTokensLogitsProcessor
from medusa_apar.verify.penalties import PresenceFrequencyLogitsProcessor

from . import checks
from .facts import ModelFacts

_TEMPERATURES = f"0, or from {checks.COLDEST} on"


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
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a request of an engine chooses tokens, in vLLM's words and with its defaults but for the temperature.

    temperature: 0 decodes greedily, and top_k, top_p and min_p are not used then. top_k: 0 keeps all tokens.
    presence_penalty, frequency_penalty: OpenAI's, from -2 to 2, of what was generated alone:
        `PresenceFrequencyLogitsProcessor` has them.
    logit_bias: OpenAI's, what is added to the logits of tokens, from -100 to 100 each. Logits hardly ever differ
        by so much: -100 is as good as a ban, and a token with 100 is chosen before all without.
    min_tokens: no end token, stop token or stop string ends the answer before it has so many tokens. What a thread's
        own path holds behind the prompt counts, without `[Fork]` and `[Child]`: all of it is read before what the
        thread writes next. What stands beside the path may be read before, too, and is not counted, since no thread can
        know how much that will be. A child's end token may come at any time: it ends a detail, and no answer.
    ignore_eos: end tokens do not end the answer and are part of it, as in vLLM: it has as many tokens as its limit
        says, unless something else that was asked for stops it. A child ends by them even so: see `RequestOptions`.
    stop_token_ids: tokens that end the answer where they are read, in whichever thread they stand. They are not part of
        it. An end token among them that ends a child is not read, and does not.
    guide: the JSON that the answer has to be. Its request does not fork, and ends where the text is complete.

    One that serves many requests checks and prepares what it holds once; `CallOptions.seed` tells them apart.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    guide: Guide | None = None
    _bias: SequenceBiasLogitsProcessor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, fits, said in (
            ("temperature", self.temperature == 0 or checks.COLDEST <= self.temperature < float("inf"), _TEMPERATURES),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("min_tokens", checks.is_count(self.min_tokens), "a whole number, 0 or more"),
        ):
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {said}.")
        checks.check_penalties(presence_penalty=self.presence_penalty, frequency_penalty=self.frequency_penalty)
        checks.check_bias(self.logit_bias)
        if self.guide is not None and (self.min_tokens or self.ignore_eos):
            raise ValueError("min_tokens and ignore_eos cannot be had with a guide, which says where its text ends.")

    def processors(
        self,
        prompt_length: int,
        control: ControlTokens | None = None,
        eos_ids: Collection[int] = (),
        grammar: Grammar | None = None,
    ) -> list[LogitsProcessor]:
        """transformers' own, in the order in which its `generate` applies them, and ours where its user's come.

        eos_ids: the model's end tokens. grammar: the guide's.
        """
        penalty, hot, least = self.repetition_penalty != 1.0, self.temperature > 0, self.min_tokens
        penalties, control_ids = (self.presence_penalty, self.frequency_penalty), () if control is None else control.ids
        # What ends an answer, but in a child only a detail; and what ends an answer wherever it is read.
        ends, stops = set(eos_ids), set(self.stop_token_ids).difference(eos_ids)
        if self.ignore_eos:
            ends.intersection_update(self.stop_token_ids)
        chosen = (
            (bool(self.logit_bias), self._biased),
            (penalty, lambda: RepetitionPenaltyLogitsProcessor(self.repetition_penalty)),
            (least and ends, lambda: MinTokensLogitsProcessor(prompt_length, least, sorted(ends), control)),
            (least and stops, lambda: MinTokensLogitsProcessor(prompt_length, least, sorted(stops), control, True)),
            (any(penalties), lambda: PresenceFrequencyLogitsProcessor(prompt_length, *penalties, control_ids)),
            (grammar is not None, lambda: GuideLogitsProcessor(cast(Grammar, grammar), prompt_length)),
            (hot and self.temperature != 1.0, lambda: TemperatureLogitsWarper(self.temperature)),
            (hot and self.top_k > 0, lambda: TopKLogitsWarper(self.top_k)),
            (hot and self.top_p < 1.0, lambda: TopPLogitsWarper(self.top_p)),
            (hot and self.min_p > 0, lambda: MinPLogitsWarper(self.min_p)),
        )
        return [make() for wanted, make in chosen if wanted]

    def _biased(self) -> SequenceBiasLogitsProcessor:
        if self._bias is None:
            bias: Any = {(token,): float(value) for token, value in self.logit_bias.items()}
            object.__setattr__(self, "_bias", SequenceBiasLogitsProcessor(bias))
        return cast(SequenceBiasLogitsProcessor, self._bias)


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """What `MedusaApar.request` takes beside a name and a prompt.

    sampling: None decodes greedily.
    fork, fork_if, max_threads, max_depth, stop_strings: as of a call of the hook.
    events: True has them come with the engine's outputs; a consumer is called with each.
    max_new_tokens, scores, logits, logprobs, priority, cache_salt, speculation: as of `RequestOptions`.
    """

    max_new_tokens: int = 256
    sampling: Sampling | None = None
    fork: bool | str | None = None
    fork_if: ForkIf | None = None
    max_threads: int | None = None
    max_depth: int | None = None
    events: Consumer | bool = False
    stop_strings: str | list[str] | None = None
    scores: bool = False
    logits: bool = False
    logprobs: int | None = None
    priority: int = 0
    cache_salt: str = ""
    speculation: bool = True


def mode_of(facts: ModelFacts, asked: CallOptions) -> str:
    """Where answers fork: "auto", "off" or "lists"."""
    mode = fork_mode(facts.fork if asked.fork is None else asked.fork)
    return "off" if mode == "auto" and facts.control_token_ids is None else mode


def shared_options(facts: ModelFacts, asked: CallOptions, tokenizer: Any, samples: bool) -> RequestOptions:
    """What a generate call's rows and an engine's requests settle alike: forking, threads, seed and acceptance.

    samples: whether tokens are sampled; a seed that nobody names is drawn from torch's global generator.
    """
    checks.check_limits(max_threads=asked.max_threads, max_depth=asked.max_depth)
    max_depth = facts.max_depth if asked.max_depth is None else asked.max_depth
    mode, control = mode_of(facts, asked), facts.control_token_ids
    seed = asked.seed if samples else None
    if samples and seed is None:
        seed = int(torch.randint(2**62, (), dtype=torch.long, device="cpu"))
    return RequestOptions(
        policy=fork_policy(mode, asked.fork_if, max_depth, tokenizer),
        rule=None if control is None else ForkRule.of(control, max_depth, mode == "auto"),
        fork_if=asked.fork_if if mode == "auto" else None,
        max_threads=asked.max_threads or facts.max_threads,
        seed=seed,
        # Greedy decoding is temperature 0, where Medusa accepts the likeliest token and no other.
        typical=facts.typical if samples else None,
    )


def stop_string_criteria(asked: CallOptions, tokenizer: Any) -> list[Callable]:
    """One criterion for all stop strings, none without. ValueError where there is no tokenizer to read them with."""
    if asked.stop_strings is None:
        return []
    if tokenizer is None:
        raise ValueError("stop_strings need the tokenizer: pass tokenizer=... to generate or attach.")
    return [StopStringCriteria(tokenizer=tokenizer, stop_strings=asked.stop_strings)]
