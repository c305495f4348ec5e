"""Which runtime runs a model's steps."""

from __future__ import annotations

import psutil
from transformers import PreTrainedModel

from .attention import pick_backend
from .cpu.runtime import CpuRuntime, refusal
from .decoder import check_agrees
from .torch_runtime import Runtime, TorchRuntime

RUNTIMES = ("auto", "torch", "cpu")
QUANTISED = ("int8",)
_MEMORY_SHARE = 0.25  # of what is free: "auto" makes no second copy of weights that are no small matter


def pick_runtime(model: PreTrainedModel, runtime: str, quantize: str | None, attention: str) -> Runtime:
    """ValueError, in one sentence, for what cannot be; every runtime has then shown that it agrees with the model."""
    backend = pick_backend(attention)
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime={runtime!r} is not one of {', '.join(map(repr, RUNTIMES))}.")
    if quantize not in (None, *QUANTISED):
        raise ValueError(f"quantize={quantize!r} is not one of None, {', '.join(map(repr, QUANTISED))}.")
    if quantize and runtime == "torch":
        raise ValueError(f"quantize={quantize!r} needs the CPU runtime, and runtime='torch' was asked for.")
    if runtime == "auto" and quantize is None and (attention != "auto" or not _fits_twice(model)):
        runtime = "torch"
    if runtime != "torch":
        why = refusal(model)
        if why is None:
            ours = CpuRuntime(model, quantize or str(model.dtype).removeprefix("torch."))
            check_agrees(model, ours)
            return ours
        if runtime == "cpu" or quantize:
            asked = f"quantize={quantize!r}" if quantize else "runtime='cpu'"
            raise ValueError(f"{asked} needs the CPU runtime, which cannot run this model: {why}.")
    plain = TorchRuntime(model, backend)
    check_agrees(model, plain)
    return plain


def _fits_twice(model: PreTrainedModel) -> bool:
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return size < _MEMORY_SHARE * psutil.virtual_memory().available
