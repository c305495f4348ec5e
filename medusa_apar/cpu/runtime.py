"""A forward pass over a forest in compiled code, for models built like Llama, in float32, bfloat16 or int8 weights.

Activations and every sum of a float are float32, and so is the KV pool; with int8 weights it holds int16 steps, a scale
for each slot and KV head (`step_cache.h`). A row's logits depend on its path alone, bit by bit: not
on the other rows, the batch, the slots or what was drafted (DESIGN promises 1 and 5, without the usual "but for ties").
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_apar.checks import context_length
from medusa_apar.forest import Forest
from medusa_apar.kv_pool import KVPool

from . import library
from .weights import KINDS, PANEL, PackedMatrix, argmax, interleaved, joined

# Decoder layers that are Llama's: norm, rotary attention, norm, gated SiLU, both residual.
_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
_LINEARS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


def refusal(model: PreTrainedModel) -> str | None:
    """Why this runtime cannot run the model, in half a sentence; None where it can."""
    decoder = getattr(model, "model", None)
    layers = getattr(decoder, "layers", None)
    name = type(model).__name__
    if not layers or any(type(layer).__name__ not in _LAYERS for layer in layers):
        return f"{name} is not built like Llama"
    if model.device.type != "cpu":
        return f"the model is on {model.device}"
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"the model is in {str(model.dtype).removeprefix('torch.')}"
    if model.training:
        return "the model is in training mode"
    config = model.config
    if config.hidden_act != "silu" or getattr(config, "mlp_bias", False):
        return f"the MLP of {name} is not Llama's"
    attention = layers[0].self_attn
    sizes = (attention.head_dim % 32, config.hidden_size % PANEL, config.intermediate_size % PANEL)
    if any(sizes):
        return "its sizes are no multiples of 16 (heads of 32)"
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"a {type(module).__name__} of the model has hooks"
    linears = [layer.get_submodule(path) for layer in layers for path in _LINEARS]
    if any(type(linear) is not nn.Linear for linear in [*linears, model.get_output_embeddings()]):
        return "its linear layers are not torch's own"
    if any(layer.self_attn.o_proj.bias is not None for layer in layers):
        return "its attention output has a bias"
    try:
        library.library()
    except RuntimeError as error:
        return str(error)
    return None


# What is packed of a model, by kind: attached twice, it is packed once.
_packs: weakref.WeakKeyDictionary[PreTrainedModel, dict[str, tuple[Any, _Packed]]] = weakref.WeakKeyDictionary()
_packs_lock = threading.Lock()


class CpuRuntime:
    """Runs `model` from weights packed as `kind`: "float32", "bfloat16" or "int8".

    Weights that were changed in place are packed anew for the next call, unless the change went through `.data`, which
    torch does not count.

    `seconds` of a `profiled` one adds up the time of `library.PHASES`.
    """

    def __init__(self, model: PreTrainedModel, kind: str) -> None:
        if why := refusal(model):
            raise ValueError(f"the CPU runtime cannot run this model: {why}.")
        self.model, self.kind = model, kind
        self.profile = False
        self.seconds = library.Seconds()
        self._dtype = model.dtype
        self._packed: _Packed | None = None
        self._scratch: weakref.WeakKeyDictionary[KVPool, _Scratch] = weakref.WeakKeyDictionary()

    verify = most_nodes = None

    @property
    def description(self) -> str:
        return f"compiled code on cpu in {self.kind}"

    def pool(self, max_slots: int | None) -> KVPool:
        return KVPool(max_slots)

    @contextmanager
    def running(self) -> Iterator[None]:
        """ValueError where the model has become one that this runtime cannot run."""
        why = refusal(self.model)
        if why is None and self.model.dtype != self._dtype:
            why = f"it was in {str(self._dtype).removeprefix('torch.')}"
        if why:
            raise ValueError(f"the CPU runtime cannot run this model any more: {why}; attach it again.")
        key = tuple((p.data_ptr(), None if p.is_inference() else p._version) for p in self.model.parameters())
        with _packs_lock:
            kinds = _packs.setdefault(self.model, {})
            if self.kind not in kinds or kinds[self.kind][0] != key:
                kinds[self.kind] = key, _Packed(self.model, self.kind)
            self._packed = kinds[self.kind][1]
        yield

    @torch.no_grad()
    def forward(self, forest: Forest, pool: KVPool, taps: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """Of a forest's verified rows: logits float32 [M, vocab], good until the pool's next pass, and the hidden
        states [M, hidden * (1 + taps)] before the unembedding and, at unit scale, behind the tapped layers."""
        assert self._packed is not None, "enter `running` first"
        scratch = self._scratch.get(pool)
        if scratch is None:
            scratch = self._scratch[pool] = _Scratch(self._packed)
        packed = scratch.packed  # of one generate call, whatever happens to the weights meanwhile
        rows, verified = len(forest), len(forest.verified_rows)
        lists, runs, longest = forest.paths()
        cos, sin = packed.rotary(longest)  # a position is the length of the path before it
        indices = (forest.input_ids, forest.position_ids, forest.slots, forest.verified_rows)
        assert all(tensor.dtype == torch.int64 and tensor.is_contiguous() for tensor in indices)
        hidden = torch.empty(verified, packed.hidden * (1 + len(taps)))
        buffers = scratch.buffers(rows, verified)
        step = library.Step(
            *(rows, verified, len(taps), longest),
            *(tensor.data_ptr() for tensor in (forest.input_ids, cos, sin, forest.position_ids, forest.slots)),
            *(lists.ctypes.data, runs.ctypes.data, forest.verified_rows.data_ptr(), hidden.data_ptr()),
            *(tensor.data_ptr() for tensor in buffers),
            ctypes.addressof(self.seconds) if self.profile else None,
        )
        model = scratch.model(pool, taps)
        if library.library().mapar_step(model, step, torch.get_num_threads(), packed.unembedding.outputs):
            raise IndexError(f"a token is not one of the model's {len(packed.table)}")
        return buffers[0][:verified], hidden

    def step(
        self, forest: Forest, pool: KVPool, taps: tuple[int, ...], choice: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return *self.forward(forest, pool, taps), None

    def profiled(self) -> CpuRuntime:
        """Another runtime of the same packed weights, whose clocks run."""
        runtime = CpuRuntime(self.model, self.kind)
        runtime.profile = True
        return runtime

    def argmax(self, logits: Tensor) -> Tensor:
        return argmax(logits)


class _Packed:
    """A model's weights as compiled code reads them."""

    def __init__(self, model: Any, kind: str) -> None:
        config, decoder = model.config, model.model
        attention = decoder.layers[0].self_attn
        self.kind = kind
        self.hidden, self.intermediate = config.hidden_size, config.intermediate_size
        self.eps = decoder.norm.variance_epsilon
        dim = attention.head_dim
        self.heads = library.Heads(config.num_attention_heads, config.num_key_value_heads, dim, attention.scaling)
        self.norm = _vector(decoder.norm)
        self.unembedding = PackedMatrix(
            model.get_output_embeddings().weight, kind, getattr(model.get_output_embeddings(), "bias", None)
        )
        table = model.get_input_embeddings().weight.detach().contiguous()
        self.table = table if table.dtype == torch.bfloat16 else table.float()
        self._context = context_length(model)
        self._rotary = decoder.rotary_emb
        self._table: tuple[Tensor, Tensor] | None = None
        self.layers = [_layer(layer, kind) for layer in decoder.layers]

    def rotary(self, needed: int) -> tuple[Tensor, Tensor]:
        """cos and sin float32 [positions, head_dim] of at least so many positions, from the model's own module."""
        table = self._table
        if table is None or len(table[0]) < needed:
            longest = 1 << max(needed - 1, 255).bit_length()
            if self._context is not None:  # beyond, some modules turn to other frequencies, for all positions
                longest = max(min(longest, self._context), needed)
            cos, sin = self._rotary(torch.empty(0), torch.arange(longest)[None])
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
    window = getattr(attention, "sliding_window", None)
    if window is None and type(layer).__name__ == "MistralDecoderLayer":
        window = getattr(attention.config, "sliding_window", None)
    return norms, matrices, window or 0


def _vector(norm: nn.Module) -> Tensor:
    return cast(Tensor, norm.weight).detach().float().contiguous()


class _Scratch:
    """One pool's buffers; they grow and are used again."""

    def __init__(self, packed: _Packed) -> None:
        self.packed = packed
        self._model: tuple[Any, Any] = (None, None)  # capacity and taps, library.Model
        heads = packed.heads
        width = (heads.heads + 2 * heads.kv_heads) * heads.head_dim
        self._widths = max(width, packed.hidden), max(packed.intermediate, packed.hidden, width)
        self._vocabulary = packed.unembedding.outputs
        self._rows = self._verified = 0
        self._logits = torch.empty(0)
        self._others: tuple[Tensor, ...] = ()

    def buffers(self, rows: int, verified: int) -> tuple[Tensor, ...]:
        """logits, x, qkv, wide, act, act_scales of library.Step."""
        if verified > self._verified:
            self._verified = verified
            self._logits = torch.empty(verified, self._vocabulary)
        if rows > self._rows:
            self._rows = rows
            narrow, wide = (torch.empty(rows, width) for width in self._widths)
            x = torch.empty(rows, self.packed.hidden)
            self._others = x, narrow, wide, torch.empty(rows, self._widths[1] + 1), torch.empty(rows)
        return self._logits, *self._others

    def model(self, pool: KVPool, taps: tuple[int, ...]) -> Any:
        """library.Model; made anew when the pool has grown."""
        if self._model[0] != (pool.capacity, taps):
            self._fill(pool)
            packed = self.packed
            layers = (library.Layer * len(packed.layers))()
            for index, (norms, matrices, window) in enumerate(packed.layers):
                layers[index] = library.Layer(
                    *(norm.data_ptr() for norm in norms),
                    *(matrix.struct for matrix in matrices),
                    *(pool.keys[index].data_ptr(), pool.values[index].data_ptr()),
                    pool.scales[index].data_ptr() if pool.scales else None,
                    *(window, taps.index(index) if index in taps else -1),
                )
            model = library.Model(
                *(len(layers), packed.hidden, packed.intermediate, len(packed.table)),
                KINDS[str(packed.table.dtype).removeprefix("torch.")],
                *(packed.heads, packed.eps, packed.norm.data_ptr(), packed.table.data_ptr()),
                *(layers, packed.unembedding.struct),
            )
            self._model = (pool.capacity, taps), model
        return self._model[1]

    def _fill(self, pool: KVPool) -> None:
        """Gives a pool its tensors; one that grows later copies them."""
        heads, steps = self.packed.heads, self.packed.kind == "int8"
        shape = (pool.capacity, heads.kv_heads)
        for index in range(len(self.packed.layers)):
            if index not in pool.keys:
                for store in (pool.keys, pool.values):
                    store[index] = torch.zeros(*shape, heads.head_dim, dtype=torch.int16 if steps else torch.float32)
                if steps:
                    pool.scales[index] = torch.zeros(*shape, 2)
