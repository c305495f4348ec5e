"""A name for the weights of a model, by which files made from them are told from those of other weights."""

from __future__ import annotations

import hashlib

from torch import nn


def fingerprint(model: nn.Module) -> str:
    """Names the weights, whatever folder they came from: a model tuned again in place does not find the old states."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(
            f"{name} {tuple(parameter.shape)} {parameter.dtype} {float(parameter.detach().double().sum())!r}".encode()
        )
    return digest.hexdigest()
