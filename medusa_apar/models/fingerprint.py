"""Names by which files that were made from a model are told from those that were made from another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from torch import nn


def fingerprint(model: nn.Module) -> str:
    """Names the weights, whatever folder they came from: a model tuned again in place does not find the old states."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(
            f"{name} {tuple(parameter.shape)} {parameter.dtype} {float(parameter.detach().double().sum())!r}".encode()
        )
    return digest.hexdigest()


def files_at(path: str | Path) -> list[str]:
    """A line for each file in a folder, or for the file at this place: its name, its size, and when it was written.

    They tell files from others that lay there before, and read none of them. Nothing where no file is.
    """
    path = Path(path)
    files = [file for file in (sorted(path.iterdir()) if path.is_dir() else [path]) if file.is_file()]
    return [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]


def name_of(parts: Iterable[str]) -> str:
    """16 hex digits for what these lines say something is made from."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
