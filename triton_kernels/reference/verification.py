"""From logits to accepted tokens: which draft nodes a thread accepts, exactly or by typical acceptance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch

from .noise import likeliest, possible, sample


class Noise(NamedTuple):
    """Which threads are sampled, and what the counter-based noise of their choices depends on.

    Promise 2 of CONTRIBUTING rests on it: the same sample with speculation as without.
    """

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
    scores = possible(logits.float())
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
        log_probs = possible(scores(row).double()).log_softmax(-1)
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
