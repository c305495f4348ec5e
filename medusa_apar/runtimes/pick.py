"""Which runtime runs a model's steps."""

from __future__ import annotations

import logging

import psutil
from transformers import PreTrainedModel

from .agreement import check_agrees
from .attention import pick_backend
from .cpu.runtime import CpuRuntime, missing_code, unknown_model, unsupported_reason
from .devices import device_of, gpus_of
from .runtime import Runtime
from .torch_runtime import TorchRuntime

logger = logging.getLogger(__name__)

RUNTIMES = ("auto", "torch", "cpu")
QUANTISED = ("int8",)
# How far logits may be off the model's own, as a share of the largest, before the model is taken for another kind.
# In torch low precision is not looked at: it may route a token to another expert.
_LARGEST_DIFFERENCE = {"float32": 1e-2, "bfloat16": 0.3, "int8": 0.3}
_MEMORY_SHARE = 0.25  # of what is free: "auto" makes no second copy of weights that are no small matter


def pick_runtime(
    model: PreTrainedModel, runtime: str, quantize: str | None, attention: str, cuda_graphs: bool | None = None
) -> Runtime:
    """ValueError, in one sentence, for what cannot be; every runtime has then shown that it agrees with the model."""
    if len(gpus := gpus_of(model)) > 1:
        raise ValueError(
            f"{type(model).__name__} lies on {len(gpus)} GPUs, and must lie on one here (device_map={{'': 0}}); vLLM "
            "serves models that need several."
        )
    backend = pick_backend(attention, model)
    graphs = backend == "triton" and device_of(model).type == "cuda" if cuda_graphs is None else cuda_graphs
    if graphs and backend != "triton":
        raise ValueError(f"cuda_graphs=True needs attention='triton', not {backend!r}.")
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime={runtime!r} is not one of {', '.join(map(repr, RUNTIMES))}.")
    if quantize not in (None, *QUANTISED):
        raise ValueError(f"quantize={quantize!r} is not one of None, {', '.join(map(repr, QUANTISED))}.")
    if quantize and runtime == "torch":
        raise ValueError(f"quantize={quantize!r} needs the CPU runtime, and runtime='torch' was asked for.")
    if runtime == "auto" and quantize is None and (attention != "auto" or not _fits_twice(model)):
        runtime = "torch"
    if runtime != "torch":
        why = unsupported_reason(model)
        if why is None:
            ours = CpuRuntime(model, quantize or str(model.dtype).removeprefix("torch."))
            try:
                check_agrees(model, ours, _LARGEST_DIFFERENCE[ours.facts.kind])
                return ours
            except ValueError as error:
                if runtime == "cpu" or quantize:
                    raise
                why = str(error)
        elif runtime == "cpu" or quantize:
            asked = f"quantize={quantize!r}" if quantize else "runtime='cpu'"
            raise ValueError(f"{asked} needs the CPU runtime, which cannot run this model: {why}.")
        if not gpus:
            # What the machine lacks its user can install, and would hardly guess.
            lacking = unknown_model(model) is None and missing_code() is not None
            level = logging.WARNING if lacking else logging.INFO
            logger.log(level, "%s runs in torch, since the CPU runtime cannot run it: %s.", type(model).__name__, why)
    plain = TorchRuntime(model, backend, graphs)
    largest = _LARGEST_DIFFERENCE["float32"] if plain.facts.kind == "float32" else None
    try:
        check_agrees(model, plain, largest)
    except ValueError as error:
        if attention != "auto" or backend == "sdpa":
            raise
        logger.info("%s attends with masks, since the kernels cannot serve it: %s", type(model).__name__, error)
        plain = TorchRuntime(model, "sdpa")
        check_agrees(model, plain, largest)
    return plain


def _fits_twice(model: PreTrainedModel) -> bool:
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    available: int = psutil.virtual_memory().available
    return size < _MEMORY_SHARE * available
