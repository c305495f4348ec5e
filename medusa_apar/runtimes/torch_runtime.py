"""A forward pass over a forest through transformers' own modules: any model, any device."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from medusa_apar.drafting.drafter import AttendingDrafter, Drafter, Heads, Reads
from medusa_apar.forest.forest import Forest
from medusa_apar.kv.pool import KVPool
from medusa_apar.triton_kernels.layout import MAX_NODES
from medusa_apar.verify.tail import StepOutput, Tail

from .attention import current_forest, forest_attention
from .capture import Captured, Kept
from .devices import device_of
from .draft_layers import extend
from .model_state import ModelState
from .packed_linear import PackedLinears
from .runtime import NOTHING, RuntimeFacts

if TYPE_CHECKING:
    from .cuda_graphs import StaticForest


class TorchRuntime:
    """`backend` is an attention backend's name; on a CPU linear layers run from packed weights.

    graphs: small forests run as CUDA graphs, which the backend "triton" alone can be captured in.
    """

    def __init__(self, model: PreTrainedModel, backend: str, graphs: bool = False) -> None:
        kernels = backend == "triton"
        kind = str(model.dtype).removeprefix("torch.")
        self.model, self.facts = model, RuntimeFacts(kind, backend, graphs, MAX_NODES if kernels else None, kernels)
        self._packed = PackedLinears(model)
        self._state: ModelState | None = None  # of the model, where somebody has asked
        self._write = self.verify = self.chooser = None
        if kernels:
            from medusa_apar.triton_kernels.store import store_kv
            from medusa_apar.triton_kernels.verify import verify

            self._write, self.verify = store_kv, verify
        self._graphed = None
        if graphs:
            from .cuda_graphs import GraphedSteps

            self._graphed = GraphedSteps(self._forward, device_of(model))
        taken = inspect.signature(model.forward).parameters
        self._num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
        self._compiled = False  # whether torch.compile has compiled it; written by `session`
        self._keeps_logits = "logits_to_keep" in taken
        self._cache = "cache" if "cache" in taken else "past_key_values"  # its name from transformers 5.24 on

    @property
    def description(self) -> str:
        kernels = " with Triton kernels" if self.facts.backend == "triton" else ""
        return f"torch{kernels} on {device_of(self.model).type} in {self.facts.kind}"

    @contextmanager
    def session(self, checked: bool = False) -> Iterator[None]:
        # Triton launches on the current device, wherever its arguments lie.
        device = device_of(self.model)
        on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        self._compiled = any(_is_compiled(module) for module in self.model.modules())
        with on_device, forest_attention(self.model, self.facts.backend), self._packed.in_use():
            yield

    def unsupported_reason(self) -> str | None:
        return None

    def refresh(self) -> None:
        self._packed.refresh()
        self._state = None

    def weights(self) -> object:
        if self._state is None or not self._state.is_of(self.model):
            self._state = ModelState(self.model)
        return self._state

    def drafter(self, heads: Heads) -> Drafter | AttendingDrafter:
        return heads.drafter(kernels=self.facts.backend == "triton")

    def pool(self, max_slots: int | None) -> KVPool:
        if self._graphed is None:
            return KVPool(max_slots)
        return self._graphed.pool(max_slots, tuple((p.data_ptr(), p.dtype) for p in self.model.parameters()))

    def forward(self, forest: Forest, pool: KVPool, reads: Reads = NOTHING) -> tuple[Tensor, Tensor]:
        return self.step(forest, pool, reads, None)[:2]

    def step(self, forest: Forest, pool: KVPool, reads: Reads, tail: Tail | None) -> StepOutput:
        device = None if tail is None else tail.device
        captured = device if device is None or device.operations is not None else None
        output, kept = None, Kept(reads.aux_layers, reads.boundaries)
        if self._graphed is not None:
            output = self._graphed(forest, pool, kept, captured)
        if output is None:
            logits, hidden, states = self._forward(forest, pool, kept)
            output = StepOutput(logits, hidden, states=states)
        if reads.layers is not None and output.states is not None:  # behind a graph: it is a small part of a step
            pool.write = self._write
            extend(reads.layers, output.states, forest, pool, self._num_layers)
            output = output._replace(states=None)
        if device is None or output.chosen is not None:
            return output
        inputs = device.inputs()
        if output.logits.is_cuda:
            inputs = inputs.pin_memory().to(output.logits.device, non_blocking=True)
        return output._replace(chosen=device.run(output.logits, output.hidden, inputs))

    def _forward(self, forest: Forest | StaticForest, pool: KVPool, kept: Kept) -> tuple[Tensor, Tensor, Tensor | None]:
        pool.slots, pool.write = forest.slots, self._write
        keep = {"logits_to_keep": forest.verified_rows} if self._keeps_logits else {}
        eager = _eager() if self._compiled else nullcontext()
        with eager, current_forest(forest), Captured(self.model, kept.aux_layers, kept.boundaries) as captured:
            logits = self.model(
                input_ids=forest.input_ids,
                position_ids=forest.position_ids,
                **{self._cache: pool},
                use_cache=True,
                return_dict=True,
                **keep,
            ).logits[0]
        if not keep:
            logits = logits[forest.verified_rows]
        states = captured.boundary_states() if kept.boundaries else None
        return logits, captured.hidden_states(forest.verified_rows, kept=bool(keep)), states

    def argmax(self, logits: Tensor) -> Tensor:
        return logits.argmax(dim=-1)

    def top(self, logits: Tensor, rows: np.ndarray, count: int) -> tuple[Tensor, Tensor]:
        some = logits if len(rows) == len(logits) else logits[torch.from_numpy(rows).to(logits.device)]
        values, ids = some.topk(count)
        return ids, values.float()


_compiled_passes = 0  # under way, of models that torch.compile has compiled
_compiled_lock = threading.Lock()
_stance: Any = None


@contextmanager
def _eager() -> Iterator[None]:
    """Within the block a model that torch.compile has compiled runs without that: it would compile anew for every
    forest, and cannot compile attention over one. So do other Python threads' models, as torch has one stance."""
    global _compiled_passes, _stance
    with _compiled_lock:
        if not _compiled_passes:
            _stance = torch.compiler.set_stance("force_eager")
        _compiled_passes += 1
    try:
        yield
    finally:
        with _compiled_lock:
            _compiled_passes -= 1
            if not _compiled_passes:
                _stance.__exit__(None, None, None)


def _is_compiled(module: torch.nn.Module) -> bool:
    forward = vars(module).get("forward")
    return module._compiled_call_impl is not None or hasattr(forward, "_torchdynamo_orig_callable")
