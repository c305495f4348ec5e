"""Drafters without a file: the base's own last layer, to begin training with; and random ones, of any base."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from medusa_apar.models.families import unembedding_size
from medusa_apar.runtimes.capture import aux_layer_modules

from .files import SHAPES, Eagle3File

_EMBEDDED = 0.02  # of the weights that read embeddings, which no layer of the base does
_HEAD = 64  # dimensions of a random drafter's heads


def fresh(model: PreTrainedModel, boundaries: tuple[int, ...], token_map: Tensor | None, seed: int = 0) -> Eagle3File:
    """A drafter of the model's width, float32 on the CPU, with the base's embedding and unembedding.

    NotImplementedError for a base whose layers are not Llama's: their weights would fit nowhere.
    """
    config = model.config.get_text_config(decoder=True)
    last = aux_layer_modules(model, (config.num_hidden_layers - 1,))[0]
    own = {name: tensor.detach().float().cpu().clone() for name, tensor in last.state_dict().items()}
    if unknown := [name for name in own if name not in SHAPES]:
        raise NotImplementedError(
            f"a drafter cannot begin as a layer of {type(model).__name__}, which has {unknown[0]}: only layers like "
            "Llama's can."
        )
    vocab_size, hidden = unembedding_size(model)
    generator = torch.Generator().manual_seed(seed)
    for name in ("q", "k", "v"):
        weight = own[f"self_attn.{name}_proj.weight"]
        embedded = torch.randn(weight.shape, generator=generator) * _EMBEDDED
        own[f"self_attn.{name}_proj.weight"] = torch.cat([embedded, weight], dim=1)
    own["hidden_norm.weight"] = own["input_layernorm.weight"]
    own["input_layernorm.weight"] = torch.ones(hidden)
    fc = torch.zeros(hidden, len(boundaries) * hidden)
    fc[:, (len(boundaries) - 1) * hidden :] = torch.eye(hidden)
    return Eagle3File(
        layers=[own],
        norm=_final_norm(model),
        config=_config(config, vocab_size, hidden),
        fc=fc,
        token_map=token_map,
        boundaries=boundaries,
    )


def random_file(model: PreTrainedModel, boundaries: tuple[int, ...], seed: int = 0) -> Eagle3File:
    """A random drafter of any base, as wide, float32 on the CPU, with its embedding and unembedding."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size, hidden = unembedding_size(model)
    heads = next(count for count in range(max(hidden // _HEAD, 1), 0, -1) if hidden % count == 0)
    sizes = {"H": hidden, "I": 2 * hidden, "Q": heads * _HEAD, "K": heads * _HEAD, "F": 2 * hidden}
    layer = {}
    for name, shape in SHAPES.items():
        if name.endswith("norm.weight") and "self_attn" not in name:
            layer[name] = torch.ones(hidden)
        elif name.endswith("proj.weight"):
            wanted = [sizes[letter] for letter in shape]
            layer[name] = torch.randn(wanted, generator=generator) * wanted[-1] ** -0.5
    fused = len(boundaries) * hidden
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=_HEAD,
        vocab_size=vocab_size,
    )
    fc = torch.randn(hidden, fused, generator=generator) * fused**-0.5
    return Eagle3File(layers=[layer], norm=torch.ones(hidden), config=config, fc=fc, boundaries=boundaries)


def _final_norm(model: PreTrainedModel) -> Tensor:
    norm: Any = getattr(model.base_model, "norm", None)
    if norm is None:
        raise NotImplementedError(f"a drafter cannot begin as a layer of {type(model).__name__}: it has no final norm.")
    weight: Tensor = norm.weight
    return weight.detach().float().cpu().clone()


def _config(config: Any, vocab_size: int, hidden: int) -> LlamaConfig:
    heads = config.num_attention_heads
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        vocab_size=vocab_size,
        rms_norm_eps=config.rms_norm_eps,
        hidden_act=config.hidden_act,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=dict(config.rope_parameters),
    )
