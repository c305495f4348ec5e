"""Which of all candidates become nodes: one budget for the whole forest, spent where it shortens the answers most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .draft_tree import DraftTree
from .paragraph_tree import Thread
from .proposals import Proposal
from .step_cost import StepCost
from .triton_kernels.layout import power_of_two

LEAST_GAIN = 0.01  # tokens: no node is worth less
# A node under this chance costs more than it brings wherever its row takes a twentieth of what a token takes: on a CPU.
LEAST_PAYING = 0.05
_MEMORY = 0.98  # of the running means: half of them are the last 35 steps
_PATIENCE = 32  # steps without the heads, before they are asked again
_ABREAST = 8  # tokens that tell two threads' progress apart
_NONE = np.zeros(0, dtype=np.int64)


@dataclass(slots=True)
class ForestBudget:
    """Args:
    rows: most rows of a step, roots included.
    cost: what a step costs; None fills all rows.
    most_nodes: of one thread; None: no limit.
    weighs: whether threads that the answer does not wait for earn less.
    """

    rows: int
    cost: StepCost | None = None
    most_nodes: int | None = None
    weighs: bool = True
    # Of the steps so far: tokens that a thread gains, and what a step costs.
    _tokens: float = 0.0
    _spent: float = 0.0
    # What the heads' guesses save in a step, beside what they cost; in units of cost.
    _saved: float = 0.0
    _drafts: float = 0.0
    _paused: int = field(default=0)

    def choose(
        self, proposals: Sequence[Proposal | None], worths: np.ndarray, room: int, requests: int = 1
    ) -> list[np.ndarray]:
        """The nodes to keep of each thread's candidates, int64 in ascending order, with every node its parent.

        worths: float [T] of each thread, what a token of it brings the answer. room: KV slots for nodes. A node earns
        its chance times that, a `[Child]` half: its thread is not the one waited for. Nodes are kept while they earn
        more than the time they take would have brought at the rate of the steps so far.
        """
        room = min(room, self.rows - len(proposals))
        worths = worths if self.weighs else np.ones_like(worths)
        sizes = [0 if proposal is None else len(proposal.tokens) for proposal in proposals]
        if room <= 0 or not any(sizes):
            self._account(len(proposals), 0.0, 0, requests)
            return [_NONE] * len(proposals)
        gains = np.concatenate(
            [self._gains(p, worth) for p, worth in zip(proposals, worths, strict=True) if p is not None]
        )
        order = np.argsort(-gains, kind="stable")[:room]
        order = order[gains[order] > LEAST_GAIN]
        if self.cost is not None:
            order = order[: self._pays(len(proposals), gains, order, proposals, requests)]
        kept = np.zeros(len(gains), dtype=bool)
        kept[order] = True
        found, start = [], 0
        for size in sizes:
            found.append(np.flatnonzero(kept[start : start + size]) if size else _NONE)
            start += size
        return found

    @property
    def least_chance(self) -> float:
        """Nodes of less chance are never kept."""
        return LEAST_GAIN if self.cost is None else LEAST_PAYING

    def nodes(self, roots: int, drafting: int, room: int) -> int:
        """Most candidates of each thread that drafts among so many roots: twice an even share, since shares differ, and
        rounded up to a power of two, since a CUDA graph is captured for each number."""
        each = 2 * max(min(room, self.rows - roots), 0) // drafting
        return power_of_two(each) if each else 0

    def heads_pay(self) -> bool:
        """Whether the heads should draft for the next step: where their guesses have saved less than drafting costs,
        only now and then, to see whether that has changed."""
        if self.cost is None or self._saved >= self._drafts:
            self._paused = 0
            return True
        self._paused += 1
        return self._paused % _PATIENCE == 0

    def _gains(self, proposal: Proposal, worth: float) -> np.ndarray:
        gains = proposal.chances * worth
        if proposal.forks:
            gains[list(proposal.forks.values())] *= 0.5
        if self.most_nodes is not None and len(gains) > self.most_nodes:
            gains[np.argsort(-gains, kind="stable")[self.most_nodes :]] = 0.0
        return gains

    def _pays(self, roots: int, gains: np.ndarray, order: np.ndarray, proposals: Sequence, requests: int) -> int:
        """How many of the nodes in `order` pay."""
        assert self.cost is not None
        rate = self._rate(roots, requests)
        scores = self._scores(roots, gains[order], rate)
        best = int(scores.argmax())
        guessed = np.concatenate([_guessed(proposal) for proposal in proposals if proposal is not None])
        drafted = 0.0
        if guessed.any():
            without = self._scores(roots, gains[order[~guessed[order]]], rate).max()
            drafted = self.cost.drafting(sum(proposal is not None and proposal.heads > 0 for proposal in proposals))
            self._saved = _MEMORY * self._saved + (scores[best] - without) / rate
            self._drafts = _MEMORY * self._drafts + drafted
        self._account(roots, float(gains[order[:best]].sum()), best, requests, drafted)
        return best

    def _scores(self, roots: int, gains: np.ndarray, rate: float) -> np.ndarray:
        assert self.cost is not None
        costs = self.cost.rows(roots + len(gains))[roots - 1 :]
        return np.concatenate([[0.0], np.cumsum(gains)]) - rate * (costs - costs[0])

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
    cost: StepCost | None = None

    def choose(
        self, proposals: Sequence[Proposal | None], worths: np.ndarray, room: int, requests: int = 1
    ) -> list[np.ndarray]:
        """As ForestBudget.choose."""
        drafting = sum(proposal is not None for proposal in proposals)
        each = self.nodes(len(proposals), max(drafting, 1), room)
        return [_NONE if proposal is None else np.arange(min(each, proposal.heads)) for proposal in proposals]

    def nodes(self, roots: int, drafting: int, room: int) -> int:
        """Of each thread that drafts."""
        each = max(min(room, self.rows - roots), 0) // drafting
        return min(each, len(self.tree) if self.cost is None else self.cost.nodes(roots, self.tree))

    def heads_pay(self) -> bool:
        return True

    least_chance = 0.0


def worths(threads: Sequence[Thread]) -> np.ndarray:
    """float64 [T]: what a token of each of a request's running threads brings its answer.

    The answer waits for the thread that the others hang from, since it has children yet to fork; where those that are
    left hang alike, for those that have written least. One half for all others did best in a simulation over 59
    recorded answers (three per cent over equal worths; knowing who ends last would bring six).
    """
    depths = np.array([thread.depth for thread in threads])
    written = np.array([len(thread.tokens) - thread.num_forced for thread in threads])
    first = depths == depths.min()
    waited_for = first if not first.all() else written <= written.min() + _ABREAST
    return np.where(waited_for, 1.0, 0.5)


def _guessed(proposal: Proposal) -> np.ndarray:
    """bool [n], candidates that only the heads propose."""
    guessed = np.arange(len(proposal.tokens)) < proposal.heads
    guessed[proposal.chain] = False
    return guessed
