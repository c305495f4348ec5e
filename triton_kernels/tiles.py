"""Tiles of matrix products of few rows with large weights, which take as long as streaming the weights once.

Programs that share a tile of weights are neighbours, so that further row tiles find it in L2.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Tile(NamedTuple):
    """rows x columns of the result a program makes, in steps of `depth` along the hidden size."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# Tiles by the bytes of an element, then by the most rows of the product; what each costs in registers and shared memory
# is in resources.json. Sixteen rows are one mma tile: below it nothing is saved. From 64 rows on Hopper's wgmma serves.
# With 128 columns, a depth of 64 spills at 16 rows on sm_90, and one of 128 in 32 bits on sm_80.
RESIDUAL_TILES = {
    2: {16: Tile(16, 32, 128, 4, 4), 32: Tile(32, 32, 128, 4, 4), 64: Tile(64, 64, 64, 4, 3)},
    4: {16: Tile(16, 32, 64, 4, 4), 64: Tile(64, 64, 32, 4, 3)},
}
TOP_TILES = {
    2: {16: Tile(16, 128, 128, 4, 3), 32: Tile(32, 128, 64, 4, 3), 64: Tile(64, 128, 64, 8, 3)},
    4: {16: Tile(16, 128, 32, 4, 4), 64: Tile(64, 128, 32, 8, 3)},
}

# Rows of these tables, as they are compiled ahead of time, at the hidden sizes of SmolLM2-135M and Llama-3-8B: dtype,
# hidden size, most rows.
TESTED = (
    ("bf16", 4096, 16),
    ("bf16", 4096, 32),
    ("bf16", 4096, 64),
    ("fp16", 576, 16),
    ("fp32", 576, 16),
    ("fp32", 576, 64),
)


def tile_for(tiles: dict[int, dict[int, Tile]], rows: int, itemsize: int) -> Tile:
    """The tile for so many rows of elements of so many bytes."""
    by_rows = tiles[itemsize]
    return next((tile for most, tile in by_rows.items() if rows <= most), by_rows[max(by_rows)])


@triton.jit
def load_tile(ptr, line, lines, offset, HIDDEN: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr):
    """[len(line), DEPTH] of a [lines, HIDDEN] matrix from column `offset` on; zero beyond its ends."""
    here = offset + tl.arange(0, DEPTH)
    at = ptr + line.to(tl.int64)[:, None] * HIDDEN + here[None, :]
    if HIDDEN % DEPTH == 0:
        tile = tl.load(at, mask=(line < lines)[:, None], other=0.0)
    else:
        tile = tl.load(at, mask=(line < lines)[:, None] & (here < HIDDEN)[None, :], other=0.0)
    if UPCAST:  # the interpreter cannot compute in bfloat16
        tile = tile.to(tl.float32)
    return tile
