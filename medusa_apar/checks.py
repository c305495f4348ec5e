"""What is refused before any work is done, each with one sentence that says why."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, TemperatureLogitsWarper
from transformers.generation import GenerationMode

from medusa_apar.drafting.draft_tree import DEFAULT_ACCEPTANCE
from medusa_apar.heads import DraftHeads
from medusa_apar.models.families import SWITCHING_ROPE, context_length, embedding_rows, rope_kinds
from medusa_apar.triton_kernels.reference import TypicalAcceptance

if TYPE_CHECKING:
    from medusa_apar.threads.request import Request

    from .generate import MedusaApar
    from .requests import CallOptions

# Arguments of the model that transformers' `generate` prepares, and that are not used here: steps have their own. The
# cache has had several names.
_CACHES = ("past_key_values", "cache", "cache_params")
_PREPARED = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", "cache_position", *_CACHES}
# Arguments of `generate` that are refused, each with the reason. The config's fields have a table of their own.
_REFUSED_ARGUMENTS = {
    "assistant_model": "the draft heads are the drafter",
    "assistant_tokenizer": "the draft heads are the drafter",
    "synced_gpus": "every process decodes by itself",
    "negative_prompt_ids": "there is no classifier-free guidance",
    "negative_prompt_attention_mask": "there is no classifier-free guidance",
}
# Fields of the config with what transformers takes for them by itself, and the reason why it cannot be anything else.
_REFUSED_FIELDS = {
    "guidance_scale": ((None, 1), "every step would need a second pass"),
    "watermarking_config": ((None,), "it counts calls, and drafting changes their number"),
    "cache_implementation": ((None, "dynamic"), "the KV pool is the cache"),
    "compile_config": ((None,), "steps change their shape; attach(cuda_graphs=True) is what saves launches on a GPU"),
    "prefill_chunk_size": ((None,), "an engine says how a prompt is fed (max_prefill_rows)"),
    "token_healing": ((None, False), "it would change the prompt"),
    "is_assistant": ((None, False), "the model decodes by itself"),
}
# What sampling takes, as half a sentence; transformers goes on in silence with some of what it does not.
COLDEST = 1e-6  # divided by less, logits would leave float32, and the largest is chosen all the same
_SAMPLING: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: COLDEST <= value < math.inf, f"a number from {COLDEST} on"),
    "top_p": (lambda value: 0 <= value <= 1, "from 0 to 1"),
    "min_p": (lambda value: 0 <= value <= 1, "from 0 to 1"),
    "top_h": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "typical_p": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "epsilon_cutoff": (lambda value: 0 <= value < 1, "from 0 to below 1"),
    "eta_cutoff": (lambda value: 0 <= value < 1, "from 0 to below 1"),
    "top_k": (lambda value: value >= 0, "0 or more"),
}


def expected_acceptance(heads: DraftHeads | None) -> list[tuple[float, ...]]:
    """Chance per head and rank that a guess is right, as measured in training, else as is usual for such heads."""
    if heads is None:
        return []
    if heads.acceptance is not None:
        return [tuple(max(share, 1e-6) for share in ranks) for ranks in heads.acceptance]
    return [DEFAULT_ACCEPTANCE[min(head, len(DEFAULT_ACCEPTANCE) - 1)] for head in range(heads.num_heads)]


def check_limits(**limits: int | None) -> None:
    """None where there is no limit. max_depth may be 0: nothing forks."""
    for name, value in limits.items():
        if value is not None and value < (0 if name == "max_depth" else 1):
            raise ValueError(f"{name} must be positive, got {value}.")


def typical_acceptance(acceptance: str | TypicalAcceptance) -> TypicalAcceptance | None:
    """What `attach(acceptance=...)` stands for; None is exact."""
    if acceptance in ("exact", "typical"):
        return TypicalAcceptance() if acceptance == "typical" else None
    if not isinstance(acceptance, TypicalAcceptance):
        raise ValueError(f"acceptance={acceptance!r} is not 'exact', 'typical' or a TypicalAcceptance.")
    if not all(_is_number(value) and value >= 0 for value in acceptance):
        raise ValueError(f"{acceptance} needs an epsilon and a delta of 0 or more.")
    return acceptance


def check_call(
    apar: MedusaApar,
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    config: GenerationConfig,
    processors: Sequence[LogitsProcessor],
    model_kwargs: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> None:
    """arguments: what `generate` itself was called with, as far as it is known."""
    if model is not apar.model:
        raise ValueError("custom_generate was attached to another model than the one that generates.")
    for name, reason in _REFUSED_ARGUMENTS.items():
        value = arguments.get(name)
        if value is not None and value is not False:
            raise NotImplementedError(f"{name} is not supported: {reason}.")
    check_config(config, processors)
    if any(getattr(model_kwargs.get(name), "_is_user_defined", False) for name in _CACHES):
        raise NotImplementedError("A cache (past_key_values) of your own is not supported: the KV pool is the cache.")
    for name, value in model_kwargs.items():
        reported = name.startswith("output_") and value is True  # of these the config speaks
        if name not in _PREPARED and value is not None and value is not False and not reported:
            raise NotImplementedError(f"{name} is not supported; give the prompt as input_ids and attention_mask.")
    check_input_ids(model, input_ids, model_kwargs.get("attention_mask"))
    check_positions(input_ids, model_kwargs.get("attention_mask"), model_kwargs.get("position_ids"))


def check_config(config: GenerationConfig, processors: Sequence[LogitsProcessor]) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise NotImplementedError(f"{mode.value.replace('_', ' ')} is not supported; use greedy decoding or sampling.")
    for name, (taken, reason) in _REFUSED_FIELDS.items():
        value = getattr(config, name, None)
        if value not in taken:
            raise NotImplementedError(f"{name}={value!r} is not supported: {reason}.")
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise NotImplementedError("output_attentions and output_hidden_states are not supported.")
    check_sampling(vars(config))
    for processor in processors if config.do_sample else ():
        if isinstance(processor, TemperatureLogitsWarper) and not 0 < processor.temperature < math.inf:
            raise ValueError(f"temperature={processor.temperature} is not a positive number.")


def check_sampling(*given: Mapping[str, Any]) -> None:
    """given: options of a call and those that stand behind it; what the first leaves open the next ones say."""
    asked = ChainMap(*({name: value for name, value in options.items() if value is not None} for options in given))
    for name, (fits, sentence) in _SAMPLING.items() if asked.get("do_sample") else ():
        if name in asked and not (_is_number(asked[name]) and fits(asked[name])):
            raise ValueError(f"{name}={asked[name]!r} is not {sentence}.")


def check_penalties(**penalties: float | None) -> None:
    """OpenAI's, as its API takes them."""
    for name, value in penalties.items():
        if value is not None and not (_is_number(value) and -2 <= value <= 2):
            raise ValueError(f"{name}={value!r} is not a number from -2 to 2.")


def check_bias(logit_bias: Mapping[int, float]) -> None:
    """OpenAI's, as its API takes it."""
    for token, value in logit_bias.items():
        if not (_is_number(value) and -100 <= value <= 100):
            raise ValueError(f"logit_bias has {value!r} for token {token!r}, which is not a number from -100 to 100.")


def check_named_ids(name: str, ids: Iterable[int], vocabulary: int) -> None:
    """Tokens that a request names; `vocabulary`: so many tokens the model writes."""
    for token in ids:
        if not is_count(token) or token >= vocabulary:
            raise ValueError(f"{name} names {token!r}, but the model's vocabulary has ids from 0 to {vocabulary - 1}.")


def is_count(value: object) -> bool:
    """Whether it is a whole number, 0 or more."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def _is_number(value: object) -> bool:
    """transformers takes some strings and truth values for numbers, and not everywhere the same."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_input_ids(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    vocab_size = embedding_rows(model)
    if input_ids.dtype.is_floating_point or input_ids.dtype.is_complex or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids are {input_ids.dtype}, but token ids are integers.")
    wrong = input_ids[(input_ids < 0) | (input_ids >= vocab_size)]
    if len(wrong):
        raise ValueError(
            f"input_ids hold {int(wrong[0])}, but the model's vocabulary has ids from 0 to {vocab_size - 1}."
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        shapes = tuple(attention_mask.shape), tuple(input_ids.shape)
        raise ValueError("attention_mask has the shape {}, but input_ids have {}.".format(*shapes))


def check_positions(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> None:
    """Position ids have to be what they are without: each row's tokens are counted from 0, masked ones left out."""
    if position_ids is None:
        return
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    kept = mask.to(position_ids.device).bool()
    usual = kept.long().cumsum(-1) - 1
    if position_ids.shape[-1:] != usual.shape[-1:] or ((position_ids != usual) & kept).any():
        raise NotImplementedError(
            "position_ids of your own are not supported: a path's tokens are counted from 0, masked ones left out."
        )


def check_rescored(
    config: GenerationConfig, asked: CallOptions, mode: str, streamer: object, criteria: Sequence[object]
) -> None:
    """What `rescore` and `regenerate_below` cannot be combined with."""
    share = asked.regenerate_below
    if share is None:
        if asked.rescore and not config.return_dict_in_generate:
            raise ValueError("rescore=True reports in the output object: pass return_dict_in_generate=True.")
        return
    if not asked.rescore:
        raise ValueError("regenerate_below needs the agreement that rescore=True measures.")
    if not 0 < share <= 1:
        raise ValueError(f"regenerate_below={share} is no share of tokens: it must be above 0, and at most 1.")
    if config.do_sample:
        raise ValueError("regenerate_below needs greedy decoding: a sample need not agree with the likeliest tokens.")
    if mode == "off":
        raise ValueError("regenerate_below writes threads anew, and without forking there is but one.")
    if mode == "lists":
        raise ValueError("regenerate_below writes threads anew behind [Fork] [Child], which fork='lists' does without.")
    if streamer is not None:
        raise ValueError("regenerate_below cannot take back what a streamer has shown: leave one of them out.")
    if criteria:
        raise ValueError("regenerate_below changes the text behind stop strings and stopping criteria: leave them out.")


def cut_short(model: PreTrainedModel, requests: Sequence[Request], max_new_tokens: int) -> str | None:
    """What to say where the text of a thread ended at the model's context, before the limit and not by itself."""
    limit = context_length(model)
    if limit is None:
        return None
    if not any(
        thread.end >= limit and index == len(thread.tokens) - 1 and thread.finish_reason == "length"
        for request in requests
        for thread, index in request.text[: max_new_tokens - 1]
    ):
        return None
    why = "its positions end there"
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None)
    if rope and any(kind.get("rope_type") in SWITCHING_ROPE for kind in rope_kinds(rope)):
        why = "beyond, its rotary scaling depends on the whole batch, which parallel threads cannot have"
    return (
        f"{type(model).__name__} stopped at {limit} tokens, prompt included, before max_new_tokens was reached: {why}."
    )


def unpadded(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """Each row's tokens without masked ones. transformers leaves the mask out when it is all ones."""
    if attention_mask is None:
        prompts = input_ids.tolist()
    else:
        prompts = [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
    if not prompts or not all(prompts):
        raise ValueError("The prompt is empty: every row needs at least one token.")
    return prompts
