"""Processes that train together under `accelerate launch`."""

from __future__ import annotations

import os
from pathlib import Path

from accelerate import Accelerator


def accelerator(folder: Path) -> Accelerator:
    """This process's part in a launch, or that of one alone.

    folder: where all of them write. ValueError where several were started that know nothing of each other.
    """
    found = Accelerator()
    if (started := int(os.environ.get("WORLD_SIZE") or 1)) > 1 and found.num_processes == 1:
        raise ValueError(
            f"{started} processes were started, but each would train alone into {folder}: "
            "set ACCELERATE_USE_CPU=true to train together on a CPU."
        )
    return found
