"""What is refused before any work is done, each with one sentence that says why."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode

from .draft_tree import DEFAULT_ACCEPTANCE
from .heads import DraftHeads
from .triton_kernels.reference import TypicalAcceptance

if TYPE_CHECKING:
    from .generate import MedusaApar

# Layers whose state is not a list of keys and values: a rejected draft node could not be taken back from them.
_RECURRENT = ("linear_attention", "mamba", "recurrent", "conv", "rwkv", "short_conv", "hybrid")
# Arguments transformers prepares for the model and we prepare anew.
_PREPARED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}


def check_model(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise ValueError(f"{name} is not a causal language model of transformers.")
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model; only decoder-only models can be attached.")
    recurrent = [kind for kind in getattr(config, "layer_types", None) or () if any(r in kind for r in _RECURRENT)]
    if recurrent or getattr(model, "_is_stateful", False):
        raise ValueError(
            f"{name} has recurrent layers, whose state cannot take back a rejected draft token; it cannot be attached."
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(f"{name} does not take its attention from transformers' AttentionInterface.")
    if getattr(config, "num_kv_shared_layers", None):
        raise ValueError(f"{name} shares keys and values between layers, which the KV pool does not support.")


def context_length(model: PreTrainedModel) -> int | None:
    """Most tokens a path can have, None where there is no such limit (rotary positions go on, as in transformers).

    Rotary scalings that switch for the whole batch once its longest row is long enough would let one thread change
    another's tokens; they are kept below the switch.
    """
    config = model.config.get_text_config(decoder=True)
    length = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return length  # learned positions: there is no embedding beyond
    kinds = rope.values() if all(isinstance(kind, dict) for kind in rope.values()) else [rope]
    if any(kind.get("rope_type") in ("longrope", "dynamic") for kind in kinds):
        originals = [kind.get("original_max_position_embeddings") for kind in kinds]
        return next((original for original in originals if original), length)
    return None


def expected_acceptance(heads: DraftHeads | None) -> list[tuple[float, ...]]:
    """Chance per head and rank that a guess is right, as measured in training, else as is usual for such heads."""
    if heads is None:
        return []
    if (measured := getattr(heads, "acceptance", None)) is not None:
        return [tuple(max(share, 1e-6) for share in ranks) for ranks in measured]
    return [DEFAULT_ACCEPTANCE[min(head, len(DEFAULT_ACCEPTANCE) - 1)] for head in range(heads.num_heads)]


def check_limits(**limits: int | None) -> None:
    """None where there is no limit. max_depth may be 0: nothing forks."""
    for name, value in limits.items():
        if value is not None and value < (0 if name == "max_depth" else 1):
            raise ValueError(f"{name} must be positive, got {value}.")


def check_asked(apar: MedusaApar, config: GenerationConfig, fork_if: object, mode: str) -> None:
    if fork_if is not None and mode == "auto" and apar.typical is not None and config.do_sample:
        raise NotImplementedError("fork_if is asked token by token, and typical acceptance judges whole paths at once.")


def typical_acceptance(acceptance: str | TypicalAcceptance) -> TypicalAcceptance | None:
    """What `attach(acceptance=...)` stands for; None is exact."""
    if acceptance in ("exact", "typical"):
        return TypicalAcceptance() if acceptance == "typical" else None
    if not isinstance(acceptance, TypicalAcceptance):
        raise ValueError(f"acceptance={acceptance!r} is not 'exact', 'typical' or a TypicalAcceptance.")
    if not all(isinstance(value, (int, float)) and value >= 0 for value in acceptance):
        raise ValueError(f"{acceptance} needs an epsilon and a delta of 0 or more.")
    return acceptance


def check_call(
    apar: MedusaApar, model: PreTrainedModel, input_ids: torch.Tensor, config: GenerationConfig, model_kwargs: dict
) -> None:
    if model is not apar.model:
        raise ValueError("custom_generate was attached to another model than the one that generates.")
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise NotImplementedError(f"{mode.value.replace('_', ' ')} is not supported; use greedy decoding or sampling.")
    if config.guidance_scale not in (None, 1, 1.0):
        raise NotImplementedError(f"guidance_scale={config.guidance_scale} is not supported.")
    if config.watermarking_config is not None:
        raise NotImplementedError("watermarking is not supported: it counts calls, and drafting changes their number.")
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise NotImplementedError("output_attentions and output_hidden_states are not supported.")
    if getattr(model_kwargs.get("past_key_values"), "_is_user_defined", False):
        raise NotImplementedError("A past_key_values of your own is not supported: the KV pool is the cache.")
    for name, value in model_kwargs.items():
        if name not in _PREPARED and isinstance(value, torch.Tensor):
            raise NotImplementedError(f"{name} is not supported; give the prompt as input_ids and attention_mask.")
    vocab_size = cast(torch.Tensor, model.get_input_embeddings().weight).shape[0]
    if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < vocab_size:
        raise ValueError(f"input_ids hold {int(input_ids.max())}, but the model's vocabulary has {vocab_size} ids.")


def check_verified(
    apar: MedusaApar,
    config: GenerationConfig,
    verify: str | None,
    regenerate_below: float | None,
    mode: str,
    streamer: object,
    criteria: list,
) -> None:
    if verify not in (None, "stitched"):
        raise ValueError(f"verify={verify!r} is not None or 'stitched'.")
    if regenerate_below is None:
        if verify and not config.return_dict_in_generate:
            raise ValueError(f"verify={verify!r} reports in the output object: pass return_dict_in_generate=True.")
        return
    if verify is None:
        raise ValueError("regenerate_below needs the agreement that verify='stitched' measures.")
    if not 0 < regenerate_below <= 1:
        raise ValueError(
            f"regenerate_below={regenerate_below} is no share of tokens: it must be above 0, and at most 1."
        )
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


def unpadded(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """Each row's tokens without masked ones. transformers leaves the mask out when it is all ones."""
    if attention_mask is None:
        prompts = input_ids.tolist()
    else:
        prompts = [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
    if not prompts or not all(prompts):
        raise ValueError("The prompt is empty: every row needs at least one token.")
    return prompts


def check_lengths(apar: MedusaApar, prompts: list[list[int]], max_new_tokens: int, hidden: int) -> None:
    """hidden: most tokens of a path that are no part of the text."""
    longest, limit = max(map(len, prompts)), context_length(apar.model)
    context = getattr(apar.model.config.get_text_config(decoder=True), "max_position_embeddings", None) or longest + 1
    if longest >= context:
        raise ValueError(f"The prompt has {longest} tokens, but the model's context ends at {context}.")
    if limit is not None and longest >= limit:
        raise ValueError(
            f"The prompt has {longest} tokens, but from {limit} on this model's rotary scaling depends on the whole "
            "batch, which parallel threads cannot have."
        )
    if apar.pool_slots is None:
        return
    needed = longest + max_new_tokens + hidden  # the longest path must fit alone
    if limit is not None:
        needed = min(needed, limit)
    if apar.pool_slots < needed:
        raise ValueError(
            f"pool_slots={apar.pool_slots} is too small: a prompt of {longest} tokens and max_new_tokens="
            f"{max_new_tokens} may need {needed} slots."
        )
