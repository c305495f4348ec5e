"""The attention kernels, run by Triton's interpreter, against float64 over what each query is said to see."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_apar.triton_kernels import reference
from medusa_apar.triton_kernels.layout import Leaf, Tile, plan
from medusa_apar.triton_kernels.tree_attention import tree_attention
from tests.support.forests import Drawn, forests

assert os.environ.get("TRITON_INTERPRET") == "1"
SMALL = Tile(16, 16, 4, 1)
CHUNK = 32


def dense(query, keys, values, drawn: Drawn, window=None, softcap=None, sinks=None, scale=None) -> torch.Tensor:
    """[N, heads, dim] float64, from `drawn.seen` alone."""
    group = query.shape[1] // keys.shape[1]
    out = []
    for row, seen in enumerate(drawn.seen):
        kept = [slot for slot, at in seen if window is None or at > drawn.positions[row] - window]
        key, value = (pool[kept].double().repeat_interleave(group, dim=1) for pool in (keys, values))
        scores = (query[row].double() * key).sum(-1).T * (scale or query.shape[2] ** -0.5)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None]], dim=1)
        out.append(torch.einsum("hs,shd->hd", scores.softmax(1)[:, : len(kept)], value))
    return torch.stack(out)


def draw_tensors(drawn: Drawn, heads=4, kv_heads=2, dim=16, dtype=torch.float32, seed=0):
    """Query, keys and values; slots that no query sees hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(drawn.rows, heads, dim, generator=generator)
    keys, values = (torch.randn(drawn.capacity, kv_heads, dim, generator=generator) for _ in range(2))
    unused = torch.ones(drawn.capacity, dtype=torch.bool)
    unused[[slot for seen in drawn.seen for slot, _ in seen]] = False
    keys[unused], values[unused] = torch.nan, torch.nan
    return query.to(dtype), keys.to(dtype), values.to(dtype)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What is not written shows."""
    new_empty = torch.Tensor.new_empty

    def nans(self, *size, **options):
        made = new_empty(self, *size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", nans)


def windowed(drawn: Drawn, window: int | None) -> list[Leaf]:
    """Leaves whose nodes see only those ancestors that are in their window."""
    if window is None:
        return drawn.leaves
    leaves = []
    for leaf in drawn.leaves:
        pending = len(leaf.rows) - (len(leaf.slots) - leaf.length)
        nodes = leaf.positions[pending:]
        words = [
            sum(1 << n for n, at in enumerate(nodes) if int(word) >> n & 1 and at > position - window)
            for position, word in zip(leaf.positions, leaf.ancestors, strict=True)
        ]
        leaves.append(replace(leaf, ancestors=np.array(words, dtype=np.uint64)))
    return leaves


@settings(max_examples=14, deadline=None)
@given(forests(), st.booleans(), st.sampled_from([None, 1, 3, 40]))
def test_every_query_attends_over_its_path(drawn, walk, window):
    query, keys, values = draw_tensors(drawn)
    layout = plan(windowed(drawn, window), SMALL, 2, CHUNK, walk)
    out = tree_attention(query, keys, values, layout, window=window)
    torch.testing.assert_close(out.double(), dense(query, keys, values, drawn, window), rtol=0, atol=1e-5)
    twin = reference.tree_attention(query, keys, values, layout, window=window)
    torch.testing.assert_close(out, twin, rtol=0, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(forests(), st.booleans(), st.sampled_from([None, 1, 5, 20]))
def test_the_layout_says_what_each_query_sees(drawn, walk, window):
    layout = plan(windowed(drawn, window), SMALL, 2, CHUNK, walk)
    seen = dict(zip(layout.order.tolist(), reference.seen_slots(layout, window), strict=True))
    for row, expected in enumerate(drawn.seen):
        kept = [slot for slot, at in expected if window is None or at > drawn.positions[row] - window]
        assert sorted(seen[row]) == sorted(kept)


@settings(max_examples=4, deadline=None)
@given(forests(requests=1, forks=2))
def test_one_program_a_path_or_one_a_chunk_gives_the_same_bits(drawn):
    query, keys, values = draw_tensors(drawn)
    split, walked = (tree_attention(query, keys, values, plan(drawn.leaves, SMALL, 2, CHUNK, w)) for w in (False, True))
    assert torch.equal(split, walked)


@settings(max_examples=4, deadline=None)
@given(forests(requests=2, forks=2), st.integers(0, 100))
def test_a_leafs_bits_do_not_depend_on_the_rest_of_the_forest(drawn, which):
    query, keys, values = draw_tensors(drawn)
    together = tree_attention(query, keys, values, plan(drawn.leaves, SMALL, 2, CHUNK))
    leaf = drawn.leaves[which % len(drawn.leaves)]
    only = Leaf(leaf.slots, leaf.length, leaf.rows, leaf.positions, leaf.ancestors)
    alone = tree_attention(query, keys, values, plan([only], SMALL, 2, CHUNK))
    assert torch.equal(together[leaf.rows], alone[leaf.rows])


@pytest.mark.parametrize("window", [1, 7, 33])
def test_windows_go_by_path_position(window):
    drawn = linear(70, pending=24)
    query, keys, values = draw_tensors(drawn)
    for walk in (False, True):
        out = tree_attention(query, keys, values, plan(drawn.leaves, SMALL, 2, CHUNK, walk), window=window)
        torch.testing.assert_close(out.double(), dense(query, keys, values, drawn, window), rtol=0, atol=1e-5)


@pytest.mark.parametrize("walk", [False, True])
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 1), (9, 3), (16, 1)])
def test_query_heads_share_a_kv_head(heads, kv_heads, walk):
    drawn = linear(50, pending=3)
    query, keys, values = draw_tensors(drawn, heads, kv_heads)
    out = tree_attention(query, keys, values, plan(drawn.leaves, SMALL, heads // kv_heads, CHUNK, walk))
    torch.testing.assert_close(out.double(), dense(query, keys, values, drawn), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [8, 64, 80, 96, 128, 256])
def test_head_dimensions_and_dtypes(dim, dtype):
    drawn = linear(40, pending=2)
    query, keys, values = draw_tensors(drawn, 2, 1, dim, dtype)
    out = tree_attention(query, keys, values, plan(drawn.leaves, SMALL, 2, CHUNK))
    assert out.dtype == dtype
    expected = dense(query, keys, values, drawn)
    # float16 weights are rounded before the second product, results to their dtype; the interpreter cuts bfloat16 off.
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=bound)


def test_softcap_sinks_and_scale():
    drawn = linear(45, pending=4)
    query, keys, values = draw_tensors(drawn)
    query *= 4
    sinks = torch.tensor([-1.0, 0.0, 2.0, 9.0])
    for more in ({"softcap": 3.0}, {"sinks": sinks}, {"scale": 0.7}, {"softcap": 5.0, "sinks": sinks}):
        for walk in (False, True):
            layout = plan(drawn.leaves, SMALL, 2, CHUNK, walk)
            out = tree_attention(query, keys, values, layout, **more)
            torch.testing.assert_close(out.double(), dense(query, keys, values, drawn, **more), rtol=0, atol=2e-5)
            twin = reference.tree_attention(query, keys, values, layout, **more)
            torch.testing.assert_close(out, twin, rtol=0, atol=2e-5)


def test_values_may_have_another_width():
    drawn = linear(20, pending=2)
    query, keys, _ = draw_tensors(drawn, dim=16)
    _, _, values = draw_tensors(drawn, dim=24)
    out = tree_attention(query, keys, values, plan(drawn.leaves, SMALL, 2, CHUNK))
    assert out.shape == (2, 4, 24)
    torch.testing.assert_close(out.double(), dense(query, keys, values, drawn), rtol=0, atol=1e-5)


def test_a_tree_of_64_nodes():
    length, nodes = 30, 64
    words = [(1 << node) | (1 if node else 0) for node in range(nodes)]  # all hang below node 0
    slots = np.arange(length + nodes)
    positions = np.array([length - 1, length, *[length + 1] * (nodes - 1)])
    leaf = Leaf(slots, length, np.arange(nodes + 1), positions, np.array([0, *words], dtype=np.uint64))
    path = [(slot, slot) for slot in range(length)]
    seen = [path, *([*path, *((length + n, length + min(n, 1)) for n in range(nodes) if w >> n & 1)] for w in words)]
    drawn = Drawn([leaf], seen, positions.tolist(), 128)
    query, keys, values = draw_tensors(drawn)
    out = tree_attention(query, keys, values, plan([leaf], SMALL, 2, CHUNK))
    torch.testing.assert_close(out.double(), dense(query, keys, values, drawn), rtol=0, atol=1e-5)


def linear(length: int, pending: int) -> Drawn:
    """One thread without drafts, its slots in descending order."""
    slots = np.arange(length)[::-1].copy()
    positions = np.arange(length - pending, length)
    leaf = Leaf(slots, length, np.arange(pending), positions, np.zeros(pending, dtype=np.uint64))
    seen = [[(int(slots[at]), at) for at in range(position + 1)] for position in positions]
    return Drawn([leaf], seen, positions.tolist(), length)
