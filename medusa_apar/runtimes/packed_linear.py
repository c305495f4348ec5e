"""Linear layers of a CPU model from weights that oneDNN has laid out once for small batches.

A forest has 2 to 64 rows, where the BLAS behind `F.linear` can be at its worst: SmolLM2's linear layers in float32 on
two Zen 3 cores take 88 ms for 4 rows and 115 for 16; laid out once, 41 and 82 (one row: 46 and 35). The dtype stays,
and so do the sums up to their order. It costs a second copy of the weights.
`python -m medusa_apar.eval.linear_layers` repeats the figures.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import psutil
import torch
from torch import nn
from torch.nn import functional as F

from .cpu.weight_fingerprint import WeightFingerprint, plain

_ROWS_HINT = 16  # the layout is chosen for so many rows; it serves 1 to 64 well
_MAX_ROWS = 64  # beyond, as in a prefill, F.linear is as good
_MEMORY_SHARE = 0.25  # of what is free: a model for which a copy is no small matter keeps its own layout


class PackedLinears:
    """The packed weights of a model, made when first used and again when a weight has changed."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._packed: dict[nn.Linear, torch.Tensor] = {}
        self._fingerprint: WeightFingerprint | None = None  # None: the next call looks at every weight
        self._users = 0
        self._lock = threading.Lock()
        layers = self._layers()
        size = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
        self._fit = size <= _MEMORY_SHARE * psutil.virtual_memory().available

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within the block the layers run from packed weights; when the last such block ends they are as before."""
        with self._lock:
            self._users += 1
            layers = self._layers() if self._fit else []  # the model may have moved or got others since
            self._refill(layers)
            for layer in layers:
                layer.forward = partial(_linear, layer, self._packed[layer])  # type: ignore[method-assign]
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    _give_back(self._packed)

    def refresh(self) -> None:
        with self._lock:
            self._fingerprint = None

    def _layers(self) -> list[nn.Linear]:
        return [module for module in self._model.modules() if isinstance(module, nn.Linear) and _packable(module)]

    def _refill(self, layers: list[nn.Linear]) -> None:
        """Packs what has changed since the last call."""
        weights = [layer.weight for layer in layers]
        known = self._fingerprint is not None and self._fingerprint.matches(weights)
        if known and all(map(self._packed.__contains__, layers)):
            return
        _give_back(self._packed)
        self._packed, self._fingerprint = {}, WeightFingerprint(weights)  # the old copy goes before there is another
        self._packed = {layer: pack(layer.weight.detach()) for layer in layers}


def can_pack(weight: torch.Tensor) -> bool:
    if (
        not plain(weight)
        or weight.device.type != "cpu"
        or weight.is_inference()
        or not torch.backends.mkldnn.is_available()
    ):
        return False
    if weight.dtype == torch.bfloat16:
        supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return supported
    return weight.dtype == torch.float32


def pack(weight: torch.Tensor) -> torch.Tensor:
    """oneDNN's own layout of a [out, in] weight; only `packed_linear` can read it."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
    return packed


def packed_linear(
    x: torch.Tensor, packed: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`F.linear(x, weight, bias)`, from the packed weight where the rows are few."""
    if x.numel() > _MAX_ROWS * x.shape[-1] or x.dtype != weight.dtype:
        return F.linear(x, weight, bias)
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product


def _packable(module: nn.Linear) -> bool:
    # An instance's own `forward` is somebody's hook (accelerate's offloading, say).
    return (
        type(module) is nn.Linear and ("forward" not in vars(module) or _is_packed(module)) and can_pack(module.weight)
    )


def _give_back(layers: Iterable[nn.Linear]) -> None:
    for layer in layers:
        if _is_packed(layer):
            vars(layer).pop("forward", None)


def _is_packed(module: nn.Module) -> bool:
    """Whether a call of ours is running the layer, in this Python thread or another."""
    return getattr(vars(module).get("forward"), "func", None) is _linear


def _linear(layer: nn.Linear, packed: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or layer.weight.requires_grad):
        return F.linear(x, layer.weight, layer.bias)  # somebody's training step beside our call
    return packed_linear(x, packed, layer.weight, layer.bias)
