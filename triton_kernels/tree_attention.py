"""Attention of a forest's queries over slots: what a beginning shared by many threads costs is read once for all.

Stage 1 gives every item of the layout (a run of chunks, some queries) to one program per KV head: the query heads that
share it and the queries lie side by side in the rows of its tiles, so a key is read once for all of them. Stage 2
merges the partial results of a query's chunks, from the path's first to its last.

A chunk is always summed up by itself, tile after tile, and folded into what came before it: in stage 1 where one
program walks a whole path, in stage 2 where each chunk has a program. Both do the same arithmetic in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from .aot import Variant
from .layout import CHUNK, INTERPRETED, ITEM_FIELDS, NO_WINDOW, Tile, TreeLayout

# By bytes of an element and head dimension (the least power of two that holds it), for few and for many queries.
# Registers and shared memory of each row: resources.json.
TILES = {
    (2, 64): (Tile(16, 64, 4, 3), Tile(64, 64, 8, 3)),
    (2, 128): (Tile(16, 64, 8, 3), Tile(64, 64, 8, 2)),
    (2, 256): (Tile(16, 32, 8, 2), Tile(32, 64, 8, 2)),
    (4, 64): (Tile(16, 16, 8, 2), Tile(16, 16, 8, 2)),
    (4, 128): (Tile(16, 16, 8, 2), Tile(32, 16, 8, 2)),
    (4, 256): (Tile(16, 32, 8, 2), Tile(16, 32, 8, 2)),
}


def tile_for(dtype: torch.dtype, dim: int, group: int, queries: int) -> Tile:
    """The tile for a forest of so many queries whose heads come `group` to a KV head; NotImplementedError for what none
    fits."""
    key = (dtype.itemsize, max(64, triton.next_power_of_2(dim)))
    if key not in TILES:
        raise NotImplementedError(f"heads of {dim} dimensions in {dtype} have no tile: at most 256, in 32 or 16 bits.")
    few, many = TILES[key]
    tile = many if queries * group > few.rows else few
    if group > tile.rows:
        raise NotImplementedError(f"{group} query heads to a KV head are more than the {tile.rows} rows of a tile.")
    return tile


@triton.jit
def _fold(peak, total, acc, other_peak, other_total, other_acc):
    """Two partial results of the same queries, the earlier one first; scores in powers of two."""
    top = tl.maximum(peak, other_peak)
    base = tl.where(top == float("-inf"), 0.0, top)
    scale, other_scale = tl.exp2(peak - base), tl.exp2(other_peak - base)
    # Said in full, so that no compiler contracts one kernel's arithmetic and not the other's.
    total = tl.fma(total, scale, other_total * other_scale)
    acc = tl.fma(acc, scale[:, None], other_acc * other_scale[:, None])
    return top, total, acc


@triton.jit
def _finish(peak, total, acc, sinks, heads, valid, SINKS: tl.constexpr):
    """The softmax's division, after a score without a value where the model has one for each head."""
    if SINKS:
        sink = tl.load(sinks + heads, mask=valid, other=float("-inf")).to(tl.float32) * 1.4426950408889634
        peak, total, acc = _fold(peak, total, acc, sink, tl.where(valid, 1.0, 0.0), acc * 0.0)
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def _scores(
    q,
    keys,
    values,
    entries,
    column,
    there,
    inside,
    value_inside,
    kv,
    scale,
    cap,
    key_slot,
    key_head,
    value_slot,
    value_head,
    dims,
    value_dims,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile's scores, which `factor` of `_attend` turns into powers of two, and its values. Columns that are not there
    are only met where MASKED."""
    if MASKED:
        slot = tl.load(entries + column, mask=there, other=0).to(tl.int64)
        key_mask, value_mask = there[None, :] & inside[:, None], there[:, None] & value_inside[None, :]
    else:
        slot = tl.load(entries + column).to(tl.int64)
        key_mask, value_mask = inside[:, None], value_inside[None, :]
    at_head = kv * key_head
    k = tl.load(keys + at_head + slot[None, :] * key_slot + dims[:, None], mask=key_mask, other=0.0)
    at_head = kv * value_head
    v = tl.load(values + at_head + slot[:, None] * value_slot + value_dims[None, :], mask=value_mask, other=0.0)
    if UPCAST:
        k, v = k.to(tl.float32), v.to(tl.float32)
    scores = tl.dot(q, k, input_precision="ieee")
    if SOFTCAP:
        scores = cap * (1.0 - 2.0 / (tl.exp2(scores * scale * (2.0 * 1.4426950408889634) / cap) + 1.0))
    return scores, v


@triton.jit
def _add(peak, total, acc, scores, factor, v):
    """One tile more of a chunk. Whether a tile was masked must not move a bit: as in `_fold`, all is said in full."""
    top = tl.maximum(peak, tl.max(scores, 1) * factor)
    base = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(tl.fma(scores, factor, -base[:, None]))
    decay = tl.exp2(peak - base)
    total = tl.fma(total, decay, tl.sum(weights, 1))
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return top, total, acc


@triton.jit
def _attend(
    query,
    keys,
    values,
    out,
    partials,
    statistics,
    sinks,
    items,
    chunks,
    slots,
    order,
    positions,
    lengths,
    ancestors,
    query_row,
    query_head,
    key_slot,
    key_head,
    value_slot,
    value_head,
    out_row,
    scale,
    cap,
    window,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WALK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    FIELDS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    item = items + tl.program_id(0) * FIELDS
    kv = tl.program_id(1)
    entry, run = tl.load(item), tl.load(item + 1)
    number, columns = tl.load(item + 2), tl.load(item + 3)
    first, count, partial = tl.load(item + 4), tl.load(item + 5), tl.load(item + 6)
    if count == 0:  # a table that is larger than its contents
        return

    lane = tl.arange(0, ROWS)
    place = first + lane // GROUP
    head = kv * GROUP + lane % GROUP
    valid = lane // GROUP < count
    row = tl.load(order + place, mask=valid, other=0).to(tl.int64)
    position = tl.load(positions + place, mask=valid, other=-1)
    length = tl.load(lengths + place, mask=valid, other=0)
    seen = tl.load(ancestors + place, mask=valid, other=0)
    dims, value_dims = tl.arange(0, DIM_BLOCK), tl.arange(0, VALUE_BLOCK)
    inside, value_inside = dims < DIM, value_dims < VALUE_DIM
    q = tl.load(
        query + row[:, None] * query_row + head[:, None] * query_head + dims[None, :],
        mask=valid[:, None] & inside[None, :],
        other=0.0,
    )
    if UPCAST:
        q = q.to(tl.float32)
    # What no query of the tile has in its window is not read; the least position of a query that is there.
    least = tl.min(tl.where(valid, position, 1 << 30)) - window + 1

    # All queries see the columns before this one, which need no mask; under a window none.
    seen_by_all = tl.min(tl.where(valid, tl.minimum(position + 1, length), 1 << 30))
    seen_by_all = tl.where(window < (1 << 30), 0, seen_by_all)
    factor = (1.0 if SOFTCAP else scale) * 1.4426950408889634
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    for index in range(run if WALK else 1):
        here = (number + index) * CHUNK
        entries = slots + tl.load(chunks + entry + index)
        stop = tl.minimum(columns - index * CHUNK, CHUNK)
        begin = tl.maximum(least - here, 0) // COLUMNS * COLUMNS
        masked = tl.maximum(tl.minimum(seen_by_all - here, stop) // COLUMNS * COLUMNS, begin)
        chunk_peak = tl.full([ROWS], float("-inf"), tl.float32)
        chunk_total = tl.zeros([ROWS], tl.float32)
        chunk_acc = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
        for start in range(begin, masked, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            scores, v = _scores(
                *(q, keys, values, entries, column, column < stop, inside, value_inside, kv, scale, cap),
                *(key_slot, key_head, value_slot, value_head, dims, value_dims, False, SOFTCAP, UPCAST),
            )
            chunk_peak, chunk_total, chunk_acc = _add(chunk_peak, chunk_total, chunk_acc, scores, factor, v)
        for start in range(masked, stop, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            scores, v = _scores(
                *(q, keys, values, entries, column, column < stop, inside, value_inside, kv, scale, cap),
                *(key_slot, key_head, value_slot, value_head, dims, value_dims, True, SOFTCAP, UPCAST),
            )
            at = (here + column)[None, :]
            behind = (at <= position[:, None]) & (at > position[:, None] - window)
            node = tl.minimum(tl.maximum(at - length[:, None], 0), 63)
            guessed = ((seen[:, None] >> node.to(tl.int64)) & 1) != 0
            visible = (column < stop)[None, :] & tl.where(at < length[:, None], behind, guessed)
            scores = tl.where(visible, scores, float("-inf"))
            chunk_peak, chunk_total, chunk_acc = _add(chunk_peak, chunk_total, chunk_acc, scores, factor, v)
        if WALK:
            peak, total, acc = _fold(peak, total, acc, chunk_peak, chunk_total, chunk_acc)
        else:  # folded into nothing it stays what it is
            peak, total, acc = chunk_peak, chunk_total, chunk_acc

    if partial < 0:
        done = _finish(peak, total, acc, sinks, head, valid, SINKS)
        target = out + row[:, None] * out_row + head[:, None] * VALUE_DIM + value_dims[None, :]
        tl.store(target, done.to(out.dtype.element_ty), mask=valid[:, None] & value_inside[None, :])
    else:
        result = (partial + lane // GROUP).to(tl.int64) * HEADS + head
        kept = partials + result[:, None] * VALUE_DIM + value_dims[None, :]
        tl.store(kept, acc, mask=valid[:, None] & value_inside[None, :])
        tl.store(statistics + result * 2, peak, mask=valid)
        tl.store(statistics + result * 2 + 1, total, mask=valid)


@triton.jit(do_not_specialize=["queries"])
def _merge(
    out,
    partials,
    statistics,
    sinks,
    order,
    leaves,
    merges,
    deltas,
    queries,
    out_row,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SINKS: tl.constexpr,
):
    query = tl.program_id(0)
    if query >= queries:
        return
    leaf = tl.load(leaves + query)
    first, last = tl.load(merges + leaf), tl.load(merges + leaf + 1)
    if first == last:  # stage 1 has written the result
        return
    head = tl.program_id(1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    valid = head < HEADS
    value_dims = tl.arange(0, VALUE_BLOCK)
    mask = valid[:, None] & (value_dims < VALUE_DIM)[None, :]
    peak = tl.full([HEAD_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([HEAD_BLOCK], tl.float32)
    acc = tl.zeros([HEAD_BLOCK, VALUE_BLOCK], tl.float32)
    for index in range(first, last):
        result = (query + tl.load(deltas + index)).to(tl.int64) * HEADS + head
        other = tl.load(partials + result[:, None] * VALUE_DIM + value_dims[None, :], mask=mask, other=0.0)
        other_peak = tl.load(statistics + result * 2, mask=valid, other=float("-inf"))
        other_total = tl.load(statistics + result * 2 + 1, mask=valid, other=0.0)
        peak, total, acc = _fold(peak, total, acc, other_peak, other_total, other)
    done = _finish(peak, total, acc, sinks, head, valid, SINKS)
    row = tl.load(order + query).to(tl.int64)
    tl.store(out + row * out_row + head[:, None] * VALUE_DIM + value_dims[None, :], done.to(out.dtype.element_ty), mask)


def tree_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: TreeLayout,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a forest's rows over the slots of their paths and the draft nodes they descend from.

    Args:
        query: [N, heads, head_dim] float32, float16 or bfloat16; any strides with the last dimension dense.
        keys, values: [slots, kv_heads, head_dim] in the query's dtype, likewise; the values' head_dim may be another.
        layout: on the query's device, for tiles of `tile_for`.
        scale: of the scores; head_dim ** -0.5 if None.
        window: path positions that a query sees, its own the last; draft nodes are taken as within it, since
            `ancestors` says which of them are seen.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv 2408.00118, section 2).
        sinks: [heads], a learned score per head that takes part in the softmax and carries no value.

    Returns [N, heads, value_head_dim]; rows that are in no leaf are not written. Sums are float32. A row's bits depend
    on its own path, the leaf's draft nodes and the tile, on nothing else in the forest.
    """
    rows, heads, dim = query.shape
    kv_heads, value_dim = keys.shape[1], values.shape[2]
    group = heads // kv_heads
    tile = layout.tile
    out = query.new_empty(rows, heads, value_dim)
    partials = query.new_empty(layout.partial_rows, heads, value_dim, dtype=torch.float32)
    statistics = query.new_empty(layout.partial_rows, heads, 2, dtype=torch.float32)
    value_block = max(16, triton.next_power_of_2(value_dim))
    _attend[(len(layout.items), kv_heads)](
        *(query, keys, values, out, partials, statistics, query if sinks is None else sinks),
        *(layout.items, layout.chunks, layout.slots, layout.order),
        *(layout.positions, layout.lengths, layout.ancestors),
        *(query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1)),
        *(out.stride(0), dim**-0.5 if scale is None else scale, softcap or 0.0, window or NO_WINDOW),
        HEADS=heads,
        GROUP=group,
        DIM=dim,
        VALUE_DIM=value_dim,
        DIM_BLOCK=max(16, triton.next_power_of_2(dim)),
        VALUE_BLOCK=value_block,
        CHUNK=layout.chunk,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        WALK=layout.walk,
        SOFTCAP=softcap is not None,
        SINKS=sinks is not None,
        FIELDS=ITEM_FIELDS,
        UPCAST=INTERPRETED and query.dtype == torch.bfloat16,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if layout.partial_rows:
        head_block = min(triton.next_power_of_2(heads), max(1, 2048 // value_block))
        _merge[(len(layout.order), triton.cdiv(heads, head_block))](
            *(out, partials, statistics, query if sinks is None else sinks),
            *(layout.order, layout.leaves, layout.merges, layout.deltas, len(layout.order), out.stride(0)),
            HEADS=heads,
            VALUE_DIM=value_dim,
            HEAD_BLOCK=head_block,
            VALUE_BLOCK=value_block,
            SINKS=sinks is not None,
            num_warps=4,
        )
    return out


def variants() -> list[Variant]:
    """Every row of the tile table, and the merge."""
    found = []
    for (size, dim), tiles in TILES.items():
        dtype = "fp32" if size == 4 else "bf16"
        for few, tile in zip((True, False), tiles, strict=True):
            for walk in (False, True):
                name = f"attend {dtype} d{dim} {'few' if few else 'many'}{' walk' if walk else ''}"
                found.append(_attend_variant(name, dtype, dim, tile, walk))
    # Gemma's caps, gpt-oss's sinks, and a head that is no power of two.
    capped, odd = {"SOFTCAP": True, "SINKS": True}, {"DIM": 80, "VALUE_DIM": 80}
    found.append(_attend_variant("attend bf16 d64 few walk cap sinks", "bf16", 64, TILES[2, 64][0], True, capped))
    found.append(_attend_variant("attend bf16 d80 few", "bf16", 128, TILES[2, 128][0], False, odd))
    pointers = {"out": "*bf16", "partials": "*fp32", "statistics": "*fp32", "sinks": "*bf16"}
    tables = dict.fromkeys(("order", "leaves", "merges", "deltas"), "*i32")
    signature = {**pointers, **tables, "queries": "i32", "out_row": "i32"}
    constexprs = {"HEADS": 32, "VALUE_DIM": 128, "HEAD_BLOCK": 16, "VALUE_BLOCK": 128, "SINKS": False}
    return [*found, Variant("merge bf16 d128", _merge, signature, constexprs, 4, 1, (*pointers, *tables, "out_row"))]


def _attend_variant(
    name: str, dtype: str, dim: int, tile: Tile, walk: bool, other: Mapping[str, int | bool] | None = None
) -> Variant:
    heads, group = 32, 4
    tensors = dict.fromkeys(("query", "keys", "values", "out", "sinks"), f"*{dtype}")
    partial = dict.fromkeys(("partials", "statistics"), "*fp32")
    tables = dict.fromkeys(("items", "chunks", "slots", "order", "positions", "lengths"), "*i32")
    strides = ("query_row", "query_head", "key_slot", "key_head", "value_slot", "value_head", "out_row")
    signature = {**tensors, **partial, **tables, "ancestors": "*i64", **dict.fromkeys(strides, "i32")}
    signature |= {"scale": "fp32", "cap": "fp32", "window": "i32"}
    constexprs = {
        "HEADS": heads,
        "GROUP": group,
        "DIM": dim,
        "VALUE_DIM": dim,
        "DIM_BLOCK": dim,
        "VALUE_BLOCK": dim,
        "CHUNK": CHUNK,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "WALK": walk,
        "SOFTCAP": False,
        "SINKS": False,
        "FIELDS": ITEM_FIELDS,
        "UPCAST": False,
    }
    constexprs |= other or {}
    divisible = (*tensors, *partial, *tables, "ancestors", *strides)
    return Variant(name, _attend, signature, constexprs, tile.warps, tile.stages, divisible)
