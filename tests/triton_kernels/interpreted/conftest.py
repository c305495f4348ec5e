"""Kernels under Triton's interpreter: the folder is collected only where TRITON_INTERPRET was set before the start.

A plain run of the suite runs it in a process of its own (tests/triton_kernels/test_interpreted.py).
"""

import os
import random

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture
def shuffled_programs(monkeypatch):
    """Call it with a seed: the programs of each launch then run in another order than that of their ids."""
    from triton.runtime.interpreter import interpreter_builder

    order: list[tuple[int, int, int]] = []
    seed = 0
    set_dim, set_index = interpreter_builder.set_grid_dim, interpreter_builder.set_grid_idx

    def start_launch(*dims):
        set_dim(*dims)
        order[:] = [(x, y, z) for x in range(dims[0]) for y in range(dims[1]) for z in range(dims[2])]
        random.Random(seed).shuffle(order)

    def shuffle(new_seed):
        nonlocal seed
        seed = new_seed
        monkeypatch.setattr(interpreter_builder, "set_grid_dim", start_launch)
        monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda *index: set_index(*order.pop()))

    return shuffle
