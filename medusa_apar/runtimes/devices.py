"""Which devices a model lies on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def device_of(model: Any) -> torch.device:
    """Where a model takes its inputs: weights that accelerate keeps on disk are on no device, and run on one."""
    run_on = getattr(getattr(model.get_input_embeddings(), "_hf_hook", None), "execution_device", None)
    if run_on is not None:
        return torch.device("cuda", run_on) if isinstance(run_on, int) else torch.device(run_on)
    return next((weight.device for weight in model.parameters() if weight.device.type != "meta"), torch.device("cpu"))


def gpus_of(model: nn.Module) -> set[torch.device]:
    return {weight.device for weight in model.parameters() if weight.device.type == "cuda"}
