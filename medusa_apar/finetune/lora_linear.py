"""LoRA's products in the frozen weights' dtype, as one node of the graph a layer.

peft casts every layer's input to the adapter's float32 and its output back, and keeps each of these for the backward
pass. Here the thin products run in the dtype of the frozen weights, and the input and the rank's activations alone are
kept. In float32 the results are peft's; in bfloat16 they are rounded as the frozen product is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor
from torch.nn import functional as F


class _LoraProduct(torch.autograd.Function):
    """x W^T + bias + scaling x A^T B^T for x [N, in], frozen W [out, in], trained A [rank, in] and B [out, rank]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        down, up = a.to(x.dtype), b.to(x.dtype)
        inner = x @ down.T
        out = F.linear(x, weight, bias)
        out.addmm_(inner, up.T, alpha=scaling)
        ctx.save_for_backward(x, weight, inner, down, up)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight, inner, down, up = ctx.saved_tensors
        through = ctx.scaling * (gradient @ up)  # [N, rank]
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ weight).addmm_(through, down)
        of_a = (through.T @ x).float()
        of_b = ctx.scaling * (gradient.T @ inner).float()
        return of_x, None, None, of_a, of_b, None


_frozen_alone: ContextVar[bool] = ContextVar("frozen_alone", default=False)


@contextmanager
def lean_lora(tuned: PeftModel) -> Iterator[None]:
    """Within it, the plain LoRA layers of a model run so; others, with dropout or DoRA say, as peft has them."""
    layers: list[Any] = [module for module in tuned.modules() if isinstance(module, LoraLayer)]
    before = [vars(layer).get("forward") for layer in layers]  # a hook's, say
    for layer in layers:
        layer.forward = _switched(layer, _forward(layer) if _plain(layer) else layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


@contextmanager
def frozen_alone(tuned: PeftModel) -> Iterator[None]:
    """Within it, LoRA layers are their frozen weights, in this thread alone; RuntimeError outside `lean_lora`."""
    if not all("forward" in vars(module) for module in tuned.modules() if isinstance(module, LoraLayer)):
        raise RuntimeError("frozen_alone() works within lean_lora() alone.")
    token = _frozen_alone.set(True)
    try:
        yield
    finally:
        _frozen_alone.reset(token)


def _switched(layer: Any, tuned: Any) -> Any:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = (layer.base_layer if _frozen_alone.get() else tuned)(x, *args, **kwargs)
        return out

    return forward


def _forward(layer: Linear) -> Any:
    (name,) = layer.active_adapters
    base, a, b = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
    scaling = layer.scaling[name]

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if layer.disable_adapters:
            frozen: Tensor = base(x)
            return frozen
        flat = x.reshape(-1, x.shape[-1])
        out: Tensor = _LoraProduct.apply(flat, base.weight, base.bias, a, b, scaling)
        return out.view(*x.shape[:-1], -1)

    return forward


def _plain(module: Any) -> bool:
    """Whether a layer is LoRA over a `nn.Linear` and nothing else, with one adapter."""
    if type(module) is not Linear or type(module.base_layer) is not torch.nn.Linear or module.merged:
        return False
    names = module.active_adapters
    return len(names) == 1 and all(
        isinstance(module.lora_dropout[name], torch.nn.Identity)
        and not module.lora_bias.get(name, False)
        and not module.lora_variant.get(name)
        for name in names
    )
