"""From logits to accepted paths, for all threads in one launch that streams the vocabulary once.

Each program reads one chunk of one row and leaves partial results. The last of a thread's programs to finish merges
them in a fixed order and walks the thread's draft tree, so threads are walked side by side and nothing is launched
twice. A chunk's size does not depend on what else is in the launch, and neither do the results.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .aot import Variant
from .reference import Noise, TypicalAcceptance, Verified

# One program's share of a row. Greedy and typical hold it in registers at once: 32 values a thread, whose loads are
# all in flight together. Noise is float64, and goes through in smaller blocks.
CHUNK = 4096
_NOISE_BLOCK = 512
_NUM_WARPS = 4
_MERGED = 512  # partial results merged at once, at most

_LOWEST = tl.constexpr(-(2**31))
_IMPOSSIBLE = tl.constexpr(-0x7F800001)  # _sortable(-inf)


@dataclass(slots=True)
class VerifyWorkspace:
    """Buffers of one shape of launch. A launch leaves it ready for the next one, so a CUDA graph may hold it.

    A launch that did not run to its end leaves `counters` dirty: make a new one.
    """

    chunk: int
    best: torch.Tensor  # int64 [M, chunks]: the chunk's best score and where, in one sortable word
    stats: torch.Tensor  # float32 [M, chunks, 3]: maximum, sum of exponentials, sum of those times their exponent
    counters: torch.Tensor  # int32 [T], programs of the thread that are done; zero between launches
    out: Verified

    @classmethod
    def make(
        cls, rows: int, threads: int, vocab_size: int, depth: int, device: torch.device | str, chunk: int = CHUNK
    ) -> VerifyWorkspace:
        """For `rows` rows of `vocab_size` logits in `threads` threads and paths of up to `depth` draft nodes."""
        chunks = triton.cdiv(vocab_size, chunk)
        return cls(
            chunk,
            torch.empty(rows, chunks, dtype=torch.int64, device=device),
            torch.empty(rows, chunks, 3, dtype=torch.float32, device=device),
            torch.zeros(threads, dtype=torch.int32, device=device),
            Verified(torch.empty(threads, 3 + 2 * (depth + 1), dtype=torch.int32, device=device)),
        )


def verify(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    first_rows: torch.Tensor,
    depth: int,
    bans: torch.Tensor | None = None,
    control: tuple[int, int] | None = None,
    eos_ids: torch.Tensor | None = None,
    noise: Noise | None = None,
    typical: TypicalAcceptance | None = None,
    most_rows: int = 65,
    workspace: VerifyWorkspace | None = None,
) -> Verified:
    """As `reference.verify`, which says what it does and takes the same arguments but for these:

    most_rows: no thread has more rows than this, the root among them; it sets the width of the walk. Not checked,
        since the count is on the device.
    workspace: of this launch's shape; the results are its `out`, until the next launch. None: made for this call.

    `logits` may have any row stride. No value is read by the host. AssertionError for a shape or dtype that differs.
    """
    rows, vocab_size = logits.shape
    threads = len(first_rows) - 1
    assert depth >= 0, depth
    assert logits.stride(1) == 1 or vocab_size == 1, logits.stride()
    if workspace is None:
        workspace = VerifyWorkspace.make(rows, threads, vocab_size, depth, logits.device)
    chunks = triton.cdiv(vocab_size, workspace.chunk)
    width = depth + 1
    assert workspace.best.shape == (rows, chunks), (workspace.best.shape, rows, chunks)
    assert workspace.out.packed.shape == (threads, 3 + 2 * width), (workspace.out.packed.shape, threads, width)
    for name, tensor in (("tokens", tokens), ("parents", parents), ("first_rows", first_rows), ("bans", bans)):
        assert tensor is None or (tensor.dtype == torch.int32 and tensor.is_contiguous()), f"{name}: {tensor.dtype}"
    assert len(tokens) == len(parents) == rows, (len(tokens), len(parents), rows)
    assert eos_ids is None or eos_ids.dtype == torch.int32, eos_ids
    for source in noise or ():
        assert source.dtype == torch.int64 and source.is_contiguous(), source.dtype
    fork_id, child_id = control or (-1, -1)
    eos_count = 0 if eos_ids is None else len(eos_ids)
    node_block = triton.next_power_of_2(most_rows)
    _verify_kernel[(chunks, max(rows, threads))](
        logits,
        tokens,
        parents,
        first_rows,
        bans,
        eos_ids,
        *(noise or (None, None, None)),
        workspace.best,
        workspace.stats,
        workspace.counters,
        workspace.out.packed,
        logits.stride(0),
        vocab_size,
        rows,
        threads,
        chunks,
        depth,
        eos_count,
        fork_id,
        child_id,
        *(typical or (0.0, 0.0)),
        NOISE=noise is not None,
        TYPICAL=typical is not None,
        BANS=bans is not None and control is not None,
        CHUNK=workspace.chunk,
        BLOCK=workspace.chunk if noise is None else min(workspace.chunk, _NOISE_BLOCK),
        THREAD_BLOCK=triton.next_power_of_2(threads),
        NODE_BLOCK=node_block,
        CHUNK_BLOCK=_chunk_block(chunks, node_block),
        EOS_BLOCK=triton.next_power_of_2(eos_count) if eos_count else 0,
        WIDTH_BLOCK=triton.next_power_of_2(width),
        num_warps=_NUM_WARPS,
    )
    return workspace.out


def _chunk_block(chunks: int, node_block: int) -> int:
    return min(triton.next_power_of_2(chunks), max(1, _MERGED // node_block))


@triton.jit
def _sortable(x):
    """float32 -> int32 in the same order, -0 equal to 0; not for NaN."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _gumbel(seed, key, position, first, BLOCK: tl.constexpr):
    """reference.gumbel_noise at `first` and on, float64 [BLOCK]; `first` is a multiple of 4."""
    block = first // 4 + tl.arange(0, BLOCK // 4)
    none = tl.zeros_like(block)
    low = none + (key & 0xFFFFFFFF).to(tl.int32)
    high = none + ((key >> 32) & 0xFFFFFFFF).to(tl.int32)
    word0, word1, word2, word3 = tl.philox(seed, block, none + (position & 0xFFFFFFFF).to(tl.int32), low, high)
    words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
    uniform = (words.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2**-32
    return -tl.log(-tl.log(uniform))


# What changes from step to step must not compile anew where it happens to be 1 or a multiple of 16.
@triton.jit(do_not_specialize=["rows", "threads", "depth", "eos_count"])
def _verify_kernel(
    logits_ptr,  # [M, vocab], rows `stride` apart
    tokens_ptr,  # int32 [M]
    parents_ptr,  # int32 [M]
    first_rows_ptr,  # int32 [T + 1]
    bans_ptr,  # int32 [M], where BANS
    eos_ptr,  # int32 [eos_count]
    seeds_ptr,  # int64 [T], where NOISE
    keys_ptr,  # int64 [T], where NOISE
    positions_ptr,  # int64 [M], where NOISE
    best_ptr,  # int64 [M, chunks]
    stats_ptr,  # float32 [M, chunks, 3], where TYPICAL
    counters_ptr,  # int32 [T]
    out_ptr,  # int32 [T, 3 + 2 * (depth + 1)]
    stride,
    vocab,
    rows,
    threads,
    chunks,
    depth,
    eos_count,
    fork_id,
    child_id,
    epsilon,
    delta,
    NOISE: tl.constexpr,
    TYPICAL: tl.constexpr,
    BANS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    THREAD_BLOCK: tl.constexpr,
    NODE_BLOCK: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
    EOS_BLOCK: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    i_thread = tl.arange(0, THREAD_BLOCK)
    starts = tl.load(first_rows_ptr + i_thread, mask=i_thread < threads, other=0x7FFFFFFF)
    width = depth + 1

    # A thread without rows has no program of its own.
    start = tl.load(first_rows_ptr + row, mask=row < threads, other=0)
    stop = tl.load(first_rows_ptr + row + 1, mask=row < threads, other=1)
    if (chunk == 0) & (start == stop):
        i_out = tl.arange(0, 8 * WIDTH_BLOCK)
        nothing = tl.where((i_out == 0) | (i_out == 2), 0, -1)
        tl.store(out_ptr + row * (3 + 2 * width) + i_out, nothing, mask=i_out < 3 + 2 * width)

    used = tl.load(first_rows_ptr + threads)
    if (row < rows) & (row < used):
        thread = tl.sum((starts <= row).to(tl.int32)) - 1
        first = tl.load(first_rows_ptr + thread)
        count = tl.load(first_rows_ptr + thread + 1) - first
        line_ptr = logits_ptr + row.to(tl.int64) * stride
        banned = False
        if BANS:
            banned = (tl.load(bans_ptr + row) & 1) != 0
        keys = tl.full([BLOCK], _LOWEST, tl.int32)
        ids = tl.zeros([BLOCK], tl.int32)
        high = -float("inf")
        total = 0.0
        spread = 0.0
        for offset in range(0, CHUNK, BLOCK):
            here = chunk * CHUNK + offset + tl.arange(0, BLOCK)
            inside = here < vocab
            x = tl.load(line_ptr + here, mask=inside, other=-float("inf")).to(tl.float32)
            x = tl.where((x != x) | (here == child_id) | ((here == fork_id) & banned), -float("inf"), x)
            scores = x
            if NOISE:
                seed = tl.load(seeds_ptr + thread)
                key = tl.load(keys_ptr + thread)
                position = tl.load(positions_ptr + row)
                noise = _gumbel(seed, key, position, chunk * CHUNK + offset, BLOCK)
                scores = (x.to(tl.float64) + noise).to(tl.float32)
            new = tl.where(inside, _sortable(scores), _LOWEST)
            ids = tl.where(new > keys, here, ids)
            keys = tl.maximum(new, keys)
            if TYPICAL:
                top = tl.maximum(high, tl.max(x))
                rescale = tl.where(high == -float("inf"), 0.0, tl.exp(high - top))
                exponents = tl.where(x == -float("inf"), 0.0, x - top)
                weights = tl.where(x == -float("inf"), 0.0, tl.exp(x - top))
                lowered = tl.where(high == -float("inf"), 0.0, high - top)
                spread = rescale * (spread + lowered * total) + tl.sum(weights * exponents)
                total = rescale * total + tl.sum(weights)
                high = top
        # The greatest word has the greatest score, and of equals the lowest id.
        words = (keys.to(tl.int64) << 32) | (0xFFFFFFFF - ids.to(tl.int64))
        tl.store(best_ptr + row * chunks + chunk, tl.max(words))
        if TYPICAL:
            stat_ptr = stats_ptr + (row * chunks + chunk) * 3
            tl.store(stat_ptr, high)
            tl.store(stat_ptr + 1, total)
            tl.store(stat_ptr + 2, spread)
        # All warps' stores come before the one thread that counts; whoever sees the count sees the stores.
        tl.debug_barrier()
        done = tl.atomic_add(counters_ptr + thread, 1, sem="acq_rel", scope="gpu")
        if done == count * chunks - 1:
            tl.store(counters_ptr + thread, 0)
            _walk(
                logits_ptr,
                tokens_ptr,
                parents_ptr,
                bans_ptr,
                eos_ptr,
                best_ptr,
                stats_ptr,
                out_ptr + thread * (3 + 2 * width),
                stride,
                vocab,
                first,
                count,
                chunks,
                depth,
                eos_count,
                fork_id,
                child_id,
                epsilon,
                delta,
                TYPICAL,
                BANS,
                NODE_BLOCK,
                CHUNK_BLOCK,
                EOS_BLOCK,
                WIDTH_BLOCK,
            )


@triton.jit
def _walk(
    logits_ptr,
    tokens_ptr,
    parents_ptr,
    bans_ptr,
    eos_ptr,
    best_ptr,
    stats_ptr,
    out_ptr,  # of this thread
    stride,
    vocab,
    first,
    count,
    chunks,
    depth,
    eos_count,
    fork_id,
    child_id,
    epsilon,
    delta,
    TYPICAL: tl.constexpr,
    BANS: tl.constexpr,
    NODE_BLOCK: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
    EOS_BLOCK: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
):
    """Merges one thread's partial results and writes what it chose. Nodes are numbered from its root, 0."""
    node = tl.arange(0, NODE_BLOCK)
    exists = node < count
    drafted = exists & (node > 0)
    token = tl.load(tokens_ptr + first + node, mask=exists, other=-1)
    parent = tl.load(parents_ptr + first + node, mask=drafted, other=0) - first
    parent = tl.where(drafted, parent, 0)

    choice = _merge_best(best_ptr, first, exists, chunks, NODE_BLOCK, CHUNK_BLOCK)
    # Step at which the path goes through a node, -1 off the path.
    step_of = tl.full([NODE_BLOCK], -1, tl.int32)
    last = tl.full([], 0, tl.int32)
    length = tl.full([], 0, tl.int32)
    if TYPICAL:
        log_sum, entropy = _merge_stats(stats_ptr, first, exists, chunks, NODE_BLOCK, CHUNK_BLOCK)
        known = drafted & (token >= 0) & (token < vocab)
        x_ptr = logits_ptr + (first + parent).to(tl.int64) * stride + token
        x = tl.load(x_ptr, mask=known, other=-float("inf")).to(tl.float32)
        banned = False
        if BANS:
            banned = (token == fork_id) & ((tl.load(bans_ptr + first + parent, mask=drafted, other=0) & 1) != 0)
        x = tl.where((x != x) | (token == child_id) | banned, -float("inf"), x)
        log_prob = x - tl.gather(log_sum, parent, 0)
        limit = tl.minimum(epsilon, delta * tl.exp(-tl.gather(entropy, parent, 0)))
        fits = known & (tl.exp(log_prob) > limit)
        # After pass d every path of d nodes is known.
        reached = (node == 0).to(tl.int32)
        level = tl.zeros([NODE_BLOCK], tl.int32)
        chance = tl.zeros([NODE_BLOCK], tl.float32)
        step = 0
        while step < depth:
            extends = fits & (tl.gather(reached, parent, 0) != 0)
            level = tl.where(extends, tl.gather(level, parent, 0) + 1, level)
            chance = tl.where(extends, tl.gather(chance, parent, 0) + log_prob, chance)
            reached = tl.where(extends, 1, reached)
            step += 1
        length = tl.max(tl.where(reached != 0, level, 0))
        deepest = (reached != 0) & (level == length)
        likeliest = tl.max(tl.where(deepest, chance, -float("inf")))
        last = tl.min(tl.where(deepest & (chance == likeliest), node, NODE_BLOCK))
        above = last
        left = length
        while left > 0:
            left -= 1
            step_of = tl.where(node == above, left, step_of)
            above = tl.sum(tl.where(node == above, parent, 0))
    else:
        guessed = drafted & (token >= 0) & (token == tl.gather(choice, parent, 0))
        going = depth > 0
        while going:
            child = tl.min(tl.where(guessed & (parent == last), node, NODE_BLOCK))
            found = child < NODE_BLOCK
            step_of = tl.where(node == child, length, step_of)
            last = tl.where(found, child, last)
            length += found.to(tl.int32)
            going = found & (length < depth)

    bonus = tl.sum(tl.where(node == last, choice, 0))
    on_path = step_of >= 0
    flags = tl.max((on_path & (token == fork_id)).to(tl.int32)) | ((bonus == fork_id) & (bonus >= 0)).to(tl.int32)
    if EOS_BLOCK > 0:
        i_eos = tl.arange(0, EOS_BLOCK)
        eos = tl.load(eos_ptr + i_eos, mask=i_eos < eos_count, other=-1)
        ends = on_path[:, None] & (token[:, None] == eos[None, :])
        ended = (eos == bonus) & (bonus >= 0)
        flags |= (tl.max(tl.max(ends.to(tl.int32), axis=1)) | tl.max(ended.to(tl.int32))) << 1
    tl.store(out_ptr, length + 1)
    tl.store(out_ptr + 1, first + last)
    tl.store(out_ptr + 2, flags)

    width = depth + 1
    out_tokens_ptr = out_ptr + 3
    out_rows_ptr = out_tokens_ptr + width
    tl.store(out_tokens_ptr + step_of, token, mask=on_path)
    tl.store(out_rows_ptr + step_of, first + node, mask=on_path)
    step_out = tl.arange(0, WIDTH_BLOCK)
    behind = (step_out >= length) & (step_out < width)
    tl.store(out_tokens_ptr + step_out, tl.where(step_out == length, bonus, -1), mask=behind)
    tl.store(out_rows_ptr + step_out, tl.full([WIDTH_BLOCK], -1, tl.int32), mask=behind)


@triton.jit
def _merge_best(best_ptr, first, exists, chunks, NODE_BLOCK: tl.constexpr, CHUNK_BLOCK: tl.constexpr):
    """What each node's row chooses, int32 [NODE_BLOCK]; -1 where nothing is possible."""
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
def _merge_stats(stats_ptr, first, exists, chunks, NODE_BLOCK: tl.constexpr, CHUNK_BLOCK: tl.constexpr):
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


def variants() -> list[Variant]:
    """Logits in each dtype; greedy, sampling and typical; few and many nodes."""
    pointers = {
        "tokens_ptr": "*i32",
        "parents_ptr": "*i32",
        "first_rows_ptr": "*i32",
        "bans_ptr": "*i32",
        "eos_ptr": "*i32",
        "seeds_ptr": "*i64",
        "keys_ptr": "*i64",
        "positions_ptr": "*i64",
        "best_ptr": "*i64",
        "stats_ptr": "*fp32",
        "counters_ptr": "*i32",
        "out_ptr": "*i32",
    }
    numbers = ("stride", "vocab", "rows", "threads", "chunks", "depth", "eos_count", "fork_id", "child_id")
    found = []
    for kind, dtype, nodes in (
        ("greedy", "fp32", 128),
        ("greedy", "bf16", 16),
        ("sampling", "fp32", 128),
        ("sampling", "fp16", 16),
        ("typical", "fp32", 128),
        ("typical", "bf16", 16),
    ):
        found.append(
            Variant(
                name=f"verify-{kind}-{dtype}-nodes{nodes}",
                kernel=_verify_kernel,
                signature={
                    "logits_ptr": f"*{dtype}",
                    **pointers,
                    **dict.fromkeys(numbers, "i32"),
                    "epsilon": "fp32",
                    "delta": "fp32",
                },
                constexprs={
                    "NOISE": kind == "sampling",
                    "TYPICAL": kind == "typical",
                    "BANS": True,
                    "CHUNK": CHUNK,
                    "BLOCK": _NOISE_BLOCK if kind == "sampling" else CHUNK,
                    "THREAD_BLOCK": 64,
                    "NODE_BLOCK": nodes,
                    "CHUNK_BLOCK": _chunk_block(triton.cdiv(128256, CHUNK), nodes),
                    "EOS_BLOCK": 4,
                    "WIDTH_BLOCK": 16,
                },
                num_warps=_NUM_WARPS,
                num_stages=3,
                divisible=("logits_ptr", *pointers, "stride", "vocab"),
            )
        )
    return found
