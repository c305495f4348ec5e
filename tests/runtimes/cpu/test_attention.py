"""Attention over a KV pool of floats and of int16 steps, by itself: exact rows, and the error that the bits allow."""

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_apar.runtimes.cpu import library

TILE = 64  # attention.h
MACHINES = ("-march=native", "-march=x86-64")
OPTIMISED = dict(zip(MACHINES, ("-O3", "-O2"), strict=True))  # the plain C++ takes -O3 seven times as long
shapes = st.tuples(st.sampled_from([1, 2]), st.integers(1, 7), st.sampled_from([32, 64, 96, 128, 256]))


@functools.cache
def attend_of(machine):
    made = Path(tempfile.mkdtemp()) / "attend.so"
    source = Path(__file__).with_name("attend.cpp")
    options = [*library.FLAGS, OPTIMISED[machine], machine, f"-I{library.FOLDER}", "-shared", "-fvisibility=default"]
    subprocess.run([*library.compilers()[0], *options, str(source), "-o", str(made)], check=True)
    return ctypes.CDLL(str(made)).attend


class Case:
    """Rows with paths of some lengths over a pool whose slots lie anyhow."""

    def __init__(self, kv_heads, group, dim, lengths, seed=0, loud=1.0):
        self.rng = np.random.default_rng(seed)
        self.heads, self.kv_heads, self.dim = kv_heads * group, kv_heads, dim
        self.lengths = np.array(lengths, dtype=np.int32)
        self.capacity = int(self.lengths.max()) + 5
        self.keys, self.values = (self.normal(self.capacity, kv_heads, dim) for _ in range(2))
        self.keys[:, :, 3] *= 8 * loud  # as real keys have it: one dimension outdoes the others
        self.queries = self.normal(len(lengths), self.heads, dim)
        order = self.rng.permutation(self.capacity)
        self.paths = np.zeros((len(lengths), int(self.lengths.max())), dtype=np.int32)
        for path, length in zip(self.paths, lengths, strict=True):
            path[:length] = order[:length]

    def normal(self, *shape):
        return self.rng.standard_normal(shape).astype(np.float32)

    def attend(self, steps, machine=MACHINES[0], rows=None):
        """float32 [rows, heads, dim], and the pool's keys, values and scales."""
        rows = np.arange(len(self.paths)) if rows is None else np.array(rows)
        longest = int(self.lengths[rows].max())
        paths, lengths = np.ascontiguousarray(self.paths[rows, :longest]), np.ascontiguousarray(self.lengths[rows])
        queries = self.queries[rows]
        out = np.full_like(queries, np.nan)
        keys, values = (np.zeros(self.keys.shape, np.int16 if steps else np.float32) for _ in range(2))
        scales = np.zeros((self.capacity, self.kv_heads, 2), np.float32)
        pool = (ctypes.c_void_p * 3)(keys.ctypes.data, values.ctypes.data, scales.ctypes.data if steps else None)
        data = [ctypes.c_void_p(array.ctypes.data) for array in (self.keys, self.values, paths, lengths, queries, out)]
        heads = library.Heads(self.heads, self.kv_heads, self.dim, self.dim**-0.5)
        attend_of(machine)(
            *(ctypes.byref(heads), ctypes.byref(pool), self.capacity, *data[:2], len(rows), longest, *data[2:])
        )
        return out, keys, values, scales

    def expected(self, row, head):
        """float64 [dim], and a bound on the error of int16 steps."""
        path = self.paths[row, : self.lengths[row]]
        kv = head // (self.heads // self.kv_heads)
        q, k, v = (x.astype(np.float64) for x in (self.queries[row, head], self.keys[path, kv], self.values[path, kv]))
        scores = k @ q * self.dim**-0.5
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        # Half a step of every key and of the query, times what it is multiplied by.
        most, of_tile = np.floor(np.sqrt((2**31 - 1) / np.array([self.dim, TILE])))
        half_k, half_q = np.abs(k).max(axis=1) / most / 2, np.abs(q).max() / most / 2
        off = half_k * np.abs(q).sum() + half_q * (np.abs(k) + half_k[:, None]).sum(axis=1)
        growth = np.exp(2 * off.max() * self.dim**-0.5)
        # Half a step of every value, and of every weight times its value's step: the largest of a tile is `of_tile`.
        half_v = np.abs(v).max(axis=1) / of_tile / 2
        shares = growth * weights * half_v
        tiles = [shares[first : first + TILE] for first in range(0, len(path), TILE)]
        bound = (growth - 1) * weights @ np.abs(v) + shares.sum() + sum(len(tile) * tile.max() for tile in tiles)
        return weights @ v, bound + 1e-5 * np.abs(v).max()


@pytest.mark.parametrize("machine", MACHINES)
@settings(max_examples=25, deadline=None)
@given(shapes, st.lists(st.integers(1, 200), min_size=1, max_size=5), st.sampled_from([0.1, 1, 5]), st.integers(0, 99))
def test_errors_are_within_what_the_bits_allow(machine, shape, lengths, loud, seed):
    case = Case(*shape, lengths, seed, loud)
    floats, steps = (case.attend(steps, machine)[0] for steps in (False, True))
    for row in range(len(lengths)):
        for head in range(case.heads):
            expected, bound = case.expected(row, head)
            assert np.all(np.abs(steps[row, head] - expected) <= bound)
            np.testing.assert_allclose(floats[row, head], expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(shapes, st.booleans(), st.lists(st.integers(1, 200), min_size=2, max_size=40), st.integers(0, 99))
def test_a_row_has_the_same_bits_alone_and_in_other_slots(shape, steps, lengths, seed):
    case = Case(*shape, lengths, seed)
    among = case.attend(steps)[0]
    row = seed % len(lengths)
    assert np.array_equal(case.attend(steps, rows=[row])[0][0], among[row])
    moved = case.rng.permutation(case.capacity)
    for name in ("keys", "values"):
        there = np.empty_like(getattr(case, name))
        there[moved] = getattr(case, name)
        setattr(case, name, there)
    case.paths = moved[case.paths].astype(np.int32)
    assert np.array_equal(case.attend(steps)[0], among)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("rows", [1, 2])  # two share their tiles
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
def test_sums_do_not_leave_int32(dim, rows, machine):
    """Every product at its largest, in the scores and, all weights being equal, in a tile of values."""
    case = Case(1, 3, dim, [2 * TILE] * rows)
    case.keys[:], case.queries[:], case.values[:] = 3, 2, -5
    case.keys[case.paths[0, :TILE]] = -3  # these scores are the lowest there can be
    np.testing.assert_allclose(case.attend(True, machine)[0], -5, rtol=1e-5)
    _, keys, values, _ = case.attend(True, machine)
    assert dim * int(keys.max()) ** 2 < 2**31 and TILE * int(abs(values).max()) ** 2 < 2**31


def test_a_pool_of_steps_is_within_half_a_step_and_has_zeros():
    case = Case(2, 3, 64, [70])
    case.keys[9], case.values[9] = 0, 0
    _, keys, values, scales = case.attend(True)
    for stored, exact, scale in ((keys, case.keys, scales[..., :1]), (values, case.values, scales[..., 1:])):
        assert np.all(np.abs(stored * scale - exact) <= 0.501 * scale)
    assert not scales[9].any() and np.isfinite(case.attend(True)[0]).all()


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["keys", "values", "queries"])
def test_what_is_not_finite_stays_so(where, bad, machine):
    """In every row that sees it, and in no other."""
    case = Case(2, 2, 64, [150, 100])
    row = 0
    if where == "queries":
        case.queries[row, 1, 7] = bad
    else:
        getattr(case, where)[case.paths[0, 120], 0, 7] = bad  # the second row's path ends before
    out = case.attend(True, machine)[0]
    hit = np.zeros(out.shape[:2], dtype=bool)
    hit[row, [1] if where == "queries" else [0, 1]] = True  # the heads of the first KV head
    assert np.isnan(out[hit]).all() and np.isfinite(out[~hit]).all()
