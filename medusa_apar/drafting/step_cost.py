"""What a step and a draft cost on this device, by rows and by threads, and how many nodes pay for themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .draft_tree import DraftTree


@dataclass(frozen=True, slots=True)
class StepCost:
    """In any unit of time.

    curve: (rows, cost) of some sizes, rows ascending; linear in between, and beyond the last as over its second half.
    drafts: (threads, cost) of drafting, likewise.
    """

    curve: tuple[tuple[float, float], ...]
    drafts: tuple[tuple[float, float], ...] = ()
    # Asked in every step: costs by the number of rows, and by the number of threads that draft.
    _rows: dict[int, np.ndarray] = field(default_factory=dict, compare=False, repr=False)
    _drafting: dict[int, float] = field(default_factory=dict, compare=False, repr=False)

    def rows(self, most: int) -> np.ndarray:
        """float64 [most]: the cost of 1 to so many rows."""
        if most not in self._rows:
            self._rows[most] = _interpolated(self.curve, np.arange(1, most + 1))
        return self._rows[most]

    def drafting(self, threads: int) -> float:
        """The cost of drafting for so many threads."""
        if not self.drafts or not threads:
            return 0.0
        if threads not in self._drafting:
            self._drafting[threads] = float(_interpolated(self.drafts, np.array([threads]))[0])
        return self._drafting[threads]

    def nodes(self, threads: int, tree: DraftTree) -> int:
        """How many nodes below each of so many roots give the most tokens for the time, all threads alike; those of a
        tree whose chances nobody said are all wanted."""
        if tree.chances is None or not len(tree):
            return len(tree)
        tokens = 1 + np.concatenate([[0], np.cumsum(tree.chances)])
        costs = self.rows(threads * len(tokens))[threads - 1 :: threads].copy()
        costs[1:] += self.drafting(threads)
        return int(np.argmax(tokens / costs))


class LearnedCost:
    """A step cost in milliseconds that is corrected by the steps that run: a busy moment while it was measured, or a
    longer context than it was measured with, would stay in it for good."""

    _STEPS = 16  # that are looked at together
    _RATE = 0.05  # of a step's error, what its own sizes take over
    _SHARE = 0.25  # of that, what all other sizes take over: most of an error is the machine's
    _DRAFT_RATE = 0.25  # of a draft's error, what all sizes take over
    _LARGEST = 2.0  # ratio: what lies further off is no cost of a step

    def __init__(self, cost: StepCost) -> None:
        self.cost, self.steps = cost, 0
        self._seen: list[tuple[int, float]] = []

    def rows(self, most: int) -> np.ndarray:
        return self.cost.rows(most)

    def drafting(self, threads: int) -> float:
        return self.cost.drafting(threads)

    def nodes(self, threads: int, tree: DraftTree) -> int:
        return self.cost.nodes(threads, tree)

    def observe(self, rows: int, seconds: float) -> None:
        """A step of so many rows has taken so long; larger ones than were measured say nothing."""
        if rows > self.cost.curve[-1][0]:
            return
        self.steps += 1
        self._seen.append((rows, 1e3 * seconds))
        if len(self._seen) == self._STEPS:
            self._correct()

    def observe_draft(self, threads: int, seconds: float) -> None:
        """Drafting for so many threads has taken so long. It is seen seldom where it seems dear, so it counts at once:
        what was measured while the machine was busy would keep the heads from being asked."""
        if not self.cost.drafts:
            return
        ratio = float(np.clip(1e3 * seconds / max(self.drafting(threads), 1e-6), 1 / 16, self._LARGEST))
        factor = ratio**self._DRAFT_RATE
        drafts = tuple((count, round(cost * factor, 4)) for count, cost in self.cost.drafts)
        self.cost = StepCost(self.cost.curve, drafts)

    def _correct(self) -> None:
        sizes, costs = np.array(self.cost.curve, dtype=np.float64).T
        seen, self._seen = self._seen, []
        for rows, milliseconds in seen:
            ratio = milliseconds / float(np.interp(rows, sizes, costs))
            error = np.log(np.clip(ratio, 1 / self._LARGEST, self._LARGEST))
            place = int(np.searchsorted(sizes, rows))
            near = np.full(len(sizes), self._SHARE)
            near[max(place - 1, 0) : place + 1] = 1.0
            costs = costs * np.exp(self._RATE * near * error)
        costs = np.maximum.accumulate(costs)  # more is never cheaper
        curve = tuple((int(size), round(float(cost), 4)) for size, cost in zip(sizes, costs, strict=True))
        self.cost = StepCost(curve, self.cost.drafts)


def _interpolated(curve: Sequence[tuple[float, float]], at: np.ndarray) -> np.ndarray:
    sizes, costs = np.array(curve, dtype=np.float64).T
    if len(sizes) == 1:
        return np.full(len(at), costs[0])
    half = sizes[-1] / 2  # a slope between two neighbours would be their noise
    slope = (costs[-1] - float(np.interp(half, sizes, costs))) / (sizes[-1] - max(half, sizes[0]))
    found: np.ndarray = np.interp(at, sizes, costs) + slope * np.maximum(at - sizes[-1], 0)
    return found
