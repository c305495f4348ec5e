"""Which of all candidates become nodes: one budget for the whole forest, spent where it shortens the answers most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medusa_apar.threads.paragraph_tree import Thread
from medusa_apar.triton_kernels.layout import power_of_two

from .candidates import Proposal
from .draft_tree import DraftTree
from .step_cost import LearnedCost, StepCost

MIN_CHANCE = 0.01  # of being accepted: no node has less
_SMALL = 6  # rows more, of which the cheapest counts
SECONDARY = 0.5  # weight of a thread that the answer does not wait for, beside the one it does
MAX_ASKED = 0.5  # chance that is asked of a node before the heads look on below it
_MATCHED = 0.7  # a match this likely leaves the heads' drafts too little chance to pay
_MEMORY = 0.98  # of the running means: half of them are the last 35 steps
_TRIALS = 12  # steps that the heads have before they are judged
_FIRST_PAUSE, _LONGEST_PAUSE = 4, 32  # steps without the heads, before they are asked again
_RECENT = 0.8  # of the means that judge the heads: half of them are the last three steps that asked
_ABREAST = 8  # tokens that tell two threads' progress apart
_NONE = np.zeros(0, dtype=np.int64)


@dataclass(slots=True)
class ForestBudget:
    """Args:
    rows: most rows of a step, roots included.
    cost: what a step costs; None fills all rows.
    max_nodes: of one thread; None: no limit.
    weigh_threads: whether threads that the answer does not wait for earn less.
    """

    rows: int
    cost: StepCost | LearnedCost | None = None
    max_nodes: int | None = None
    weigh_threads: bool = True
    # Of the steps so far: tokens that a thread gains, and what a step costs.
    _tokens: float = 0.0
    _spent: float = 0.0
    # What the heads' guesses save, beside what drafting costs, summed over the steps that asked them, in units of cost;
    # older ones count less. How many steps those were, steps of the pause that goes on, and pauses in a row.
    _saved: float = 0.0
    _drafts: float = 0.0
    _asked: int = 0
    _paused: int = 0
    _failures: int = 0

    def choose(
        self, proposals: Sequence[Proposal | None], weights: np.ndarray, room: int, requests: int = 1
    ) -> list[np.ndarray]:
        """The nodes to keep of each thread's candidates, int64 in ascending order, with every node its parent.

        weights: float [T], what a token of each thread brings the answer. room: KV slots for nodes. A node earns its
        chance times that, a `[Child]` half: its thread is not the one waited for. Nodes are kept while they earn
        more than the time they take would have brought at the rate of the steps so far.
        """
        room = min(room, self.rows - len(proposals))
        drawn = _Candidates.of(proposals, weights, self.max_nodes)
        if room <= 0 or drawn is None:
            self._account(len(proposals), 0.0, 0, requests)
            return [_NONE] * len(proposals)
        order = np.argsort(-drawn.gains, kind="stable")[:room]
        order = order[drawn.chances[order] > MIN_CHANCE]
        if self.cost is not None:
            order = order[: self._pays(len(proposals), drawn, order, requests)]
        return drawn.of_threads(np.sort(order))

    def min_probability(self, roots: int, requests: int, weight: float) -> float:
        """The chance with which a node would pay beside so many roots, for a thread of this weight."""
        if self.cost is None:
            return MIN_CHANCE
        return min(max(MIN_CHANCE, self._min_gain(roots, requests) / weight), MAX_ASKED)

    def threads_worth_drafting(self, groups: Sequence[Sequence[Thread]], roots: int, requests: int) -> set[Thread]:
        """The threads for which even a certain draft would be worth its row: with many threads running, none is.

        groups: each request's live threads that go on.
        """
        if self.cost is None or not self.weigh_threads:
            return {thread for threads in groups for thread in threads}
        least = self._min_gain(roots, requests)
        return {
            thread
            for threads in groups
            for thread, weight in zip(threads, thread_weights(threads).tolist(), strict=True)
            if weight > least
        }

    def _min_gain(self, roots: int, requests: int) -> float:
        """Tokens that a row has to bring."""
        assert self.cost is not None
        row = float(np.diff(self.cost.rows(roots + _SMALL)[roots - 1 :]).min())
        return self._rate(roots, requests) * row

    def threads_for_heads(self, acceptance: Mapping[Thread, float]) -> set[Thread]:
        """The threads of a request for which the heads should draft.

        acceptance: each live thread's chance that its n-gram match is accepted. Where the match is likely, or the
        answer does not wait for the thread, drafting costs more than it brings.
        """
        if self.cost is None:
            return set(acceptance)
        found = thread_weights(list(acceptance)) if self.weigh_threads else np.ones(len(acceptance))
        waited_for = (found == found.max()).tolist()
        return {
            thread
            for (thread, likely), waits in zip(acceptance.items(), waited_for, strict=True)
            if waits and likely < _MATCHED
        }

    def nodes(self, roots: int, drafting: int, room: int) -> int:
        """Most candidates of each thread that drafts among so many roots: twice an even share, since shares differ, and
        rounded up to a power of two, since a CUDA graph is captured for each number."""
        each = 2 * max(min(room, self.rows - roots), 0) // drafting
        if self.max_nodes is not None:
            each = min(each, 2 * self.max_nodes)
        return power_of_two(each) if each else 0

    def heads_enabled(self) -> bool:
        """Whether the heads should draft for the next step. Where their guesses have saved less than drafting costs,
        over several steps, they are only asked after pauses of 4 steps, 8, 16 and then 32, to see whether that has
        changed."""
        if self.cost is None or self._asked < _TRIALS or self._saved >= self._drafts:
            self._paused = self._failures = 0
            return True
        self._paused += 1
        if self._paused < min(_FIRST_PAUSE << self._failures, _LONGEST_PAUSE):
            return False
        self._paused, self._failures = 0, self._failures + 1
        return True

    def _pays(self, roots: int, drawn: _Candidates, order: np.ndarray, requests: int) -> int:
        """How many of the candidates in `order` pay."""
        assert self.cost is not None
        rate, gains = self._rate(roots, requests), drawn.gains[order]
        scores = self._scores(roots, gains, rate)
        best = int(scores.argmax())
        drafted = 0.0
        if drawn.drafting:
            without = self._scores(roots, gains[~drawn.from_heads[order]], rate).max()
            drafted = self.cost.drafting(drawn.drafting)
            fading = _MEMORY if not self._failures else _RECENT  # looking again, old failures should not count for long
            self._saved = fading * self._saved + float(scores[best] - without) / rate
            self._drafts = fading * self._drafts + drafted
            self._asked += 1
        self._account(roots, float(drawn.chances[order[:best]].sum()), best, requests, drafted)
        return best

    def _scores(self, roots: int, gains: np.ndarray, rate: float) -> np.ndarray:
        assert self.cost is not None
        costs = self.cost.rows(roots + len(gains))[roots - 1 :]
        scores: np.ndarray = np.concatenate([[0.0], np.cumsum(gains)]) - rate * (costs - costs[0])
        return scores

    def _rate(self, roots: int, requests: int) -> float:
        """Tokens that a request gains in a unit of cost, times their number."""
        if self._spent:
            return self._tokens / self._spent
        assert self.cost is not None
        return 1.5 * requests / float(self.cost.rows(roots)[-1])

    def _account(self, roots: int, gained: float, nodes: int, requests: int, drafted: float = 0.0) -> None:
        if self.cost is not None:
            self._tokens = _MEMORY * self._tokens + requests * (1 + gained / roots)
            self._spent = _MEMORY * self._spent + float(self.cost.rows(roots + nodes)[-1]) + drafted


@dataclass(slots=True)
class EvenBudget:
    """The same tree below every thread, as Medusa has it: the first nodes of the heads' tree, as many as the rows leave
    each thread and as pay beside so many threads. What there is besides the heads' guesses is no node."""

    rows: int
    tree: DraftTree
    cost: StepCost | LearnedCost | None = None
    weigh_threads = False

    def choose(
        self, proposals: Sequence[Proposal | None], weights: np.ndarray, room: int, requests: int = 1
    ) -> list[np.ndarray]:
        """As ForestBudget.choose."""
        drafting = sum(proposal is not None for proposal in proposals)
        each = self.nodes(len(proposals), max(drafting, 1), room)
        kept = [_NONE if proposal is None else np.arange(min(each, proposal.heads)) for proposal in proposals]
        return [
            nodes if proposal is None else nodes[proposal.chances[nodes] > 0]
            for nodes, proposal in zip(kept, proposals, strict=True)
        ]

    def nodes(self, roots: int, drafting: int, room: int) -> int:
        """Nodes for each thread that drafts."""
        each = max(min(room, self.rows - roots), 0) // drafting
        return min(each, len(self.tree) if self.cost is None else self.cost.nodes(roots, self.tree))

    def heads_enabled(self) -> bool:
        return True

    def threads_for_heads(self, acceptance: Mapping[Thread, float]) -> set[Thread]:
        return set(acceptance)

    def min_probability(self, roots: int, requests: int, weight: float) -> float:
        return 0.0

    def threads_worth_drafting(self, groups: Sequence[Sequence[Thread]], roots: int, requests: int) -> set[Thread]:
        return {thread for threads in groups for thread in threads}


def thread_weights(threads: Sequence[Thread]) -> np.ndarray:
    """float64 [T]: what a token of each of a request's running threads brings its answer, 1 in all: the chance that
    this is the thread which the answer waits for.

    That is likeliest the thread that the others hang from, since it has children yet to fork; where those that are left
    hang alike, those that have written least. One half for all others did best in a simulation over 59 recorded
    answers.
    """
    if len(threads) == 1:  # as in batches of plain answers, which ask for every request
        return np.ones(1)
    depths = np.array([thread.depth for thread in threads])
    written = np.array([len(thread.tokens) - thread.num_forced for thread in threads])
    first = depths == depths.min()
    waited_for = first if not first.all() else written <= written.min() + _ABREAST
    found = np.where(waited_for, 1.0, SECONDARY)
    weights: np.ndarray = found / found.sum()
    return weights


@dataclass(slots=True)
class _Candidates:
    """All threads' candidates side by side, n of them."""

    chances: np.ndarray  # float64 [n]
    gains: np.ndarray  # float64 [n], those times their thread's weight
    from_heads: np.ndarray  # bool [n], what only the heads propose
    bounds: np.ndarray  # int64 [T + 1], where each thread's begin
    drafting: int  # threads for which the heads drafted

    @classmethod
    def of(cls, proposals: Sequence[Proposal | None], weights: np.ndarray, max_nodes: int | None) -> _Candidates | None:
        """None where there are none."""
        sizes = np.array([0 if proposal is None else len(proposal.tokens) for proposal in proposals])
        if not sizes.any():
            return None
        heads = np.array([0 if proposal is None else proposal.heads for proposal in proposals])
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        chances = np.concatenate([p.chances for p in proposals if p is not None])
        gains = chances * np.repeat(weights, sizes)
        from_heads = np.arange(len(gains)) < np.repeat(bounds[:-1] + heads, sizes)
        recalled: list[int] = []
        children: list[int] = []
        for first, proposal in zip(bounds.tolist(), proposals, strict=False):
            if proposal is None:
                continue
            recalled += [first + node for node in proposal.chain]
            children += [first + node for node in proposal.forks.values()]
            if max_nodes is not None and len(proposal.tokens) > max_nodes:
                own = gains[first : first + len(proposal.tokens)]
                chances[first : first + len(own)][np.argsort(-own, kind="stable")[max_nodes:]] = 0.0
        from_heads[recalled] = False
        for first, proposal in zip(bounds.tolist(), proposals, strict=False):
            if proposal is not None and proposal.from_heads is not None:
                from_heads[first : first + len(proposal.from_heads)] = proposal.from_heads
        gains[children] *= SECONDARY
        return cls(chances, gains, from_heads, bounds, int(np.count_nonzero(heads)))

    def of_threads(self, chosen: np.ndarray) -> list[np.ndarray]:
        """Ascending places among all -> each thread's own, among its candidates."""
        ends = np.searchsorted(chosen, self.bounds).tolist()
        return [
            chosen[first:last] - begin for first, last, begin in zip(ends, ends[1:], self.bounds.tolist(), strict=False)
        ]
