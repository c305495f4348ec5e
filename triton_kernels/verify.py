"""From logits to accepted paths, for all threads in one launch that streams the vocabulary once.

Each program reads one chunk of one row and leaves partial results. The last of a thread's programs to finish merges
them in a fixed order and walks the thread's draft tree, so threads are walked side by side and nothing is launched
twice. Each thread has its own mode: greedy or sampled, exact or typical. Sampled rows read their chunk in small blocks
with noise, all others read it at once, and typical acceptance reads it once more for its sums. So the other threads
of a launch, and their modes, change no result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .accept import accept
from .aot import Variant
from .reference import Noise, Verified
from .scores import best_of_chunk, store_stats

# One program's share of a row. It is held in registers at once: 32 values for each of the program's 128 lanes, whose
# loads are all in flight together. Noise is float64, and a sampled row goes through in smaller blocks.
CHUNK = 4096
_NOISE_BLOCK = 512
_NUM_WARPS = 4
_MAX_MERGED = 512  # partial results merged at once


@dataclass(slots=True)
class VerifyWorkspace:
    """Buffers of one shape of launch. A launch leaves it ready for the next one, so a CUDA graph may hold it.

    A launch that did not run to its end leaves `counters` dirty: make a new one.
    """

    chunk: int
    best: torch.Tensor  # int64 [M, chunks]: the chunk's greatest score and its token id, in one sortable word
    stats: torch.Tensor  # float32 [M, chunks, 3]: maximum, sum of exponentials, sum of those times their exponent
    counters: torch.Tensor  # int32 [T], finished programs of the thread; zero between launches
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
            Verified(torch.empty(threads, 2 + 2 * (depth + 1), dtype=torch.int32, device=device)),
        )


def verify(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    first_rows: torch.Tensor,
    depth: int,
    bans: torch.Tensor | None = None,
    control: tuple[int, int] | None = None,
    noise: Noise | None = None,
    typical: torch.Tensor | None = None,
    max_rows: int = 65,
    workspace: VerifyWorkspace | None = None,
) -> Verified:
    """What `reference.verify` computes, from the same arguments and two more.

    Args:
        logits: may have any row stride.
        max_rows: no thread has more rows than this, its root included. It sets the width of the walk. It is not
            checked, because the counts are on the device.
        workspace: of this launch's shape. The results are its `out`, valid until its next launch. None: made for this
            call.

    Returns: `workspace.out`. The host reads no value.

    Raises:
        AssertionError: a shape or a dtype differs.
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
    assert workspace.out.packed.shape == (threads, 2 + 2 * width), (workspace.out.packed.shape, threads, width)
    _check("tokens", tokens, torch.int32, rows)
    _check("parents", parents, torch.int32, rows)
    _check("first_rows", first_rows, torch.int32, threads + 1)
    _check("bans", bans, torch.int32, rows)
    _check("typical", typical, torch.float32, threads, 2)
    if noise is not None:
        _check("noise.seeds", noise.seeds, torch.int64, threads)
        _check("noise.keys", noise.keys, torch.int64, threads)
        _check("noise.positions", noise.positions, torch.int64, rows)
        _check("noise.sampled", noise.sampled, torch.int32, threads)
    fork_id, child_id = control or (-1, -1)
    node_block = triton.next_power_of_2(max_rows)
    _verify_kernel[(chunks, max(rows, threads))](
        logits,
        tokens,
        parents,
        first_rows,
        bans,
        *(noise or (None, None, None, None)),
        typical,
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
        fork_id,
        child_id,
        NOISE=noise is not None,
        TYPICAL=typical is not None,
        BANS=bans is not None and control is not None,
        CHUNK=workspace.chunk,
        NOISE_BLOCK=min(workspace.chunk, _NOISE_BLOCK),
        THREAD_BLOCK=triton.next_power_of_2(threads),
        NODE_BLOCK=node_block,
        CHUNK_BLOCK=_chunk_block(chunks, node_block),
        WIDTH_BLOCK=triton.next_power_of_2(width),
        num_warps=_NUM_WARPS,
    )
    return workspace.out


def _check(name: str, tensor: torch.Tensor | None, dtype: torch.dtype, *shape: int) -> None:
    if tensor is not None:
        assert tensor.dtype == dtype and tensor.shape == shape and tensor.is_contiguous(), (
            f"{name}: {tensor.dtype} {list(tensor.shape)}, strides {tensor.stride()}; expected {dtype} {list(shape)}"
        )


def _chunk_block(chunks: int, node_block: int) -> int:
    block: int = triton.next_power_of_2(chunks)
    return min(block, max(1, _MAX_MERGED // node_block))


# What changes from step to step must not compile anew where it happens to be 1 or a multiple of 16.
@triton.jit(do_not_specialize=["rows", "threads", "depth"])
def _verify_kernel(
    logits_ptr,  # [M, vocab], rows `stride` apart
    tokens_ptr,  # int32 [M]
    parents_ptr,  # int32 [M]
    first_rows_ptr,  # int32 [T + 1]
    bans_ptr,  # int32 [M], where BANS
    seeds_ptr,  # int64 [T], where NOISE
    keys_ptr,  # int64 [T], where NOISE
    positions_ptr,  # int64 [M], where NOISE
    sampled_ptr,  # int32 [T], where NOISE
    typical_ptr,  # float32 [T, 2], where TYPICAL
    best_ptr,  # int64 [M, chunks]
    stats_ptr,  # float32 [M, chunks, 3], where TYPICAL
    counters_ptr,  # int32 [T]
    out_ptr,  # int32 [T, 2 + 2 * (depth + 1)]
    stride,
    vocab,
    rows,
    threads,
    chunks,
    depth,
    fork_id,
    child_id,
    NOISE: tl.constexpr,
    TYPICAL: tl.constexpr,
    BANS: tl.constexpr,
    CHUNK: tl.constexpr,
    NOISE_BLOCK: tl.constexpr,
    THREAD_BLOCK: tl.constexpr,
    NODE_BLOCK: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    i_thread = tl.arange(0, THREAD_BLOCK)
    starts = tl.load(first_rows_ptr + i_thread, mask=i_thread < threads, other=0x7FFFFFFF)
    out_width = 2 + 2 * (depth + 1)

    # A thread without rows has no program of its own.
    start = tl.load(first_rows_ptr + row, mask=row < threads, other=0)
    stop = tl.load(first_rows_ptr + row + 1, mask=row < threads, other=1)
    if (chunk == 0) & (start == stop):
        i_out = tl.arange(0, 4 * WIDTH_BLOCK)
        tl.store(out_ptr + row * out_width + i_out, tl.where(i_out == 0, 0, -1), mask=i_out < out_width)

    used = tl.load(first_rows_ptr + threads)
    if (row < rows) & (row < used):
        thread = tl.sum((starts <= row).to(tl.int32)) - 1
        first = tl.load(first_rows_ptr + thread)
        count = tl.load(first_rows_ptr + thread + 1) - first
        line_ptr = logits_ptr + row.to(tl.int64) * stride
        banned_id = -1
        if BANS:
            banned_id = tl.where((tl.load(bans_ptr + row) & 1) != 0, fork_id, -1)
        if NOISE:
            if tl.load(sampled_ptr + thread) != 0:
                seed = tl.load(seeds_ptr + thread)
                key = tl.load(keys_ptr + thread)
                position = tl.load(positions_ptr + row)
                best = best_of_chunk(
                    line_ptr, chunk, vocab, banned_id, child_id, seed, key, position, True, CHUNK, NOISE_BLOCK
                )
            else:
                best = best_of_chunk(line_ptr, chunk, vocab, banned_id, child_id, 0, 0, 0, False, CHUNK, CHUNK)
        else:
            best = best_of_chunk(line_ptr, chunk, vocab, banned_id, child_id, 0, 0, 0, False, CHUNK, CHUNK)
        tl.store(best_ptr + row * chunks + chunk, best)
        if TYPICAL:
            epsilon = tl.load(typical_ptr + 2 * thread)
            if epsilon >= 0:
                stat_ptr = stats_ptr + (row * chunks + chunk) * 3
                store_stats(stat_ptr, line_ptr, chunk, vocab, banned_id, child_id, CHUNK)
        # All warps' stores come before the one lane that counts; whoever sees the count sees the stores.
        tl.debug_barrier()
        done = tl.atomic_add(counters_ptr + thread, 1, sem="acq_rel", scope="gpu")
        if done == count * chunks - 1:
            tl.store(counters_ptr + thread, 0)
            accept(
                logits_ptr,
                tokens_ptr,
                parents_ptr,
                bans_ptr,
                typical_ptr,
                best_ptr,
                stats_ptr,
                out_ptr + thread * out_width,
                stride,
                vocab,
                thread,
                first,
                count,
                chunks,
                depth,
                fork_id,
                child_id,
                TYPICAL,
                BANS,
                NODE_BLOCK,
                CHUNK_BLOCK,
                WIDTH_BLOCK,
            )


def variants() -> list[Variant]:
    """Logits in each dtype; with and without sampled and typical threads in the launch; few and many nodes."""
    pointers = {
        "tokens_ptr": "*i32",
        "parents_ptr": "*i32",
        "first_rows_ptr": "*i32",
        "bans_ptr": "*i32",
        "seeds_ptr": "*i64",
        "keys_ptr": "*i64",
        "positions_ptr": "*i64",
        "sampled_ptr": "*i32",
        "typical_ptr": "*fp32",
        "best_ptr": "*i64",
        "stats_ptr": "*fp32",
        "counters_ptr": "*i32",
        "out_ptr": "*i32",
    }
    numbers = ("stride", "vocab", "rows", "threads", "chunks", "depth", "fork_id", "child_id")
    found = []
    for kind, dtype, nodes in (
        ("greedy", "fp32", 128),
        ("greedy", "bf16", 16),
        ("sampling", "fp32", 128),
        ("sampling", "fp16", 16),
        ("typical", "fp32", 128),
        ("typical", "bf16", 16),
        ("mixed", "fp32", 128),
        ("mixed", "bf16", 16),
    ):
        found.append(
            Variant(
                name=f"verify-{kind}-{dtype}-nodes{nodes}",
                kernel=_verify_kernel,
                signature={"logits_ptr": f"*{dtype}", **pointers, **dict.fromkeys(numbers, "i32")},
                constexprs={
                    "NOISE": kind in ("sampling", "mixed"),
                    "TYPICAL": kind in ("typical", "mixed"),
                    "BANS": True,
                    "CHUNK": CHUNK,
                    "NOISE_BLOCK": _NOISE_BLOCK,
                    "THREAD_BLOCK": 64,
                    "NODE_BLOCK": nodes,
                    "CHUNK_BLOCK": _chunk_block(triton.cdiv(128256, CHUNK), nodes),
                    "WIDTH_BLOCK": 16,
                },
                num_warps=_NUM_WARPS,
                num_stages=3,
                divisible=("logits_ptr", *pointers, "stride", "vocab"),
            )
        )
    return found
