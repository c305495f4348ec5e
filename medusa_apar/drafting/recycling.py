"""What the model has said behind each token: token recycling (arXiv 2408.08696, section 3.2).

Every verified row, be its node accepted or not, has the model's scores for what follows it. The likeliest tokens of
each are kept by the last token of the row's path, as in the paper, and by its last two, which tell more. What was seen
last counts. The paper keeps one table for all that a model ever answers. Here it is one request's and ends with it:
from a shared one, others could tell by the time of their answers what a request had written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

TOP_K = 8  # tokens kept of a row, as in the paper
MOST_ROWS = 1 << 14  # rows that are kept of a request: 1 MB, and up to 5 MB to find them by
_FIRST_ROWS = 1 << 9
_TINY = 1e-30


class SeenRows(NamedTuple):
    """What the model says behind one request's rows in a step; a thread's root comes before its draft nodes.

    before, tokens: int64 [rows], the last two tokens of each row's path; `before` is -1 where there is only one.
    ids: int64 [rows, at most TOP_K], the likeliest tokens behind it, the best first. shares: float [rows, the same], of
    each, of what the model gives all of them (`shares_of`).
    """

    before: np.ndarray
    tokens: np.ndarray
    ids: np.ndarray
    shares: np.ndarray


class Behind(NamedTuple):
    """What was said behind the same tokens before.

    tokens: the likeliest, the best first. shares: of each, of what the model gave all of them. length: how many tokens
    of the path were the same, 1 or 2.
    """

    tokens: list[int]
    shares: list[float]
    length: int


@dataclass(slots=True)
class RecyclingTable:
    """One request's."""

    # By the last token or the last two (`_pair`), the number of the row that had them last; rows are numbered as they
    # come, and row n lies at n modulo the size of these arrays.
    _rows: dict[int, int] = field(default_factory=dict)
    _count: int = 0
    _ids: np.ndarray = field(default_factory=lambda: np.zeros((_FIRST_ROWS, TOP_K), dtype=np.int32))
    _shares: np.ndarray = field(default_factory=lambda: np.zeros((_FIRST_ROWS, TOP_K), dtype=np.float32))

    def learn(self, seen: SeenRows) -> None:
        """Takes in a step's rows. Of two that end alike the earlier one counts: a root is surer than its nodes."""
        before, tokens, ids, shares = (each[:MOST_ROWS][::-1] for each in seen)
        numbers = np.arange(self._count, self._count + len(tokens))
        self._count += len(tokens)
        while len(self._ids) < min(self._count, MOST_ROWS):
            self._ids, self._shares = (
                np.concatenate([each, np.zeros_like(each)]) for each in (self._ids, self._shares)
            )
        places = numbers % len(self._ids)
        width = ids.shape[1]
        self._ids[places, :width], self._shares[places, :width] = ids, shares
        if width < TOP_K:
            self._shares[places, width:] = 0.0
        self._rows.update(zip(tokens.tolist(), numbers.tolist(), strict=True))
        paired = before >= 0
        pairs = _pair(before[paired], tokens[paired])
        self._rows.update(zip(pairs.tolist(), numbers[paired].tolist(), strict=True))
        if len(self._rows) > 4 * MOST_ROWS:
            self._rows = {key: number for key, number in self._rows.items() if number >= self._oldest}

    def behind(self, before: int, token: int) -> Behind | None:
        """What was said behind these two tokens, else behind the latter alone; None where it is new. before: -1 where
        the path begins with `token`."""
        number, length = self._rows.get(_pair(before, token), -1) if before >= 0 else -1, 2
        if number < self._oldest:
            number, length = self._rows.get(token, -1), 1
        if number < self._oldest:
            return None
        place = number % len(self._ids)
        return Behind(self._ids[place].tolist(), self._shares[place].tolist(), length)

    @property
    def _oldest(self) -> int:
        """The number of the oldest row that is kept."""
        return max(self._count - MOST_ROWS, 0)


def _pair(before: Any, token: Any) -> Any:
    """A key for two tokens, which no token alone has; of ints, or of arrays of them."""
    return (before + 1 << 32) | token


def shares_of(scores: np.ndarray) -> np.ndarray:
    """Logits [rows, k] as probabilities of each row's tokens among themselves; 0 for what is not finite."""
    finite = np.isfinite(scores)
    best = np.where(finite, scores, -np.inf).max(axis=1, keepdims=True, initial=-1e30)
    powers = np.where(finite, np.exp(np.where(finite, scores, best) - best), 0.0)
    shares: np.ndarray = powers / np.maximum(powers.sum(axis=1, keepdims=True), _TINY)
    return shares
