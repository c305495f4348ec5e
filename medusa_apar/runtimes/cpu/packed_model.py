"""A model's weights in the layouts of compiled code, and whether the model still is what was packed."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_apar.models.families import context_length

from . import library
from .layers import Family, LayerNumbers, LayerParts, family_of, layers_of, numbers_of, rotary_kinds
from .library import floats
from .weight_fingerprint import WeightFingerprint
from .weights import PackedMatrix, Source, interleaved, joined


def weights_of(model: PreTrainedModel) -> list[Tensor]:
    """All parameters and buffers; in one go over the modules, since every call asks."""
    found = (weight for m in model.modules() for store in (m._parameters, m._buffers) for weight in store.values())
    return list({id(weight): weight for weight in found if weight is not None}.values())


class Packs:
    """What is packed of a model, by kind: attached twice, it is packed once. No call of another model waits for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kinds: dict[str, PackedModel] = {}
        self.make: Callable[[str], PackedModel] | None = None  # while the model is loaded: see `pack_files.loading`


_packs: weakref.WeakKeyDictionary[PreTrainedModel, Packs] = weakref.WeakKeyDictionary()
_lock = threading.Lock()  # of `_packs` itself


def packs_of(model: PreTrainedModel) -> Packs:
    with _lock:
        return _packs.setdefault(model, Packs())


class PackedLayer(NamedTuple):
    """float32 norms, None where a family has none, and matrices as step.cpp's Layer has them."""

    norms: tuple[Tensor | None, ...]  # before attention, behind it, before the MLP, behind it; of queries, of keys
    matrices: tuple[PackedMatrix, ...]  # queries, keys and values; attention's output; gate and up by turns; down
    numbers: LayerNumbers


PARTS = ("qkv", "output", "gate_up", "down")  # a layer's matrices, as step.cpp's Layer has them


def matrices_of(model: Any, family: Family) -> dict[str, Source]:
    """Every matrix of a step by its name, "unembedding" or "layers.3.qkv", none of which is made before it is asked
    for. What they hold depends on nothing but weights, `config` and this code: `pack_files.py` names packs by these."""
    found: dict[str, Source] = {"unembedding": partial(_plain, model.get_output_embeddings())}
    for index, parts in enumerate(layers_of(model, family)):
        made = (partial(_qkv, parts), partial(_plain, parts.output), partial(_gate_up, parts))
        for name, source in zip(PARTS, (*made, partial(_plain, parts.down)), strict=True):
            found[f"layers.{index}.{name}"] = source
    return found


def _plain(linear: Any) -> tuple[Tensor, Tensor | None]:
    return linear.weight, getattr(linear, "bias", None)


def _qkv(parts: LayerParts) -> tuple[Tensor, Tensor | None]:
    return torch.cat([linear.weight.detach() for linear in parts.qkv]), joined(parts.qkv)


def _gate_up(parts: LayerParts) -> tuple[Tensor, Tensor | None]:
    gate_up = [linear.weight.detach() for linear in parts.gate_up]
    gate, up = gate_up if len(gate_up) == 2 else gate_up[0].chunk(2)
    bias = joined(parts.gate_up)
    if bias is not None:
        bias = interleaved(*bias[:, None].chunk(2))[:, 0]
    return interleaved(gate, up), bias


class PackedModel:
    """A model's weights as compiled code reads them.

    matrix: gives one by its name and its source, where it is not just packed.
    fingerprint: of the weights as they were before any of them was read.
    """

    def __init__(
        self,
        model: Any,
        kind: str,
        matrix: Callable[[str, Source], PackedMatrix] | None = None,
        fingerprint: WeightFingerprint | None = None,
    ) -> None:
        family = family_of(model)
        assert family is not None
        config, decoder = model.config, model.model
        self.kind = kind
        # Before any of it is copied:
        self.numbers, self._fingerprint = numbers_of(model, family), fingerprint or WeightFingerprint(weights_of(model))
        self.hidden, self.intermediate = config.hidden_size, config.intermediate_size
        self.heads = library.Heads(
            *(config.num_attention_heads, config.num_key_value_heads, decoder.layers[0].self_attn.head_dim),
            *(self.numbers.scale, self.numbers.score_cap),
        )
        self._centred = family.centred
        self.norm = self._vector(decoder.norm)
        matrices = {
            name: PackedMatrix.of(source, kind) if matrix is None else matrix(name, source)
            for name, source in matrices_of(model, family).items()
        }
        self.unembedding = matrices["unembedding"]
        table = decoder.embed_tokens.weight.detach().contiguous()
        self.table = table if table.dtype == torch.bfloat16 else table.float()
        self._context = context_length(model)
        self._rotary = decoder.rotary_emb
        self.rotary_kinds = rotary_kinds(self._rotary)
        self.turned = 2 * len(getattr(self._rotary, f"{self.rotary_kinds[0]}inv_freq"))
        self._tables: list[tuple[Tensor, Tensor]] = []
        self.layers = [
            PackedLayer(self._norms(parts), tuple(matrices[f"layers.{index}.{part}"] for part in PARTS), numbers)
            for index, (parts, numbers) in enumerate(zip(layers_of(model, family), self.numbers.layers, strict=True))
        ]

    @property
    def whole_norms(self) -> bool:
        """Whether norms of queries and keys are of all heads at once."""
        norm = self.layers[0].norms[4]
        return norm is not None and len(norm) != self.heads.head_dim

    def is_of(self, model: Any, entirely: bool) -> bool:
        """Whether the model still is what was packed."""
        family = family_of(model)
        if family is None or self.numbers != numbers_of(model, family):
            return False
        return self._fingerprint.matches(weights_of(model), entirely)

    def rotary(self, needed: int) -> list[tuple[Tensor, Tensor]]:
        """For each of `rotary_kinds` cos and sin, float32 [positions, turned] of at least so many positions, from the
        model's own module."""
        tables = self._tables
        if not tables or len(tables[0][0]) < needed:
            longest = 1 << max(needed - 1, 255).bit_length()
            if self._context is not None:  # beyond, some modules turn to other frequencies, for all positions
                longest = max(min(longest, self._context), needed)
            positions = torch.arange(longest, dtype=torch.int64, device="cpu")
            kinds = [[kind.removesuffix("_")] if kind else [] for kind in self.rotary_kinds]
            made = [self._rotary(floats(0), positions[None], *kind) for kind in kinds]
            assert all(table.shape == (1, longest, self.turned) for pair in made for table in pair)
            # What is returned is this call's own: another request may be asking for fewer positions.
            tables = self._tables = [(cos[0].float().contiguous(), sin[0].float().contiguous()) for cos, sin in made]
        return tables

    def _norms(self, parts: LayerParts) -> tuple[Tensor | None, ...]:
        norms = (*parts.norms, *(parts.path_norms or (None, None)))
        return tuple(None if norm is None else self._vector(norm) for norm in norms)

    def _vector(self, norm: nn.Module) -> Tensor:
        weight = cast(Tensor, norm.weight).detach().float().contiguous()
        return weight + 1 if self._centred else weight
