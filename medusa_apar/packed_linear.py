"""Linear layers of a CPU model from weights that oneDNN has laid out once for small batches.

A forest has 2 to 64 rows, where the BLAS behind `F.linear` can be at its worst: SmolLM2's linear layers in float32 on
two Zen 3 cores take 88 ms for 4 rows and 115 for 16; laid out once, 41 and 82 (one row: 46 and 35). The dtype stays,
and so do the sums up to their order. It costs a second copy of the weights.
`python -m medusa_apar.eval.linear_layers` repeats the figures.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import psutil
import torch
from torch import nn
from torch.nn import functional as F

_ROWS_HINT = 16  # the layout is chosen for so many rows; it serves 1 to 64 well
_MOST_ROWS = 64  # beyond, as in a prefill, F.linear is as good
_MEMORY_SHARE = 0.25  # of what is free: a model for which a copy is no small matter keeps its own layout


class PackedLinears:
    """The packed weights of a model, made when first used and again when a weight has changed."""

    def __init__(self, model: nn.Module):
        self._layers = [m for m in model.modules() if isinstance(m, nn.Linear) and _packable(m)]
        self._packed: dict[nn.Linear, tuple[tuple[int, int], torch.Tensor]] = {}
        self._users = 0
        self._lock = threading.Lock()
        size = sum(layer.weight.numel() * layer.weight.element_size() for layer in self._layers)
        if size > _MEMORY_SHARE * psutil.virtual_memory().available:
            self._layers = []

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within the block the layers run from packed weights; when the last such block ends they are as before."""
        with self._lock:
            self._users += 1
            for layer in self._layers:
                if can_pack(layer.weight):  # the model may have moved since
                    layer.forward = partial(_linear, layer, self._pack(layer))  # type: ignore[method-assign]
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    for layer in self._layers:
                        vars(layer).pop("forward", None)

    def _pack(self, layer: nn.Linear) -> torch.Tensor:
        key = (layer.weight.data_ptr(), layer.weight._version)
        if layer not in self._packed or self._packed[layer][0] != key:
            self._packed[layer] = key, pack(layer.weight.detach())
        return self._packed[layer][1]


def can_pack(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or weight.is_inference() or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def pack(weight: torch.Tensor) -> torch.Tensor:
    """oneDNN's own layout of a [out, in] weight; only `packed_linear` can read it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)


def packed_linear(
    x: torch.Tensor, packed: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`F.linear(x, weight, bias)`, from the packed weight where the rows are few."""
    if x.numel() > _MOST_ROWS * x.shape[-1] or x.dtype != weight.dtype:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _packable(module: nn.Linear) -> bool:
    # An instance's own `forward` is somebody's hook (accelerate's offloading, say).
    return type(module) is nn.Linear and "forward" not in vars(module) and can_pack(module.weight)


def _linear(layer: nn.Linear, packed: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return packed_linear(x, packed, layer.weight, layer.bias)
