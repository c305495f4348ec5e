"""Attention of compiled code over a KV pool by itself: cases, and what they come to."""

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from medusa_apar.runtimes.cpu import library
from tests.support import arm

TILE = 64  # attention.h
MACHINES = ("-march=native", "-march=x86-64")
OPTIMISED = dict(zip(MACHINES, ("-O3", "-O2"), strict=True))  # the plain C++ takes -O3 seven times as long


@functools.cache
def attend_of(machine):
    made = Path(tempfile.mkdtemp()) / "attend.so"
    options = [*library.FLAGS, OPTIMISED[machine], machine, f"-I{library.FOLDER}", "-shared", "-fvisibility=default"]
    subprocess.run([*library.compilers()[0], *options, str(arm.FOLDER / "attend.cpp"), "-o", str(made)], check=True)
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
        """float32 [rows, heads, dim], and the pool's keys, values and scales; machine: one of MACHINES, or of Arm's."""
        rows = np.arange(len(self.paths)) if rows is None else np.array(rows)
        longest = int(self.lengths[rows].max())
        paths, lengths = np.ascontiguousarray(self.paths[rows, :longest]), np.ascontiguousarray(self.lengths[rows])
        queries = self.queries[rows]
        heads = library.Heads(self.heads, self.kv_heads, self.dim, self.dim**-0.5)
        if machine in arm.MACHINES:
            return arm.attend(machine, heads, steps, longest, self.keys, self.values, paths, lengths, queries)
        out = np.full_like(queries, np.nan)
        keys, values = (np.zeros(self.keys.shape, np.int16 if steps else np.float32) for _ in range(2))
        scales = np.zeros((self.capacity, self.kv_heads, 2), np.float32)
        pool = (ctypes.c_void_p * 3)(keys.ctypes.data, values.ctypes.data, scales.ctypes.data if steps else None)
        data = [ctypes.c_void_p(array.ctypes.data) for array in (self.keys, self.values, paths, lengths, queries, out)]
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
