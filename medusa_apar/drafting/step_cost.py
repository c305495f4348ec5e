"""What a step and a draft cost on this device, by rows and by threads, and how many nodes pay for themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .draft_tree import DraftTree


@dataclass(frozen=True, slots=True)
class StepCost:
    """In any unit of time.

    curve: (rows, cost) of some sizes, rows ascending; linear in between, and beyond the last as before it.
    drafts: (threads, cost) of drafting, likewise.
    """

    curve: tuple[tuple[float, float], ...]
    drafts: tuple[tuple[float, float], ...] = ()
    # Of so many rows, and under negative numbers of so many threads: asked in every step.
    _known: dict[int, np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    def rows(self, most: int) -> np.ndarray:
        """float64 [most]: the cost of 1 to so many rows."""
        if most not in self._known:
            self._known[most] = _interpolated(self.curve, np.arange(1, most + 1))
        return self._known[most]

    def drafting(self, threads: int) -> float:
        if not self.drafts or not threads:
            return 0.0
        if -threads not in self._known:
            self._known[-threads] = _interpolated(self.drafts, np.array([threads]))
        return float(self._known[-threads][0])

    def nodes(self, threads: int, tree: DraftTree) -> int:
        """How many nodes below each of so many roots give the most tokens for the time, all threads alike; those of a
        tree whose chances nobody said are all wanted."""
        if tree.chances is None or not len(tree):
            return len(tree)
        tokens = 1 + np.concatenate([[0], np.cumsum(tree.chances)])
        costs = self.rows(threads * len(tokens))[threads - 1 :: threads].copy()
        costs[1:] += self.drafting(threads)
        return int(np.argmax(tokens / costs))


def _interpolated(curve: Sequence[tuple[float, float]], at: np.ndarray) -> np.ndarray:
    sizes, costs = np.array(curve, dtype=np.float64).T
    if len(sizes) == 1:
        return np.full(len(at), costs[0])
    slope = (costs[-1] - costs[-2]) / (sizes[-1] - sizes[-2])
    return np.interp(at, sizes, costs) + slope * np.maximum(at - sizes[-1], 0)
