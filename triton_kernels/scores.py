"""What a program leaves of its chunk of a row's logits, and what the chunks of a row come to.

Of each chunk there is its greatest score and the token that has it, in one sortable word; typical acceptance takes
three sums more. They are merged in the order of the chunks, whoever has finished first.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**31))
_IMPOSSIBLE = tl.constexpr(-0x7F800001)  # sortable(-inf)


@triton.jit
def sortable(x):
    """float32 -> int32 in the same order, -0 equal to 0; not for NaN."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _gumbel(seed, key, position, first, BLOCK: tl.constexpr):
    """`reference.gumbel_noise` at `first` and on, float64 [BLOCK]; `first` is a multiple of 4."""
    block = first // 4 + tl.arange(0, BLOCK // 4)
    none = tl.zeros_like(block)
    low = none + (key & 0xFFFFFFFF).to(tl.int32)
    high = none + ((key >> 32) & 0xFFFFFFFF).to(tl.int32)
    word0, word1, word2, word3 = tl.philox(seed, block, none + (position & 0xFFFFFFFF).to(tl.int32), low, high)
    words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
    uniform = (words.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2**-32
    return -tl.log(-tl.log(uniform))


@triton.jit
def load_possible(line_ptr, token, inside, banned_id, child_id):
    """A row's logits, float32, with -inf for what is NaN, banned or not inside."""
    x = tl.load(line_ptr + token, mask=inside, other=-float("inf")).to(tl.float32)
    return tl.where((x != x) | (token == child_id) | (token == banned_id), -float("inf"), x)


@triton.jit
def best_of_chunk(
    line_ptr,
    chunk,
    vocab,
    banned_id,
    child_id,
    seed,
    key,
    position,
    NOISE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The greatest score of the chunk and its token id in one word, int64; of equal scores the lowest id."""
    scores = tl.full([BLOCK], LOWEST, tl.int32)
    ids = tl.zeros([BLOCK], tl.int32)
    for offset in range(0, CHUNK, BLOCK):
        token = chunk * CHUNK + offset + tl.arange(0, BLOCK)
        inside = token < vocab
        x = load_possible(line_ptr, token, inside, banned_id, child_id)
        if NOISE:
            noise = _gumbel(seed, key, position, chunk * CHUNK + offset, BLOCK)
            x = (x.to(tl.float64) + noise).to(tl.float32)
        new = tl.where(inside, sortable(x), LOWEST)
        ids = tl.where(new > scores, token, ids)
        scores = tl.maximum(new, scores)
    return tl.max((scores.to(tl.int64) << 32) | (0xFFFFFFFF - ids.to(tl.int64)))


@triton.jit
def store_stats(stat_ptr, line_ptr, chunk, vocab, banned_id, child_id, CHUNK: tl.constexpr):
    """Three sums of the chunk for `merge_stats`. Always of the whole chunk: their rounding depends on nothing else."""
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    x = load_possible(line_ptr, token, token < vocab, banned_id, child_id)
    high = tl.max(x)
    exponents = tl.where(x == -float("inf"), 0.0, x - high)
    weights = tl.where(x == -float("inf"), 0.0, tl.exp(exponents))
    tl.store(stat_ptr, high)
    tl.store(stat_ptr + 1, tl.sum(weights))
    tl.store(stat_ptr + 2, tl.sum(weights * exponents))


@triton.jit
def merge_best(best_ptr, first, exists, chunks, NODE_BLOCK: tl.constexpr, CHUNK_BLOCK: tl.constexpr):
    """The token that each node's row chooses, int32 [NODE_BLOCK]; -1 where nothing is possible."""
    node = tl.arange(0, NODE_BLOCK)
    best = tl.full([NODE_BLOCK], -(2**63), tl.int64)
    start = 0
    while start < chunks:
        i_chunk = start + tl.arange(0, CHUNK_BLOCK)
        # Other programs wrote these: .cg reads them from L2, which they share.
        words = tl.load(
            best_ptr + (first + node)[:, None] * chunks + i_chunk[None, :],
            mask=exists[:, None] & (i_chunk < chunks)[None, :],
            other=-(2**63),
            cache_modifier=".cg",
        )
        best = tl.maximum(best, tl.max(words, axis=1))
        start += CHUNK_BLOCK
    return tl.where((best >> 32) > _IMPOSSIBLE, 0xFFFFFFFF - (best & 0xFFFFFFFF), -1).to(tl.int32)


@triton.jit
def merge_stats(stats_ptr, first, exists, chunks, NODE_BLOCK: tl.constexpr, CHUNK_BLOCK: tl.constexpr):
    """Log of the sum of exponentials and entropy of each node's row, float32 [NODE_BLOCK]."""
    node = tl.arange(0, NODE_BLOCK)
    high = tl.full([NODE_BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([NODE_BLOCK], tl.float32)
    spread = tl.zeros([NODE_BLOCK], tl.float32)
    start = 0
    while start < chunks:
        i_chunk = start + tl.arange(0, CHUNK_BLOCK)
        stat_ptr = stats_ptr + ((first + node)[:, None] * chunks + i_chunk[None, :]) * 3
        there = exists[:, None] & (i_chunk < chunks)[None, :]
        highs = tl.load(stat_ptr, mask=there, other=-float("inf"), cache_modifier=".cg")
        totals = tl.load(stat_ptr + 1, mask=there, other=0.0, cache_modifier=".cg")
        spreads = tl.load(stat_ptr + 2, mask=there, other=0.0, cache_modifier=".cg")
        top = tl.maximum(high, tl.max(highs, axis=1))
        lowered = tl.where(highs == -float("inf"), 0.0, highs - top[:, None])
        scale = tl.where(highs == -float("inf"), 0.0, tl.exp(lowered))
        before = tl.where(high == -float("inf"), 0.0, high - top)
        before_scale = tl.where(high == -float("inf"), 0.0, tl.exp(before))
        spread = before_scale * (spread + before * total) + tl.sum(scale * (spreads + lowered * totals), axis=1)
        total = before_scale * total + tl.sum(scale * totals, axis=1)
        high = top
        start += CHUNK_BLOCK
    log_total = tl.log(total)
    return high + log_total, log_total - spread / total
