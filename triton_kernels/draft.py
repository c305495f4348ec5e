"""Drafting for all threads: residual heads, and the likeliest tokens of an unembedding without writing its logits.

Both are matrix products of few rows with large weights: they stream the weights once and take as long as that takes.
Programs that share a tile of weights are neighbours, so that further row tiles find it in L2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .aot import Variant
from .verify import _sortable

MAX_K = 16
_LOWEST = tl.constexpr(-(2**31))
_MERGED = 2048  # partial results merged at once


class Tile(NamedTuple):
    """rows x columns of the result a program makes, in steps of `depth` along the hidden size."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# By the most rows of the product; what each costs in registers and shared memory is in resources.json. Sixteen rows are
# one mma tile: below it nothing is saved. From 64 rows on Hopper's wgmma serves. With 128 columns, a depth of 64 spills
# at 16 rows on sm_90, and one of 128 in 32 bits on sm_80.
_RESIDUAL_TILES = {
    2: {16: Tile(16, 32, 128, 4, 4), 32: Tile(32, 32, 128, 4, 4), 64: Tile(64, 64, 64, 4, 3)},
    4: {16: Tile(16, 32, 64, 4, 4), 64: Tile(64, 64, 32, 4, 3)},
}
_TOP_TILES = {
    2: {16: Tile(16, 128, 128, 4, 3), 32: Tile(32, 128, 64, 4, 3), 64: Tile(64, 128, 64, 8, 3)},
    4: {16: Tile(16, 128, 32, 4, 4), 64: Tile(64, 128, 32, 8, 3)},
}


def _tile(tiles: dict[int, dict[int, Tile]], rows: int, itemsize: int) -> Tile:
    by_rows = tiles[itemsize]
    return next((tile for most, tile in by_rows.items() if rows <= most), by_rows[max(by_rows)])


def residual_blocks(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> torch.Tensor:
    """K heads' residual blocks, x + SiLU(W x + b), one after the other: [T, H] -> [K, T, H].

    x: float32, float16 or bfloat16, contiguous. weights, biases: per block [K, H, H] and [K, H], of x's dtype.
    Sums are float32, and each block's result is rounded once to x's dtype. AssertionError for what differs.
    """
    rows, hidden = x.shape
    tile = _tile(_RESIDUAL_TILES, rows, x.element_size())
    assert len(weights) == len(biases) > 0 and rows > 0, (len(weights), len(biases), rows)
    assert x.is_contiguous()
    for weight, bias in zip(weights, biases, strict=True):
        heads = len(weight)
        assert weight.shape == (heads, hidden, hidden) and bias.shape == (heads, hidden), (weight.shape, bias.shape)
        assert weight.dtype == bias.dtype == x.dtype, (weight.dtype, bias.dtype, x.dtype)
        assert weight.is_contiguous() and bias.is_contiguous()
        out = torch.empty(heads, rows, hidden, dtype=x.dtype, device=x.device)
        _residual_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(hidden, tile.columns), heads)](
            x,
            weight,
            bias,
            out,
            rows,
            0 if x.dim() == 2 else rows * hidden,
            HIDDEN=hidden,
            UPCAST=triton.knobs.runtime.interpret,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        x = out
    return x


def top_logits(
    states: torch.Tensor,
    unembedding: torch.Tensor,
    bias: torch.Tensor | None = None,
    k: int = 1,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k greatest logits of each row, of equals the lowest index first, without the logits ever being written. NaN
    counts as -inf.

    Args:
        states: [R, H], or [B, R, H] for B products at once; contiguous, float32, float16 or bfloat16.
        unembedding: [vocab, H] or [B, vocab, H], contiguous, of the same dtype; perhaps only the rows of a draft
            vocabulary.
        bias: [vocab] or [B, vocab].
        k: 1 to 16, at most the vocabulary.
        scale, softcap: logits are multiplied, then capped: softcap * tanh(logits / softcap).

    Returns: values float32 [..., R, k], indices int32 [..., R, k], and the log of the sum of all exponentials float32
    [..., R]. Sums are float32 and nothing is rounded before it is compared. AssertionError for what differs.
    """
    assert states.dim() == unembedding.dim() and states.is_contiguous(), (states.shape, unembedding.shape)
    batched = states.dim() == 3
    states, unembedding = (states, unembedding) if batched else (states[None], unembedding[None])
    values, indices, sums = _top(states, unembedding, bias, k, scale, softcap, None, None)
    shape = states.shape[:2]
    values, indices, sums = values.view(*shape, k), indices.view(*shape, k), sums.view(shape)
    return (values, indices, sums) if batched else (values[0], indices[0], sums[0])


def medusa_draft(
    hidden_states: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    unembedding: torch.Tensor,
    bias: torch.Tensor | None = None,
    token_map: torch.Tensor | None = None,
    k: int = 1,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What K Medusa heads propose after T states [T, H]: token ids int32 and log-probabilities float32, both [T, K, k].

    weights, biases: as in `residual_blocks`; none are needed where the heads own their unembedding.
    unembedding, bias, k, scale, softcap: as in `top_logits`; [vocab, H] serves all heads, [K, vocab, H] is their own.
    token_map: long [vocab], the ids of a draft vocabulary.

    Log-probabilities are over the draft vocabulary. Equals `MedusaHeads.top(heads.logits(...))` where that is float32;
    below it, nothing is rounded here before it is compared.
    """
    threads, hidden = hidden_states.shape
    own = unembedding.dim() == 3
    states = residual_blocks(hidden_states, weights, biases) if weights else hidden_states[None]
    heads = len(unembedding) if own else len(states)
    if own:
        assert len(states) in (1, heads), (len(states), heads)
        states = states.expand(heads, -1, -1)
    else:
        states, unembedding = states.view(1, heads * threads, hidden), unembedding[None]
    log_probs, tokens, _ = _top(states, unembedding, bias, k, scale, softcap, threads, token_map)
    return tokens, log_probs


def _top(
    states: torch.Tensor,  # [B, R, H], the first stride free
    unembedding: torch.Tensor,  # [B, vocab, H]
    bias: torch.Tensor | None,
    k: int,
    scale: float,
    softcap: float | None,
    threads: int | None,  # given: the outputs are [T, heads, k], and values are log-probabilities
    token_map: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, rows, hidden = states.shape
    vocab = unembedding.shape[1]
    assert unembedding.shape == (batch, vocab, hidden), (unembedding.shape, states.shape)
    assert unembedding.dtype == states.dtype, (unembedding.dtype, states.dtype)
    assert unembedding.is_contiguous() and states.stride()[1:] == (hidden, 1), states.stride()
    assert bias is None or (bias.numel() == batch * vocab and bias.is_contiguous()), bias.shape
    assert token_map is None or (token_map.shape == (vocab,) and token_map.dtype == torch.int64), token_map.shape
    assert 1 <= k <= min(MAX_K, vocab), f"k is {k}, must be 1 to {min(MAX_K, vocab)}"
    tile = _tile(_TOP_TILES, rows, states.element_size())
    tiles = triton.cdiv(vocab, tile.columns)
    device = states.device
    words = torch.empty(batch * rows, tiles, k, dtype=torch.int64, device=device)
    sums = torch.empty(batch * rows, tiles, 2, dtype=torch.float32, device=device)
    _tile_top_kernel[(triton.cdiv(rows, tile.rows), tiles, batch)](
        states,
        unembedding,
        bias,
        words,
        sums,
        rows,
        vocab,
        states.stride(0) if batch > 1 else 0,
        scale,
        1.0 if softcap is None else softcap,
        HIDDEN=hidden,
        CAP=softcap is not None,
        UPCAST=triton.knobs.runtime.interpret,
        K=k,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    total = batch * rows
    threads_out = total if threads is None else threads
    shape = (threads_out, total // threads_out, k)
    values = torch.empty(shape, dtype=torch.float32, device=device)
    indices = torch.empty(shape, dtype=torch.int32, device=device)
    logsumexp = torch.empty(total, dtype=torch.float32, device=device)
    _merge_top_kernel[(total,)](
        words,
        sums,
        token_map,
        values,
        indices,
        logsumexp,
        tiles,
        threads_out,
        LOG_PROBS=threads is not None,
        K=k,
        K_BLOCK=triton.next_power_of_2(k),
        BLOCK=min(_MERGED, triton.next_power_of_2(tiles * k)),
        num_warps=4,
    )
    return values, indices, logsumexp


@triton.jit
def _load_tile(ptr, line, lines, offset, HIDDEN: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr):
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


@triton.jit(do_not_specialize=["rows"])
def _residual_kernel(
    x_ptr,  # [rows, HIDDEN], or [heads, rows, HIDDEN] with `head_stride`
    weight_ptr,  # [heads, HIDDEN, HIDDEN]
    bias_ptr,  # [heads, HIDDEN]
    out_ptr,  # [heads, rows, HIDDEN]
    rows,
    head_stride,
    HIDDEN: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    head = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    x_ptr += head * head_stride
    weight_ptr += head * HIDDEN * HIDDEN
    y = tl.zeros([ROWS, COLUMNS], tl.float32)
    for offset in range(0, HIDDEN, DEPTH):
        x = _load_tile(x_ptr, row, rows, offset, HIDDEN, DEPTH, UPCAST)
        weight = _load_tile(weight_ptr, column, HIDDEN, offset, HIDDEN, DEPTH, UPCAST)
        y = tl.dot(x, tl.trans(weight), y, input_precision="ieee")
    bias = tl.load(bias_ptr + head * HIDDEN + column, mask=column < HIDDEN, other=0.0)
    y += bias.to(tl.float32)[None, :]
    there = (row < rows)[:, None] & (column < HIDDEN)[None, :]
    at = row[:, None] * HIDDEN + column[None, :]
    out = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32) + y * tl.sigmoid(y)
    tl.store(out_ptr + head * rows * HIDDEN + at, out.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["rows"])
def _tile_top_kernel(
    states_ptr,  # [batch, rows, HIDDEN], batches `batch_stride` apart
    unembedding_ptr,  # [batch, vocab, HIDDEN]
    bias_ptr,  # [batch, vocab] or None
    words_ptr,  # int64 [batch, rows, tiles, K]: sortable score and index
    sums_ptr,  # float32 [batch, rows, tiles, 2]: maximum and sum of exponentials
    rows,
    vocab,
    batch_stride,
    scale,
    cap,
    HIDDEN: tl.constexpr,
    CAP: tl.constexpr,
    UPCAST: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    tile = tl.program_id(1)
    tiles = tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    states_ptr += batch * batch_stride
    unembedding_ptr += batch * vocab * HIDDEN
    x = tl.zeros([ROWS, COLUMNS], tl.float32)
    for offset in range(0, HIDDEN, DEPTH):
        states = _load_tile(states_ptr, row, rows, offset, HIDDEN, DEPTH, UPCAST)
        unembedding = _load_tile(unembedding_ptr, column, vocab, offset, HIDDEN, DEPTH, UPCAST)
        x = tl.dot(states, tl.trans(unembedding), x, input_precision="ieee")
    if bias_ptr is not None:
        x += tl.load(bias_ptr + batch * vocab + column, mask=column < vocab, other=0.0).to(tl.float32)[None, :]
    x *= scale
    if CAP:
        x = cap * (2.0 * tl.sigmoid(2.0 * x / cap) - 1.0)
    x = tl.where((column < vocab)[None, :] & (x == x), x, -float("inf"))

    out = (batch * rows + row) * tiles + tile
    high = tl.max(x, axis=1)
    exponentials = tl.where(x == -float("inf"), 0.0, tl.exp(x - high[:, None]))
    tl.store(sums_ptr + out * 2, high, mask=row < rows)
    tl.store(sums_ptr + out * 2 + 1, tl.sum(exponentials, axis=1), mask=row < rows)
    # Two reductions of 32 bits a place: words of 64 would double the registers.
    keys = tl.where((column < vocab)[None, :], _sortable(x), _LOWEST)
    for place in range(K):
        best = tl.max(keys, axis=1)
        index = tl.min(tl.where(keys == best[:, None], column[None, :], 0x7FFFFFFF), axis=1)
        keys = tl.where(column[None, :] == index[:, None], _LOWEST, keys)
        word = (best.to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))
        tl.store(words_ptr + out * K + place, word, mask=row < rows)


@triton.jit(do_not_specialize=["tiles", "threads"])
def _merge_top_kernel(
    words_ptr,  # int64 [R, tiles, K]
    sums_ptr,  # float32 [R, tiles, 2]
    token_map_ptr,  # int64 [vocab] or None
    values_ptr,  # float32 [threads, R // threads, K]
    indices_ptr,  # int32, the same
    logsumexp_ptr,  # float32 [R]
    tiles,
    threads,
    LOG_PROBS: tl.constexpr,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i_k = tl.arange(0, K_BLOCK)
    lowest = tl.full([K_BLOCK], -(2**63), tl.int64)
    top = lowest
    start = 0
    while start < tiles * K:
        here = start + tl.arange(0, BLOCK)
        words = tl.load(words_ptr + row * tiles * K + here, mask=here < tiles * K, other=-(2**63))
        merged = lowest
        for place in range(K):
            best = tl.maximum(tl.max(words), tl.max(top))
            merged = tl.where(i_k == place, best, merged)
            words = tl.where(words == best, -(2**63), words)
            top = tl.where(top == best, -(2**63), top)
        top = merged
        start += BLOCK

    high = -float("inf")
    total = 0.0
    start = 0
    while start < tiles:
        here = start + tl.arange(0, BLOCK)
        highs = tl.load(sums_ptr + (row * tiles + here) * 2, mask=here < tiles, other=-float("inf"))
        totals = tl.load(sums_ptr + (row * tiles + here) * 2 + 1, mask=here < tiles, other=0.0)
        higher = tl.maximum(high, tl.max(highs))
        rescaled = tl.where(highs == -float("inf"), 0.0, totals * tl.exp(highs - higher))
        total = tl.where(high == -float("inf"), 0.0, total * tl.exp(high - higher)) + tl.sum(rescaled)
        high = higher
        start += BLOCK
    logsumexp = high + tl.log(total)
    tl.store(logsumexp_ptr + row, logsumexp)

    key = (top >> 32).to(tl.int32)
    values = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    if LOG_PROBS:
        values -= logsumexp
    indices = (0xFFFFFFFF - (top & 0xFFFFFFFF)).to(tl.int32)
    if token_map_ptr is not None:
        indices = tl.load(token_map_ptr + indices, mask=i_k < K, other=0).to(tl.int32)
    # Row r of the products is thread r % threads of head r // threads.
    out = ((row % threads) * (tl.num_programs(0) // threads) + row // threads) * K + i_k
    tl.store(values_ptr + out, values, mask=i_k < K)
    tl.store(indices_ptr + out, indices, mask=i_k < K)


def variants() -> list[Variant]:
    """Each row of the tile tables, in 16 and 32 bits, at the hidden sizes of SmolLM2-135M and Llama-3-8B."""
    found = []
    for dtype, hidden, rows in _TESTED:
        itemsize = 4 if dtype == "fp32" else 2
        residual, top = _tile(_RESIDUAL_TILES, rows, itemsize), _tile(_TOP_TILES, rows, itemsize)
        shape = f"{dtype}-hidden{hidden}-rows{rows}"
        found.append(
            Variant(
                name=f"residual-{shape}",
                kernel=_residual_kernel,
                signature={
                    **dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"), f"*{dtype}"),
                    **dict.fromkeys(("rows", "head_stride"), "i32"),
                },
                constexprs={
                    "HIDDEN": hidden,
                    "UPCAST": False,
                    "ROWS": residual.rows,
                    "COLUMNS": residual.columns,
                    "DEPTH": residual.depth,
                },
                num_warps=residual.num_warps,
                num_stages=residual.num_stages,
                divisible=("x_ptr", "weight_ptr", "bias_ptr", "out_ptr", "head_stride"),
            )
        )
        k = 4 if rows == 16 else MAX_K
        found.append(
            Variant(
                name=f"top-{shape}-k{k}",
                kernel=_tile_top_kernel,
                signature={
                    **dict.fromkeys(("states_ptr", "unembedding_ptr"), f"*{dtype}"),
                    "words_ptr": "*i64",
                    "sums_ptr": "*fp32",
                    **dict.fromkeys(("rows", "vocab", "batch_stride"), "i32"),
                    **dict.fromkeys(("scale", "cap"), "fp32"),
                },
                constexprs={
                    "bias_ptr": None,
                    "HIDDEN": hidden,
                    "CAP": False,
                    "UPCAST": False,
                    "K": k,
                    "ROWS": top.rows,
                    "COLUMNS": top.columns,
                    "DEPTH": top.depth,
                },
                num_warps=top.num_warps,
                num_stages=top.num_stages,
                divisible=("states_ptr", "unembedding_ptr", "words_ptr", "sums_ptr", "vocab", "batch_stride"),
            )
        )
    pointers = {
        "words_ptr": "*i64",
        "sums_ptr": "*fp32",
        "token_map_ptr": "*i64",
        "values_ptr": "*fp32",
        "indices_ptr": "*i32",
        "logsumexp_ptr": "*fp32",
    }
    merge = Variant(
        name=f"merge-top-k{MAX_K}",
        kernel=_merge_top_kernel,
        signature={**pointers, "tiles": "i32", "threads": "i32"},
        constexprs={"LOG_PROBS": True, "K": MAX_K, "K_BLOCK": MAX_K, "BLOCK": _MERGED},
        num_warps=4,
        num_stages=3,
        divisible=tuple(pointers),
    )
    return [*found, merge]


_TESTED = (
    ("bf16", 4096, 16),
    ("bf16", 4096, 32),
    ("bf16", 4096, 64),
    ("fp16", 576, 16),
    ("fp32", 576, 16),
    ("fp32", 576, 64),
)
