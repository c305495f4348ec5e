"""A step's forest onto the device in one launch: from one small buffer to what all other kernels read of queries.

Slots of paths live on the device, in a table of chunks (`kv/path_table.py`). A step commits the few that are
new: those of its rows, and of the chunks in which threads part. A program per leaf writes the tables of its queries,
and further programs commit slots and widen the rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .aot import Variant
from .layout import MAX_NODES, MAX_WINDOWS
from .reference import Descriptor, Packed

BLOCK = 256  # rows or slots of a program
QUERIES = 16  # at a time, of a leaf's


@triton.jit(do_not_specialize=["leaves", "width", "commits"])
def _pack(
    rows,
    words,
    queries,
    fields,
    committed,
    windows,
    table,
    wide,
    per_query,
    ancestors,
    leaves,
    width,
    commits,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    NODES: tl.constexpr,
    WINDOWS: tl.constexpr,
):
    program = tl.program_id(0)
    if program >= leaves:
        at = (program - leaves) * BLOCK + tl.arange(0, BLOCK)
        column = tl.load(committed + at, mask=at < commits, other=-1)
        slot = tl.load(committed + commits + at, mask=at < commits, other=0)
        tl.store(table + column, slot, mask=column >= 0)
        for index in tl.static_range(4):
            value = tl.load(rows + index * width + at, mask=at < width, other=0)
            tl.store(wide + index * width + at, value.to(tl.int64), mask=at < width)
        return

    first, stop = tl.load(queries + program), tl.load(queries + program + 1)
    row, pending = tl.load(fields + program * 3), tl.load(fields + program * 3 + 1)
    length = tl.load(fields + program * 3 + 2)
    node = tl.arange(0, NODES)
    drafted = node < stop - first - pending
    node_position = tl.load(rows + width + row + pending + node, mask=drafted, other=0)
    for begin in range(first, stop, QUERIES):
        query = begin + tl.arange(0, QUERIES)
        valid = query < stop
        mine = row + query - first
        position = tl.load(rows + width + mine, mask=valid, other=0)
        tl.store(per_query + query, mine, mask=valid)
        tl.store(per_query + width + query, position, mask=valid)
        tl.store(per_query + 2 * width + query, position * 0 + length, mask=valid)
        tl.store(per_query + 3 * width + query, position * 0 + program, mask=valid)
        word = tl.load(words + mine, mask=valid, other=0)
        above = drafted[None, :] & (((word[:, None] >> node.to(tl.int64)[None, :]) & 1) != 0)
        bits = tl.full([QUERIES, NODES], 1, tl.int64) << node.to(tl.int64)[None, :]
        for index in range(WINDOWS):
            window = tl.load(windows + index)
            if window > 0:
                near = above & (node_position[None, :] > position[:, None] - window)
                tl.store(ancestors + index * width + query, tl.sum(tl.where(near, bits, 0), 1), mask=valid)


def pack(descriptor: Descriptor, table: torch.Tensor, packed: Packed) -> None:
    """As `reference.pack`; all tensors contiguous, those of the descriptor at addresses that are multiples of 16."""
    leaves, width, commits = len(descriptor.leaves), packed.rows.shape[1], descriptor.commits.shape[1]
    _pack[(leaves + triton.cdiv(max(width, commits), BLOCK),)](
        *(*descriptor, table, *packed, leaves, width, commits),
        BLOCK=BLOCK,
        QUERIES=QUERIES,
        NODES=MAX_NODES,
        WINDOWS=MAX_WINDOWS,
        num_warps=4,
    )


def variants() -> list[Variant]:
    tables = dict.fromkeys(("rows", "queries", "fields", "committed", "windows", "table", "per_query"), "*i32")
    signature = {**tables, **dict.fromkeys(("words", "wide", "ancestors"), "*i64")}
    sizes = dict.fromkeys(("leaves", "width", "commits"), "i32")
    constexprs = {"BLOCK": BLOCK, "QUERIES": QUERIES, "NODES": MAX_NODES, "WINDOWS": MAX_WINDOWS}
    return [Variant("pack", _pack, signature | sizes, constexprs, 4, 3, tuple(signature))]
