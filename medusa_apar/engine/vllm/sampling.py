"""A request's processors in vLLM's words. What vLLM cannot do is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medusa_apar.threads.request import RequestOptions
from medusa_apar.verify.guides import GuideLogitsProcessor
from medusa_apar.verify.min_tokens import MinTokensLogitsProcessor
from medusa_apar.verify.recipe import Operation, recipe_of

COLDEST = 0.01  # of vLLM's temperatures but 0: it takes colder ones for this


@dataclass(frozen=True, slots=True)
class VllmSampling:
    """How vLLM chooses tokens, in its own words and in its own order: penalties, temperature, min-p, top-k and top-p.

    schema: a JSON schema that the text has to follow."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    schema: str | None = None

    @property
    def goes_on(self) -> bool:
        """Whether a text can be gone on with in another request: neither a grammar nor counts begin anew there."""
        return self.schema is None and not self.counts_written

    @property
    def counts_written(self) -> bool:
        """Whether it goes by what was written behind the prompt, of which a child's request of vLLM knows its own."""
        return bool(self.presence_penalty or self.frequency_penalty)


def sampling_of(options: RequestOptions, speculates: bool = False) -> VllmSampling:
    """NotImplementedError for what vLLM cannot be asked for.

    speculates: as of `VllmOptions`.
    """
    for name, asked in (
        ("typical acceptance", options.typical is not None),
        ("scores", options.scores),
        ("logits", options.logits),
        ("speculation for some answers and not for others", speculates and not options.speculation),
        ("logit_bias beside speculation", speculates and _has(options, "bias")),
        ("min_p beside speculation", speculates and _has(options, "min_p")),
    ):
        if asked:
            raise NotImplementedError(f"vLLM has no {name}.")
    known: dict[str, Any] = {"temperature": 0.0 if options.seed is None else 1.0, "logprobs": options.logprobs}
    for operation in _operations(options):
        if operation.kind not in _READERS:
            raise NotImplementedError(f"vLLM has no {operation.kind}.")
        known |= _READERS[operation.kind](operation)
    guides = [each for each in options.processors if type(each) is GuideLogitsProcessor]
    if options.seed is None:  # vLLM has them count only where it samples
        known = {name: value for name, value in known.items() if name not in ("top_k", "top_p", "min_p")}
        known["temperature"] = 0.0
    elif known["temperature"] < COLDEST:
        raise NotImplementedError(f"vLLM has no temperature between 0 and {COLDEST}.")
    sampling = VllmSampling(**known, schema=guides[0].grammar.schema if guides else None)
    if sampling.counts_written and _may_end_too_early(options):
        raise NotImplementedError(
            "vLLM has no min_tokens with ignore_eos and stop_token_ids beside presence_penalty or frequency_penalty, "
            "whose counts would begin anew where it has written a stop token too early."
        )
    return sampling


def min_tokens_of(processors: Sequence[Any]) -> list[MinTokensLogitsProcessor]:
    """The processors that hold tokens back until an answer is long enough."""
    return [each for each in processors if type(each) is MinTokensLogitsProcessor]


def tokens_left(processor: MinTokensLogitsProcessor, path: Sequence[int]) -> int:
    """How many tokens a path lacks before the processor lets go."""
    control = () if processor.control is None else processor.control.ids
    return processor.min_tokens - sum(token not in control for token in path[processor.prompt_length :])


def _may_end_too_early(options: RequestOptions) -> bool:
    """Whether vLLM may write a token before it may come, so that a part has to be asked for anew without it: of its own
    accord it holds all stop tokens and end tokens back, and for as long as each other."""
    least = {token: each.min_tokens for each in min_tokens_of(options.processors) for token in each.end_ids}
    together = options.eos_ids | options.stop_ids
    return not together.issuperset(least) or len({least.get(token, 0) for token in together}) > 1


def _operations(options: RequestOptions) -> Sequence[Operation]:
    recipe = recipe_of(options.processors, len(options.processors), None, options.seed)
    if recipe is None:
        raise NotImplementedError("vLLM takes no logits processors of transformers but those that it has itself.")
    return recipe.operations


def _has(options: RequestOptions, kind: str) -> bool:
    return any(operation.kind == kind for operation in _operations(options))


_READERS: Mapping[str, Callable[[Operation], dict[str, Any]]] = {
    "temperature": lambda its: {"temperature": its.value},
    "top_k": lambda its: {"top_k": its.length},
    "top_p": lambda its: {"top_p": its.value},
    "min_p": lambda its: {"min_p": its.value},
    "repetition": lambda its: {"repetition_penalty": its.value},
    "presence_frequency": lambda its: {"frequency_penalty": its.value, "presence_penalty": its.values[0]},
    "bias": lambda its: {"logit_bias": dict(zip(its.ids, its.values, strict=True))},
    "held_back": lambda its: {},  # `part.py` counts
    "mask": lambda its: {},  # the schema
}
