"""A step's forest onto the device: the kernel against its twin, over forests that fork, draft and settle."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medusa_apar.forest.device_tables import PackedForest
from medusa_apar.kv.path_table import PathTable
from medusa_apar.triton_kernels import pack, reference
from medusa_apar.triton_kernels.layout import MAX_NODES, MAX_WINDOWS, Sizes
from medusa_apar.triton_kernels.reference import Descriptor, Packed
from tests.support.random_requests import Script

CPU = torch.device("cpu")


def results(function, descriptor: Descriptor, table: torch.Tensor) -> list[torch.Tensor]:
    """What it writes, over garbage, into a table that is a copy."""
    width, table = descriptor.rows.shape[1], table.clone()
    packed = Packed(
        torch.full((4, width), -7),
        torch.full((4, width), -7, dtype=torch.int32),
        torch.full((MAX_WINDOWS, width), -7),
    )
    function(descriptor, table, packed)
    return [*packed, table]


def same(descriptor: Descriptor, table: torch.Tensor) -> None:
    ours, expected = (results(function, descriptor, table) for function in (pack.pack, reference.pack))
    for mine, twin in zip(ours, expected, strict=True):
        assert mine.equal(twin)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from([1, 3, 64]), st.integers(1, 6), st.booleans())
def test_it_writes_what_its_twin_writes(shuffled_programs, data, chunk, window, reusable):
    def after_step(forest, trees):
        sizes = Sizes.of(forest.leaves)
        commits = len(forest.changes.entries) + data.draw(st.integers(0, 5))
        packed = PackedForest(sizes.rounded() if reusable else sizes, CPU, reusable, commits)
        packed._windows += [1 << 30, window]
        table = forest.table.clone()
        packed.load(forest)
        same(packed.descriptor, table)
        packed.pack()  # for the steps that follow

    with patch.object(PathTable, "chunk", chunk):
        shuffled_programs(data.draw(st.integers(0, 99)))
        Script(data, steps=3).run(after_step)


@pytest.mark.parametrize("nodes", [1, 63, 64])
def test_the_widest_trees_and_long_prompts(nodes):
    """Bits up to the sign of a word; more queries and commits than a program takes at once."""
    assert MAX_NODES == 64
    generator = np.random.default_rng(nodes)
    prompt, width = 300, 400
    words = generator.integers(1, 2**64, nodes, dtype=np.uint64, endpoint=False) >> np.uint64(64 - nodes)
    rows = torch.zeros(4, width, dtype=torch.int32)
    rows[1] = torch.from_numpy(generator.integers(290, 310, width))
    seen = torch.zeros(width, dtype=torch.int64)
    seen[prompt + 1 : prompt + 1 + nodes] = torch.from_numpy(words.view(np.int64))
    queries = torch.tensor([0, prompt, prompt + 1 + nodes, width, width], dtype=torch.int32)
    leaves = torch.tensor([[0, prompt, prompt], [prompt, 1, 301], [prompt + 1 + nodes, width, 0], [0, 0, 0]]).int()
    entries = torch.from_numpy(generator.permutation(2048)[:600]).int()
    entries[::7] = -1
    windows = torch.tensor([1 << 30, 3, 0, 8, 0, 0, 0, 1])
    same(
        Descriptor(rows, seen, queries, leaves, torch.stack([entries, entries * 2]), windows.int()),
        torch.full((8, 256), -5, dtype=torch.int32),
    )
