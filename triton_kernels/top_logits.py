"""The likeliest tokens of an unembedding, without writing its logits: each program keeps the best of its tile of the
vocabulary and the running sum of exponentials, and a second launch merges tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .aot import Variant
from .scores import LOWEST, sortable
from .tiles import TESTED, TOP_TILES, load_tile, tile_for

MAX_K = 16
_MERGED = 2048  # partial results merged at once


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
    values, indices, sums = likeliest_of(states, unembedding, bias, k, scale, softcap, None, None)
    shape = states.shape[:2]
    values, indices, sums = values.view(*shape, k), indices.view(*shape, k), sums.view(shape)
    return (values, indices, sums) if batched else (values[0], indices[0], sums[0])


def likeliest_of(
    states: torch.Tensor,  # [B, R, H], the first stride free
    unembedding: torch.Tensor,  # [B, vocab, H]
    bias: torch.Tensor | None,
    k: int,
    scale: float,
    softcap: float | None,
    threads: int | None,  # given: the outputs are [T, heads, k], and values are log-probabilities
    token_map: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `top_logits` returns, flat: its rows are those of all products, one product behind the other."""
    batch, rows, hidden = states.shape
    vocab = unembedding.shape[1]
    assert unembedding.shape == (batch, vocab, hidden), (unembedding.shape, states.shape)
    assert unembedding.dtype == states.dtype, (unembedding.dtype, states.dtype)
    assert unembedding.is_contiguous() and states.stride()[1:] == (hidden, 1), states.stride()
    assert bias is None or (bias.numel() == batch * vocab and bias.is_contiguous()), bias.shape
    assert token_map is None or (token_map.shape == (vocab,) and token_map.dtype == torch.int64), token_map.shape
    assert 1 <= k <= min(MAX_K, vocab), f"k is {k}, must be 1 to {min(MAX_K, vocab)}"
    tile = tile_for(TOP_TILES, rows, states.element_size())
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
        states = load_tile(states_ptr, row, rows, offset, HIDDEN, DEPTH, UPCAST)
        unembedding = load_tile(unembedding_ptr, column, vocab, offset, HIDDEN, DEPTH, UPCAST)
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
    keys = tl.where((column < vocab)[None, :], sortable(x), LOWEST)
    for place in range(K):
        best = tl.max(keys, axis=1)
        index = tl.min(tl.where(keys == best[:, None], column[None, :], 0x7FFFFFFF), axis=1)
        keys = tl.where(column[None, :] == index[:, None], LOWEST, keys)
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
    """Each row of the tile table, in 16 and 32 bits, and the merge."""
    found = []
    for dtype, hidden, rows in TESTED:
        tile = tile_for(TOP_TILES, rows, 4 if dtype == "fp32" else 2)
        k = 4 if rows == 16 else MAX_K
        found.append(
            Variant(
                name=f"top-{dtype}-hidden{hidden}-rows{rows}-k{k}",
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
                    "ROWS": tile.rows,
                    "COLUMNS": tile.columns,
                    "DEPTH": tile.depth,
                },
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
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
