"""What differs between families of models: which are refused, how long a path may be, what becomes of logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

# Layers whose state is not a list of keys and values: a rejected draft node could not be taken back from them.
_RECURRENT = ("linear_attention", "mamba", "recurrent", "conv", "rwkv", "short_conv", "hybrid")
# Rotary scalings that depend on the longest row of a batch.
SWITCHING_ROPE = ("longrope", "dynamic")


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
    length = max_positions(model)
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return length  # learned positions: there is no embedding beyond
    kinds = rope_kinds(rope)
    if any(kind.get("rope_type") in SWITCHING_ROPE for kind in kinds):
        originals = [kind.get("original_max_position_embeddings") for kind in kinds]
        return next((original for original in originals if original), length)
    return None


def max_positions(model: PreTrainedModel) -> int | None:
    """Tokens that the model was made for, prompt and answer together; None where its config does not say."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def rope_kinds(rope: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(rope.values()) if all(isinstance(kind, dict) for kind in rope.values()) else [rope]


def embedding_rows(model: PreTrainedModel) -> int:
    """Tokens that can be fed."""
    return cast(Tensor, model.get_input_embeddings().weight).shape[0]


def unembedding_size(model: PreTrainedModel) -> tuple[int, int]:
    """(vocabulary, hidden size) of the model's unembedding."""
    lm_head = model.get_output_embeddings()
    if lm_head is None:
        raise ValueError(f"{type(model).__name__} has no unembedding for Medusa heads to use.")
    weight = getattr(lm_head, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        vocab_size, hidden_size = weight.shape
        return vocab_size, hidden_size
    config = model.config.get_text_config()  # a quantised unembedding shows no such shape
    return config.vocab_size, config.hidden_size


def end_tokens(config: GenerationConfig | None) -> list[int]:
    """The ids that end a text, as a generation config names them: none, one or several."""
    named: int | list[int] | None = None if config is None else config.eos_token_id
    return [] if named is None else [named] if isinstance(named, int) else list(named)


def base_logit_scale(logits: Tensor, model: PreTrainedModel) -> Tensor:
    """What some families do to their logits after the unembedding: Cohere multiplies, Granite divides, Gemma caps."""
    config = model.config.get_text_config()
    if factor := getattr(config, "logit_scale", None):
        logits = logits * factor
    if divisor := getattr(config, "logits_scaling", None):
        logits = logits / divisor
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits
