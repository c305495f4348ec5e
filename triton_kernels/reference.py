"""Plain-torch twins of the kernels: their specification, the CPU path, and the oracle of their tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .layout import MAX_NODES, TreeLayout

_PHILOX_KEY = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUND = (0xD2511F53, 0xCD9E8D57)
_LOW = 0xFFFFFFFF


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one request's forest rows over the slots they may see.

    Args:
        query: [heads, rows, head_dim].
        key, value: [kv_heads, slots, head_dim]; any strides with the last dimension dense.
        bias: [heads // kv_heads * rows, slots] in the query's dtype, 0 for what a row sees and -inf for the rest, the
            same rows once for each query head of a KV head: built once a step, not once a layer.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv 2408.00118, section 2).
        sinks: [heads], a learned score per head that takes part in the softmax and carries no value.

    Returns: [rows, heads, value_head_dim].
    """
    heads, rows, dim = query.shape
    kv_heads = key.shape[0]
    # The query heads that share a KV head become rows, so that K and V are read once for all of them.
    packed = query.reshape(1, kv_heads, -1, dim)
    key, value = key[None], value[None]
    if softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(packed, key, value, attn_mask=bias, scale=scale)
    else:
        scores = packed @ key.transpose(-1, -2) * (dim**-0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = (scores + bias).float()
        if sinks is not None:
            column = sinks.float().reshape(1, kv_heads, -1, 1).repeat_interleave(rows, dim=2)
            scores = torch.cat([scores, column], dim=-1)
        weights = scores.softmax(dim=-1)[..., : key.shape[-2]]
        out = weights.to(value.dtype) @ value
    return out.reshape(heads, rows, -1).transpose(0, 1)


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
    """What the kernel of this name computes, query by query and in float64."""
    rows, heads, dim = query.shape
    group = heads // keys.shape[1]
    out = query.new_zeros(rows, heads, values.shape[2])
    seen = seen_slots(layout, window)
    for index, row in enumerate(layout.order.tolist()):
        key, value = (pool[seen[index]].double().repeat_interleave(group, dim=1) for pool in (keys, values))
        scores = torch.einsum("hd,shd->hs", query[row].double(), key) * (dim**-0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None]], dim=1)
        weights = scores.softmax(dim=1)[:, : len(key)]
        out[row] = torch.einsum("hs,shd->hd", weights, value).to(out.dtype)
    return out


def seen_slots(layout: TreeLayout, window: int | None = None) -> list[list[int]]:
    """Per query in `layout.order`, the slots it sees, in the order of its leaf's columns."""
    seen: list[dict[int, int]] = [{} for _ in layout.order]
    # Lists: reading a tensor of another device value by value would take minutes.
    chunks, all_slots, positions, lengths, ancestors = (
        table.tolist() for table in (layout.chunks, layout.slots, layout.positions, layout.lengths, layout.ancestors)
    )
    for entry, run, number, columns, first, count, _ in layout.items.tolist():
        for column in range(columns):
            slot = all_slots[chunks[entry + column // layout.chunk] + column % layout.chunk]
            at = number * layout.chunk + column
            for query in range(first, first + count):
                position, length = positions[query], lengths[query]
                if at < length:
                    visible = at <= position and (window is None or at > position - window)
                else:
                    visible = bool(ancestors[query] >> (at - length) & 1)
                if visible:
                    assert at not in seen[query], "two items hold the same column of a query"
                    seen[query][at] = slot
        assert run == -(-columns // layout.chunk)
    return [[slots[at] for at in sorted(slots)] for slots in seen]


class Descriptor(NamedTuple):
    """What `pack` reads of a step: views of one buffer, R commits, S leaves and W rows, all of them possibly padded."""

    rows: torch.Tensor  # int32 [4, W]: token, path position, slot, and the verified rows
    words: torch.Tensor  # int64 [W], of each row the draft nodes that it sees, bit by bit
    queries: torch.Tensor  # int32 [S + 1], where each leaf's begin
    leaves: torch.Tensor  # int32 [S, 3]: first row, queries on the path, length of the path
    commits: torch.Tensor  # int32 [2, R]: an entry of the table, -1 for none, and the slot that it becomes
    windows: torch.Tensor  # int32 [MAX_WINDOWS], path positions that a kind of layers sees; 0: no such kind


class Packed(NamedTuple):
    """What `pack` writes."""

    rows: torch.Tensor  # int64 [4, W]
    queries: torch.Tensor  # int32 [4, W]: order, positions, lengths and leaves of TreeLayout
    ancestors: torch.Tensor  # int64 [MAX_WINDOWS, W]


def pack(descriptor: Descriptor, table: torch.Tensor, packed: Packed) -> None:
    """Commits slots to the table of chunks, int32 [chunks, columns], and spreads leaves over their queries.

    The rows of a leaf are side by side: those on its path, then its draft nodes. A window narrows `words` to nodes that
    a row has in its window. Idempotent.
    """
    rows, words, queries, leaves, commits, windows = descriptor
    column, slot = commits[:, commits[0] >= 0]
    table.view(-1)[column.long()] = slot
    packed.rows.copy_(rows)
    counts = queries.diff()
    leaf = torch.repeat_interleave(torch.arange(len(leaves), dtype=torch.int64, device=rows.device), counts)
    first, pending, length = leaves[leaf].T
    order = first + torch.arange(len(leaf), dtype=torch.int64, device=rows.device) - queries[leaf]
    positions = rows[1, order]
    packed.queries[:] = torch.stack([order.int(), positions, length, leaf.int()])
    nodes = torch.arange(MAX_NODES, dtype=torch.int64, device=rows.device)
    drafted = nodes < (counts[leaf] - pending)[:, None]
    node_positions = rows[1, ((first + pending)[:, None] + nodes).clamp(max=rows.shape[1] - 1)]
    above = drafted & (words[order, None] >> nodes & 1).bool()
    for index, window in enumerate(windows.tolist()):
        if window:
            near = above & (node_positions > (positions - window)[:, None])
            packed.ancestors[index] = torch.where(near, 1 << nodes, 0).sum(1)


def philox(seed: int, thread: int, position: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """`count` random 32-bit words, int64 [count], a pure function of the first three arguments.

    Philox4x32-10 (Salmon et al., SC 2011) keyed with the 64-bit `seed`; the counter is (word // 4, position, thread),
    so every (seed, thread, position) has a stream of its own and any word can be computed alone, as a kernel would.
    """
    block = torch.arange((count + 3) // 4, device=device, dtype=torch.int64)
    c0, c1 = block, torch.full_like(block, position & _LOW)
    c2, c3 = torch.full_like(block, thread & _LOW), torch.full_like(block, (thread >> 32) & _LOW)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # int64 products wrap, but their bits are those of the unsigned product.
        p0, p1 = c0 * _PHILOX_ROUND[0], c2 * _PHILOX_ROUND[1]
        c0, c1, c2, c3 = (p1 >> 32 & _LOW) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32 & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _PHILOX_KEY[0]) & _LOW, (k1 + _PHILOX_KEY[1]) & _LOW
    return torch.stack([c0, c1, c2, c3], dim=1).reshape(-1)[:count]


def gumbel_noise(
    seed: int, thread: int, position: int, vocab_size: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Standard Gumbel noise for one token, float64 [vocab_size]: argmax(log-probs + noise) is an exact sample."""
    uniform = (philox(seed, thread, position, vocab_size, device).double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log(uniform))


def sample(scores: torch.Tensor, seed: int, thread: int, position: int) -> int:
    """The token that this (seed, thread, position) draws from softmax(scores), `scores` float [vocab_size]; as of
    `likeliest`, NaN is drawn by nobody and -1 stands where nothing can be."""
    return likeliest(noisy(scores, seed, thread, position))


def likeliest(scores: torch.Tensor) -> int:
    """Where the greatest of `scores` [vocab_size] is, of equals the first. NaN is as impossible as -inf, and where
    nothing is possible it is -1."""
    token = int(scores.argmax())
    if scores[token] > -torch.inf:  # NaN, which argmax takes first, is not
        return token
    scores = _possible(scores)
    token = int(scores.argmax())
    return token if scores[token] > -torch.inf else -1


def _possible(scores: torch.Tensor) -> torch.Tensor:
    """A copy with -inf for NaN."""
    return scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def noisy(scores: torch.Tensor, seed: int, thread: int, position: int) -> torch.Tensor:
    """What `sample` takes the argmax of, float32 [vocab_size].

    Noise and sum are float64: float32 has too few values near 0 and 1 for the tails. The rounded sum is what counts,
    of equals the lowest, so that a kernel can compare 32-bit scores and any split of the vocabulary agrees.
    """
    return (scores.double() + gumbel_noise(seed, thread, position, len(scores), scores.device)).float()


class Noise(NamedTuple):
    """Which threads are sampled, and what the counter-based noise of their choices depends on (DESIGN promise 2)."""

    seeds: torch.Tensor  # int64 [T], the 64 bits of a thread's seed
    keys: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [M], of the token that the row chooses, below 2**32
    sampled: torch.Tensor  # int32 [T], 1: the thread's rows get noise, 0: the thread is greedy


class TypicalAcceptance(NamedTuple):
    """Medusa's typical acceptance (arXiv 2401.10774, section 2.3.1), with the paper's defaults.

    A draft token is accepted where its probability is above min(epsilon, delta * exp(-entropy)): the surer the model
    is of what comes, the likelier a token must be. Both are 0 or more: with 0 all that is possible is accepted, with an
    epsilon of 1 and a large delta nothing.
    """

    epsilon: float = 0.09
    delta: float = 0.3

    def limit(self, entropy: float) -> float:
        return min(self.delta * math.exp(-entropy), self.epsilon)


@dataclass(frozen=True, slots=True)
class Verified:
    """What each of T threads accepted, at most D draft tokens each. One buffer, so that one copy reads it all."""

    packed: torch.Tensor  # int32 [T, 2 + 2 * (D + 1)]: length, last row, tokens, rows

    @property
    def lengths(self) -> torch.Tensor:
        """[T], the number of new tokens, the bonus token included; 0 for a thread without rows."""
        return self.packed[:, 0]

    @property
    def last_rows(self) -> torch.Tensor:
        """[T], the row whose logits chose the bonus token; -1 for a thread without rows."""
        return self.packed[:, 1]

    @property
    def tokens(self) -> torch.Tensor:
        """[T, D + 1], accepted draft tokens in order, the bonus token, then -1."""
        return self.packed[:, 2 : 2 + self._width]

    @property
    def rows(self) -> torch.Tensor:
        """[T, D + 1], column i the row of the draft node that accepted token i stands at, then -1."""
        return self.packed[:, 2 + self._width :]

    @property
    def _width(self) -> int:
        return (self.packed.shape[1] - 2) // 2


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
) -> Verified:
    """From logits to accepted tokens, each thread in its own mode and independent of the others.

    A row chooses the argmax of its logits, of equals the lowest id; a sampled thread's row that of its `noisy` logits.
    NaN is as impossible as -inf, and a row where nothing is possible chooses -1. A thread accepts the draft nodes of
    `walk`, or those of `likeliest_path` where it has thresholds. The last node's row (or the root's) chooses the bonus
    token.

    Args:
        logits: [M, vocab] float32, float16 or bfloat16; each thread's rows together, its root first, then its draft
            nodes, parents before children. Rows from first_rows[-1] on are padding.
        tokens: int32 [M], what stands at the row: the thread's last token, or a draft token.
        parents: int32 [M], the row of the parent; -1 at roots.
        first_rows: int32 [T + 1], ascending from 0; thread t has rows first_rows[t] to first_rows[t + 1] - 1.
        depth: no more nodes than this are accepted per thread.
        bans: int32 [M], bit 0 set where a fork may not be chosen; None: nowhere.
        control: ids of [Fork] and [Child]; [Child] is never chosen. None: no such tokens, and `bans` is not read.
        noise: None: all threads are greedy.
        typical: float32 [T, 2], a thread's `TypicalAcceptance`; a negative epsilon: the thread is verified exactly.
            None: all threads are.

    Returns: on the logits' device.

    Raises:
        ValueError: depth is negative.
    """
    if depth < 0:
        raise ValueError(f"depth is {depth}, must be 0 or more.")
    scores = _possible(logits.float())
    fork_id, child_id = control or (-1, -1)
    if control is not None:
        scores[:, child_id] = -torch.inf
        if bans is not None:
            scores[(bans & 1).bool(), fork_id] = -torch.inf
    bounds, ids, parent_rows = first_rows.tolist(), tokens.tolist(), parents.tolist()
    width = depth + 1
    packed = []
    for thread, (first, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if first == stop:
            packed.append([0, -1] + [-1] * 2 * width)
            continue
        choose = cache(partial(_choice, scores, noise, thread))
        thresholds = None if typical is None else TypicalAcceptance(*typical[thread].tolist())
        if thresholds is None or thresholds.epsilon < 0:
            accepted = walk(first, stop, choose, ids, parent_rows, depth)
        else:
            accepted = likeliest_path(first, stop, scores.__getitem__, ids, parent_rows, depth, thresholds)
        last = accepted[-1] if accepted else first
        chosen = [*(ids[row] for row in accepted), choose(last)]
        padding = [-1] * (width - len(chosen))
        packed.append([len(chosen), last, *chosen, *padding, *accepted, -1, *padding])
    return Verified(torch.tensor(packed, dtype=torch.int32, device=logits.device).view(-1, 2 + 2 * width))


def _choice(scores: torch.Tensor, noise: Noise | None, thread: int, row: int) -> int:
    if noise is None or not noise.sampled[thread]:
        return likeliest(scores[row])
    return sample(scores[row], int(noise.seeds[thread]), int(noise.keys[thread]), int(noise.positions[row]))


def walk(
    first: int, stop: int, choose: Callable[[int], int], ids: Sequence[int], parents: Sequence[int], depth: int
) -> list[int]:
    """The exact rule: a draft node is accepted iff its parent is and it drafts the token that its parent's row chooses.

    Of siblings with the same token the lowest row counts. Takes O(stop - first).

    Args:
        first, stop: the thread's rows, its root first, then its draft nodes, parents before children.
        choose: the token that a row chooses. It is called for the root, then for each accepted row, in the order of the
            path and once each; the last call gives the bonus token. After a negative token nothing more is accepted.
        ids: the token that stands at a row.
        parents: the row of a row's parent; not read at the root.
        depth: no more nodes than this are accepted.

    Returns: the accepted rows, from the root's child on.
    """
    accepted: list[int] = []
    row, token = first, choose(first)
    for node in range(first + 1, stop):
        if len(accepted) == depth:
            break
        if parents[node] == row and ids[node] == token >= 0:
            accepted.append(node)
            row, token = node, choose(node)
    return accepted


def likeliest_path(
    first: int,
    stop: int,
    scores: Callable[[int], torch.Tensor],
    ids: Sequence[int],
    parents: Sequence[int],
    depth: int,
    typical: TypicalAcceptance,
) -> list[int]:
    """Typical acceptance: a draft node is accepted iff its parent is and p > min(epsilon, delta * exp(-H)).

    p is the probability of its token behind its parent, H the entropy there. The path ends at the deepest accepted
    node; of equally deep ones at that with the likeliest path, then the lowest row, as medusa-llm's
    `evaluate_posterior` has it. Takes O(stop - first), and a softmax for each row that is asked.

    Args:
        first, stop, ids, parents, depth: as in `walk`.
        scores: float [vocab], a row's processed logits, where NaN is as impossible as -inf. It is called at most once a
            row, for accepted rows (and the root) that have children, parents first.
        typical: the thresholds.

    Returns: the rows of the path, from the root's child on.
    """

    @cache
    def distribution(row: int) -> tuple[torch.Tensor, float]:
        log_probs = _possible(scores(row).double()).log_softmax(-1)
        return log_probs, typical.limit(float(-torch.special.xlogy(log_probs.exp(), log_probs.exp()).sum()))

    def judge(row: int) -> tuple[float, float]:
        log_probs, limit = distribution(parents[row])
        return float(log_probs[ids[row]]) if 0 <= ids[row] < len(log_probs) else -math.inf, limit

    return deepest_path(first, stop, judge, parents, depth)


def deepest_path(
    first: int, stop: int, judge: Callable[[int], tuple[float, float]], parents: Sequence[int], depth: int
) -> list[int]:
    """`likeliest_path`, from a draft node's log-probability behind its parent and the limit that its probability has to
    be above. `judge` is called once a node, and for those alone whose parent is accepted.
    """
    paths = {first: (0, 0.0)}  # length and log-probability of the path to each accepted row
    for row in range(first + 1, stop):
        length, path_log_prob = paths.get(parents[row], (depth, 0.0))
        if length == depth:
            continue
        log_prob, limit = judge(row)
        if math.exp(log_prob) > limit:
            paths[row] = length + 1, path_log_prob + log_prob
    row = max(paths, key=paths.__getitem__)  # of equals the lowest row
    path: list[int] = []
    while row != first:
        path.append(row)
        row = parents[row]
    return path[::-1]


def residual_blocks(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> torch.Tensor:
    """K heads' residual blocks, x + SiLU(W x + b), one after the other: [T, H] -> [K, T, H].

    weights, biases: per block [K, H, H] and [K, H]. Each block is computed in float32 and rounded to x's dtype.
    """
    y = x.expand(len(weights[0]), -1, -1)
    for weight, bias in zip(weights, biases, strict=True):
        wide = y.float()
        y = (wide + F.silu(torch.baddbmm(bias.float()[:, None], wide, weight.float().mT))).to(x.dtype)
    return y


def top_logits(
    states: torch.Tensor,
    unembedding: torch.Tensor,
    bias: torch.Tensor | None = None,
    k: int = 1,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k greatest logits of each row, of equals the lowest index first, and the log of the sum of exponentials; NaN
    counts as -inf.

    states [R, H] and unembedding [vocab, H], bias [vocab] or None; or all of them with a batch dimension in front.
    scale, softcap: logits are multiplied, then capped: softcap * tanh(logits / softcap).
    Returns: values float32 [..., R, k], indices int32 [..., R, k], log of the sum float32 [..., R].
    """
    logits = states.float() @ unembedding.float().mT
    if bias is not None:
        logits = logits + bias.float()[..., None, :]
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = _possible(logits)
    values, indices = logits.sort(dim=-1, descending=True, stable=True)  # topk leaves the order of equals open
    return values[..., :k], indices[..., :k].int(), logits.logsumexp(-1)


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

    weights, biases as in `residual_blocks`, none where there are no blocks; the rest as in `top_logits`. unembedding
    [vocab, H] serves all heads, [K, vocab, H] is their own; token_map long [vocab] are the ids of a draft vocabulary.
    """
    states = residual_blocks(hidden_states, weights, biases) if weights else hidden_states[None]
    if unembedding.dim() == 3:
        states = states.expand(len(unembedding), -1, -1)
    values, indices, sums = top_logits(states, unembedding, bias, k, scale, softcap)
    tokens = indices if token_map is None else token_map[indices.long()].int()
    return tokens.transpose(0, 1), (values - sums[..., None]).transpose(0, 1)
