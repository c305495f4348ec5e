"""A model's weights in the layouts of compiled code, and whether the model still is what was packed."""

from __future__ import annotations

import threading
import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_apar.models.families import context_length

from . import library
from .library import floats
from .weight_fingerprint import WeightFingerprint
from .weights import PackedMatrix, interleaved, joined


def weights_of(model: PreTrainedModel) -> list[Tensor]:
    """All parameters and buffers; in one go over the modules, since every call asks."""
    found = (weight for m in model.modules() for store in (m._parameters, m._buffers) for weight in store.values())
    return list({id(weight): weight for weight in found if weight is not None}.values())


def _settings(model: Any) -> tuple:
    """What the forward pass depends on beside weights."""
    decoder = model.model
    layers = decoder.layers[: model.config.num_hidden_layers]
    windows = tuple(_window(layer) for layer in layers)
    return layers[0].self_attn.scaling, decoder.norm.variance_epsilon, decoder.rotary_emb.attention_scaling, windows


class Packs:
    """What is packed of a model, by kind: attached twice, it is packed once. No call of another model waits for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kinds: dict[str, PackedModel] = {}


_packs: weakref.WeakKeyDictionary[PreTrainedModel, Packs] = weakref.WeakKeyDictionary()
_lock = threading.Lock()  # of `_packs` itself


def packs_of(model: PreTrainedModel) -> Packs:
    with _lock:
        return _packs.setdefault(model, Packs())


class PackedModel:
    """A model's weights as compiled code reads them."""

    def __init__(self, model: Any, kind: str) -> None:
        config, decoder = model.config, model.model
        attention = decoder.layers[0].self_attn
        self.kind = kind
        # Before any of it is copied:
        self._settings, self._fingerprint = _settings(model), WeightFingerprint(weights_of(model))
        self.hidden, self.intermediate = config.hidden_size, config.intermediate_size
        self.eps = decoder.norm.variance_epsilon
        dim = attention.head_dim
        self.heads = library.Heads(config.num_attention_heads, config.num_key_value_heads, dim, attention.scaling)
        self.norm = _vector(decoder.norm)
        self.unembedding = PackedMatrix(
            model.get_output_embeddings().weight, kind, getattr(model.get_output_embeddings(), "bias", None)
        )
        table = decoder.embed_tokens.weight.detach().contiguous()
        self.table = table if table.dtype == torch.bfloat16 else table.float()
        self._context = context_length(model)
        self._rotary = decoder.rotary_emb
        self._table: tuple[Tensor, Tensor] | None = None
        self.layers = [_layer(layer, kind) for layer in decoder.layers[: config.num_hidden_layers]]

    def is_of(self, model: PreTrainedModel, entirely: bool) -> bool:
        """Whether the model still is what was packed."""
        return self._settings == _settings(model) and self._fingerprint.matches(weights_of(model), entirely)

    def rotary(self, needed: int) -> tuple[Tensor, Tensor]:
        """cos and sin float32 [positions, head_dim] of at least so many positions, from the model's own module."""
        table = self._table
        if table is None or len(table[0]) < needed:
            longest = 1 << max(needed - 1, 255).bit_length()
            if self._context is not None:  # beyond, some modules turn to other frequencies, for all positions
                longest = max(min(longest, self._context), needed)
            positions = torch.arange(longest, dtype=torch.int64, device="cpu")
            cos, sin = self._rotary(floats(0), positions[None])
            table = self._table = cos[0].float().contiguous(), sin[0].float().contiguous()
            assert cos.shape == sin.shape == (1, longest, self.heads.head_dim)
        return table


def _layer(layer: Any, kind: str) -> tuple[tuple[Tensor, Tensor], tuple[PackedMatrix, ...], int]:
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    norms = (_vector(layer.input_layernorm), _vector(layer.post_attention_layernorm))
    matrices = (
        PackedMatrix(torch.cat([p.weight.detach() for p in projections]), kind, joined(projections)),
        PackedMatrix(attention.o_proj.weight, kind),
        PackedMatrix(interleaved(mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()), kind),
        PackedMatrix(mlp.down_proj.weight, kind),
    )
    return norms, matrices, _window(layer)


def _window(layer: Any) -> int:
    """Last positions of its path that a layer sees, 0 for all."""
    window = getattr(layer.self_attn, "sliding_window", None)
    if window is None and type(layer).__name__ == "MistralDecoderLayer":
        window = getattr(layer.self_attn.config, "sliding_window", None)
    return window or 0


def _vector(norm: nn.Module) -> Tensor:
    return cast(Tensor, norm.weight).detach().float().contiguous()
