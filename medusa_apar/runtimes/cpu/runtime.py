"""A forward pass over a forest in compiled code, for the families of `layers.py`, in float32, bfloat16 or int8 weights.

Sums of floats are float32, and so is the KV pool. With bfloat16 weights activations are rounded to bfloat16 where they
meet a matrix (`bf16.h`). With int8 weights they are int8 steps there (`int8.h`), and the pool holds int16 steps, with a
scale for each slot and KV head (`step_cache.h`). A row's logits depend on its path alone, bit by bit: not on the other
rows, the batch, the slots or what was drafted (CONTRIBUTING, promises 1 and 5, without the usual "but for ties").
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_apar.drafting.drafter import AttendingDrafter, Drafter, Heads, Reads
from medusa_apar.forest.forest import Forest
from medusa_apar.kv.pool import KVPool
from medusa_apar.runtimes.draft_layers import extend
from medusa_apar.runtimes.runtime import NOTHING, RuntimeFacts
from medusa_apar.verify.recipe import Chooser
from medusa_apar.verify.tail import StepOutput, Tail

from . import known, library
from .choosing import CompiledChooser
from .library import address, floats
from .packed_model import PackedModel, packs_of, weights_of
from .weights import GROUP_INPUTS, KINDS, argmax, top_of_rows, up


def unsupported_reason(model: PreTrainedModel) -> str | None:
    """Why this runtime cannot run the model, in half a sentence; None where it can."""
    return unknown_model(model) or missing_code()


def unknown_model(model: PreTrainedModel) -> str | None:
    """Why no machine's compiled code could run the model; None where it could."""
    return _unsupported_now(model) or known.odd_shape(model)


def missing_code() -> str | None:
    """Why this machine has no compiled code; None where it has."""
    missing = library.outcome()
    return missing if isinstance(missing, str) else None


def _unsupported_now(model: PreTrainedModel) -> str | None:
    """Those checks of `unsupported_reason` whose outcome can change while the weights stay; every call makes them."""
    if why := known.unknown_part(model):
        return why
    if model.training:
        return "the model is in training mode"
    if why := known.odd_scale(model):
        return why
    weights = weights_of(model)
    if any(type(weight) not in (Tensor, nn.Parameter) for weight in weights):
        return "its weights are quantised"
    if away := next((weight.device for weight in weights if weight.device.type != "cpu"), None):
        return "its weights are offloaded" if away.type == "meta" else f"the model is on {away}"
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"the model is in {str(model.dtype).removeprefix('torch.')}"
    return None


class CpuRuntime:
    """Runs `model` from weights packed as `kind`: "float32", "bfloat16" or "int8".

    Weights that were changed are packed anew for the next call: `medusa_apar.runtimes.cpu.weight_fingerprint` says how
    that is noticed.

    `seconds` of a `profiled` one adds up the time of `library.PHASES`.
    """

    def __init__(self, model: PreTrainedModel, kind: str) -> None:
        if why := unsupported_reason(model):
            raise ValueError(f"the CPU runtime cannot run this model: {why}.")
        self.model, self.facts = model, RuntimeFacts(kind, "cpu", build=library.build())
        self.profile = False
        self.seconds = library.Seconds()
        self._dtype = model.dtype
        self._packed: PackedModel | None = None  # written by `session`, and kept: a call may be about to read it
        self._entirely = True  # whether the next call looks at every weight
        self._scratch: weakref.WeakKeyDictionary[KVPool, _Scratch] = weakref.WeakKeyDictionary()

    verify = None

    @property
    def description(self) -> str:
        return f"compiled code on cpu in {self.facts.kind}"

    def pool(self, max_slots: int | None) -> KVPool:
        return KVPool(max_slots)

    def unsupported_reason(self) -> str | None:
        """Why this runtime cannot run what the model has become; None where it can."""
        why = _unsupported_now(self.model)
        if why is None and self.model.dtype != self._dtype:
            why = f"it was in {str(self._dtype).removeprefix('torch.')}"
        return why

    def refresh(self) -> None:
        packs = packs_of(self.model)
        with packs.lock:
            packs.kinds.clear()
            self._entirely = True

    def weights(self) -> object:
        return self._packed

    def drafter(self, heads: Heads) -> Drafter | AttendingDrafter:
        return heads.drafter(packing=self.facts.kind)

    @contextmanager
    def session(self, checked: bool = False) -> Iterator[None]:
        """ValueError where the model has become one that this runtime cannot run."""
        why = None if checked else self.unsupported_reason()
        packs = packs_of(self.model)
        with packs.lock:
            packed = packs.kinds.get(self.facts.kind)
            if why is None and (packed is None or not packed.is_of(self.model, self._entirely)):
                why = unsupported_reason(self.model)
                if why is None:
                    make = packs.make or partial(PackedModel, self.model)
                    packed = packs.kinds[self.facts.kind] = make(self.facts.kind)
            if why is None:
                self._packed, self._entirely = packed, False
                # A pool that no live thread needs is between two calls, or an engine's that was idle: it begins anew.
                for pool in [pool for pool in self._scratch if not pool.live]:
                    del self._scratch[pool]
        if why is not None:
            raise ValueError(f"the CPU runtime cannot run this model any more: {why}; attach it again.")
        yield

    @torch.no_grad()
    def forward(self, forest: Forest, pool: KVPool, reads: Reads = NOTHING) -> tuple[Tensor, Tensor]:
        """Runs a forest. Returns, for verified rows, logits float32 [M, vocab], good until the pool's next pass, and
        hidden states [M, hidden * (1 + aux layers)]: before the unembedding, then each aux layer's at unit scale. All
        rows go on through `reads.layers`."""
        assert self._packed is not None, "enter `session` first"
        aux_layers, layers = reads.aux_layers, reads.layers
        boundaries = () if layers is None else tuple(dict.fromkeys(layers.boundaries))
        scratch = self._scratch.get(pool)
        if scratch is None:
            scratch = self._scratch[pool] = _Scratch(self._packed)
        packed = scratch.packed  # of one session, whatever happens to the weights meanwhile
        rows, verified = len(forest), len(forest.verified_rows)
        lists, runs, longest = forest.paths()
        tables = packed.rotary(longest)  # a position is the length of the path before it
        hidden = floats(verified, packed.hidden * (1 + len(aux_layers)))
        states = floats(rows, len(boundaries) * packed.hidden)
        buffers, sizes = scratch.buffers(rows, verified), scratch.sizes(rows, verified)
        turns = (
            tuple(address(table, torch.float32, longest * packed.turned) for table in each)
            for each in zip(*tables, strict=True)
        )
        indices = (address(each, torch.int64, rows) for each in (forest.position_ids, forest.slots))
        arrays = (torch.from_numpy(array) for array in (lists, runs))
        step = library.Step(
            *(rows, verified, len(aux_layers), len(boundaries), longest),
            address(forest.input_ids, torch.int64, rows),
            *((ctypes.c_void_p * library.TABLES)(*turn) for turn in turns),
            *indices,
            *(address(array, torch.int32, array.numel()) for array in arrays),
            address(forest.verified_rows, torch.int64, verified),
            address(hidden, torch.float32, verified * packed.hidden * (1 + len(aux_layers))),
            address(states, torch.float32, rows * len(boundaries) * packed.hidden),
            *(address(buffer, torch.float32, size) for buffer, size in zip(buffers, sizes, strict=True)),
            ctypes.addressof(self.seconds) if self.profile else None,
        )
        model = scratch.model(pool, aux_layers, boundaries)
        if library.library().mapar_step(model, step, torch.get_num_threads(), packed.unembedding.outputs):
            raise IndexError(f"a token is not one of the model's {len(packed.table)}")
        if layers is not None:
            if boundaries != layers.boundaries:  # one is fused twice
                places = [boundaries.index(boundary) for boundary in layers.boundaries]
                states = states.view(rows, len(boundaries), -1)[:, places].flatten(1)
            extend(layers, states, forest, pool, len(packed.layers))
        return buffers[0][:verified], hidden

    def step(self, forest: Forest, pool: KVPool, reads: Reads, tail: Tail | None) -> StepOutput:
        return StepOutput(*self.forward(forest, pool, reads))

    def profiled(self) -> CpuRuntime:
        """Another runtime of the same packed weights, whose clocks run."""
        runtime = CpuRuntime(self.model, self.facts.kind)
        runtime.profile = True
        return runtime

    def argmax(self, logits: Tensor) -> Tensor:
        return argmax(logits)

    def top(self, logits: Tensor, rows: np.ndarray, count: int) -> tuple[Tensor, Tensor]:
        assert rows.min() >= 0 and rows.max() < len(logits)
        values, ids, _ = top_of_rows(logits, torch.from_numpy(rows), count, summed=False)
        return ids, values

    @property
    def chooser(self) -> Chooser:
        return CompiledChooser()


def _place(number: int, among: tuple[int, ...]) -> int:
    return among.index(number) if number in among else -1


class _Scratch:
    """One pool's buffers; they grow and are used again."""

    def __init__(self, packed: PackedModel) -> None:
        self.packed = packed
        self._model: tuple[Any, Any] = (None, None)  # capacity, aux_layers and boundaries, library.Model
        heads = packed.heads
        width = (heads.heads + 2 * heads.kv_heads) * heads.head_dim
        self._widths = max(width, packed.hidden), max(packed.intermediate, packed.hidden, width)
        self._vocabulary = packed.unembedding.outputs
        self._rows = self._verified = 0
        self._logits = floats(0)
        self._others: tuple[Tensor, ...] = ()

    def sizes(self, rows: int, verified: int) -> tuple[int, ...]:
        """How many floats each of `buffers` has at least."""
        narrow, wide = self._widths
        padded = up(wide, GROUP_INPUTS)
        return (
            *(verified * self._vocabulary, rows * self.packed.hidden, rows * narrow),
            *(rows * wide, rows * padded, 2 * rows * padded // GROUP_INPUTS),
        )

    def buffers(self, rows: int, verified: int) -> tuple[Tensor, ...]:
        """logits, x, qkv, wide, and the bytes of steps and groups, of library.Step."""
        if verified > self._verified:
            self._verified = verified
            self._logits = floats(verified, self._vocabulary)
        if rows > self._rows:
            self._rows = rows
            self._others = tuple(floats(size) for size in self.sizes(rows, verified)[1:])
        return self._logits, *self._others

    def model(self, pool: KVPool, aux_layers: tuple[int, ...], boundaries: tuple[int, ...]) -> Any:
        """library.Model; made anew when the pool has grown."""
        if self._model[0] != (pool.capacity, aux_layers, boundaries):
            self._fill(pool)
            packed, heads = self.packed, self.packed.heads
            steps = packed.kind == "int8"
            stored, size = torch.int16 if steps else torch.float32, pool.capacity * heads.kv_heads
            layers = (library.Layer * len(packed.layers))()
            for index, layer in enumerate(packed.layers):
                stores = (pool.keys[index], pool.values[index])
                norms = (None if norm is None else address(norm, torch.float32, len(norm)) for norm in layer.norms)
                rotary = layer.numbers.rotary
                layers[index] = library.Layer(
                    *norms,
                    *(matrix.struct for matrix in layer.matrices),
                    *(address(store, stored, size * heads.head_dim) for store in stores),
                    address(pool.scales[index], torch.float32, size * 2) if steps else None,
                    *(layer.numbers.window, _place(index, aux_layers), _place(index + 1, boundaries)),
                    -1 if rotary is None else packed.rotary_kinds.index(rotary),
                )
            table, numbers = packed.table, packed.numbers
            model = library.Model(
                *(len(layers), packed.hidden, packed.intermediate, len(table)),
                *(KINDS[str(table.dtype).removeprefix("torch.")], packed.turned, packed.whole_norms),
                *(numbers.activation == "gelu", heads, numbers.eps, numbers.embedding_scale, numbers.residual_scale),
                *(numbers.logit_scale, numbers.logit_cap, address(packed.norm, torch.float32, packed.hidden)),
                *(address(table, table.dtype, table.numel()), layers, packed.unembedding.struct),
            )
            self._model = (pool.capacity, aux_layers, boundaries), model
        return self._model[1]

    def _fill(self, pool: KVPool) -> None:
        """Gives a pool its tensors; one that grows later copies them."""
        heads, steps = self.packed.heads, self.packed.kind == "int8"
        shape = (pool.capacity, heads.kv_heads)
        for index in range(len(self.packed.layers)):
            if index not in pool.keys:
                stored = torch.int16 if steps else torch.float32
                for store in (pool.keys, pool.values):
                    store[index] = torch.zeros(*shape, heads.head_dim, dtype=stored, device="cpu")
                if steps:
                    pool.scales[index] = floats(*shape, 2).zero_()
