"""Which of a thread's draft nodes are accepted, once all chunks of all its rows have been read."""

from __future__ import annotations

import triton
import triton.language as tl

from .scores import load_possible, merge_best, merge_stats


@triton.jit
def accept(
    logits_ptr,
    tokens_ptr,
    parents_ptr,
    bans_ptr,
    typical_ptr,
    best_ptr,
    stats_ptr,
    out_ptr,  # of this thread
    stride,
    vocab,
    thread,
    first,
    count,
    chunks,
    depth,
    fork_id,
    child_id,
    TYPICAL: tl.constexpr,
    BANS: tl.constexpr,
    NODE_BLOCK: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
):
    """Merges one thread's partial results and writes the tokens it accepts. Nodes are numbered from its root, 0."""
    node = tl.arange(0, NODE_BLOCK)
    exists = node < count
    drafted = exists & (node > 0)
    token = tl.load(tokens_ptr + first + node, mask=exists, other=-1)
    parent = tl.load(parents_ptr + first + node, mask=drafted, other=0) - first
    parent = tl.where(drafted, parent, 0)

    choice = merge_best(best_ptr, first, exists, chunks, NODE_BLOCK, CHUNK_BLOCK)
    if TYPICAL:
        epsilon = tl.load(typical_ptr + 2 * thread)
        if epsilon >= 0:
            delta = tl.load(typical_ptr + 2 * thread + 1)
            log_sum, entropy = merge_stats(stats_ptr, first, exists, chunks, NODE_BLOCK, CHUNK_BLOCK)
            known = drafted & (token >= 0) & (token < vocab)
            banned_id = tl.full([NODE_BLOCK], -1, tl.int32)
            if BANS:
                banned = tl.load(bans_ptr + first + parent, mask=drafted, other=0) & 1
                banned_id = tl.where(banned != 0, fork_id, -1)
            line_ptr = logits_ptr + (first + parent).to(tl.int64) * stride
            log_prob = load_possible(line_ptr, token, known, banned_id, child_id) - tl.gather(log_sum, parent, 0)
            limit = tl.minimum(epsilon, delta * tl.exp(-tl.gather(entropy, parent, 0)))
            allowed = known & (tl.exp(log_prob) > limit)
            step_of, last, length = _likeliest_path(allowed, parent, log_prob, depth, NODE_BLOCK)
        else:
            step_of, last, length = _walk(drafted, token, parent, choice, depth, NODE_BLOCK)
    else:
        step_of, last, length = _walk(drafted, token, parent, choice, depth, NODE_BLOCK)

    bonus = tl.sum(tl.where(node == last, choice, 0))
    tl.store(out_ptr, length + 1)
    tl.store(out_ptr + 1, first + last)

    width = depth + 1
    out_tokens_ptr = out_ptr + 2
    out_rows_ptr = out_tokens_ptr + width
    on_path = step_of >= 0
    tl.store(out_tokens_ptr + step_of, token, mask=on_path)
    tl.store(out_rows_ptr + step_of, first + node, mask=on_path)
    step_out = tl.arange(0, WIDTH_BLOCK)
    behind = (step_out >= length) & (step_out < width)
    tl.store(out_tokens_ptr + step_out, tl.where(step_out == length, bonus, -1), mask=behind)
    tl.store(out_rows_ptr + step_out, tl.full([WIDTH_BLOCK], -1, tl.int32), mask=behind)


@triton.jit
def _walk(drafted, token, parent, choice, depth, NODE_BLOCK: tl.constexpr):
    """`reference.walk`: each node's place on the accepted path (-1: off it), the path's last node, its length."""
    node = tl.arange(0, NODE_BLOCK)
    step_of = tl.full([NODE_BLOCK], -1, tl.int32)
    last = tl.full([], 0, tl.int32)
    length = tl.full([], 0, tl.int32)
    matches = drafted & (token >= 0) & (token == tl.gather(choice, parent, 0))
    walking = depth > 0
    while walking:
        child = tl.min(tl.where(matches & (parent == last), node, NODE_BLOCK))
        found = child < NODE_BLOCK
        step_of = tl.where(node == child, length, step_of)
        last = tl.where(found, child, last)
        length += found.to(tl.int32)
        walking = found & (length < depth)
    return step_of, last, length


@triton.jit
def _likeliest_path(allowed, parent, log_prob, depth, NODE_BLOCK: tl.constexpr):
    """`reference.likeliest_path`, from the nodes that its rule allows below their parents; returns as `_walk`."""
    node = tl.arange(0, NODE_BLOCK)
    step_of = tl.full([NODE_BLOCK], -1, tl.int32)
    # After pass d all accepted paths of d nodes are known.
    reached = (node == 0).to(tl.int32)
    level = tl.zeros([NODE_BLOCK], tl.int32)
    path_log_prob = tl.zeros([NODE_BLOCK], tl.float32)
    step = 0
    while step < depth:
        extends = allowed & (tl.gather(reached, parent, 0) != 0)
        level = tl.where(extends, tl.gather(level, parent, 0) + 1, level)
        path_log_prob = tl.where(extends, tl.gather(path_log_prob, parent, 0) + log_prob, path_log_prob)
        reached = tl.where(extends, 1, reached)
        step += 1
    length = tl.max(tl.where(reached != 0, level, 0))
    deepest = (reached != 0) & (level == length)
    greatest = tl.max(tl.where(deepest, path_log_prob, -float("inf")))
    last = tl.min(tl.where(deepest & (path_log_prob == greatest), node, NODE_BLOCK))
    ancestor = last
    remaining = length
    while remaining > 0:
        remaining -= 1
        step_of = tl.where(node == ancestor, remaining, step_of)
        ancestor = tl.sum(tl.where(node == ancestor, parent, 0))
    return step_of, last, length
