"""What processors that look at a path make of a segment's scores, prepared on the host and done on a device.

What stands on the rows' paths is known before the forward pass: the path up to the root, which they share, and the
draft tokens above each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .penalties import costs
from .recipe import Operation


@dataclass(frozen=True, slots=True, eq=False)
class PathChange:
    """What one operation ("repetition", "presence_frequency", "min_length", "held_back") changes in a segment's rows.

    shared: int64 [S], tokens that it changes in every row. rows, tokens: int64 [N], what it changes in one row, for
    which `shared` does not count. costs: float64 [S + N], what these lose.
    """

    operation: Operation
    shared: np.ndarray
    rows: np.ndarray
    tokens: np.ndarray
    costs: np.ndarray

    @classmethod
    def of(cls, operation: Operation, path: Sequence[int], tokens: Sequence[int], parents: Sequence[int]) -> PathChange:
        """For a root behind `path` (as of `Request.path`), and draft nodes below it.

        tokens, parents: of each draft node, its token and the node above, -1 for the root.
        """
        above: list[list[int]] = [[]]
        for token, parent in zip(tokens, parents, strict=True):
            above.append([*above[1 + parent], token])
        if operation.kind == "min_length":
            return cls.bans(operation, [len(path) + len(drafted) < operation.length for drafted in above])
        held = np.array(path[operation.length :], dtype=np.int64)
        shared, counts = np.unique(held[~np.isin(held, operation.ids)], return_counts=True)
        known = dict(zip(shared.tolist(), counts.tolist(), strict=True))
        pairs: list[tuple[int, int, int]] = []
        for row, drafted in enumerate(above):
            behind = drafted[max(0, operation.length - len(path)) :]
            own = Counter(token for token in behind if token not in operation.ids)
            pairs += [(row, token, count + known.get(token, 0)) for token, count in own.items()]
        table = np.array(pairs, dtype=np.int64).reshape(-1, 3)
        lost = np.concatenate([counts, table[:, 2]]).astype(np.float64)
        if operation.kind == "presence_frequency":
            lost = costs(lost, operation.values[0], operation.value)
        return cls(operation, shared, table[:, 0], table[:, 1], lost)

    @classmethod
    def bans(cls, operation: Operation, rows: Sequence[bool]) -> PathChange:
        """For an operation whose ids are impossible in these rows."""
        table = np.array([(row, token) for row, banned in enumerate(rows) if banned for token in operation.ids])
        table = table.astype(np.int64).reshape(-1, 2)
        return cls(operation, np.zeros(0, dtype=np.int64), table[:, 0], table[:, 1], np.zeros(len(table)))

    @property
    def num_words(self) -> int:
        return len(self.shared) + len(self.rows) + len(self.tokens) + len(self.costs)

    @property
    def words(self) -> np.ndarray:
        """All of it for a device, int64."""
        return np.concatenate([self.shared, self.rows, self.tokens, self.costs.view(np.int64)])

    def __call__(self, scores: Tensor, words: Tensor) -> Tensor:
        """The segment's float32 scores [rows, vocab], changed as its processor would; `words` are on their device."""
        vocab, wide, few = scores.shape[1], len(self.shared), len(self.rows)
        shared, rows, tokens, bits = words.split([wide, few, few, wide + few])
        lost = bits.view(torch.float64).to(scores.dtype)
        padded = torch.nn.functional.pad(scores, (0, 1))  # for tokens that the model can read and not write
        shared, tokens = shared.clamp(max=vocab), tokens.clamp(max=vocab)
        single = self._changed(padded[rows, tokens], lost[wide:])
        padded[:, shared] = self._changed(padded[:, shared], lost[:wide])
        padded[rows, tokens] = single
        return padded[:, :vocab]

    def _changed(self, scores: Tensor, lost: Tensor) -> Tensor:
        penalty = self.operation.value
        if self.operation.kind == "repetition":
            return torch.where(scores < 0, scores * penalty, scores / penalty)
        return scores - lost if self.operation.kind == "presence_frequency" else scores.new_full((), -torch.inf)


@dataclass(frozen=True, slots=True, eq=False)
class MaskChange:
    """Tokens that a grammar forbids in the rows of a segment.

    masks: int32 [rows, words], of each row a bit a token, from the lowest on; 0 where it is impossible.
    """

    masks: np.ndarray

    @property
    def num_words(self) -> int:
        count: int = self.masks.shape[0] * -(-self.masks.shape[1] // 2)
        return count

    @property
    def words(self) -> np.ndarray:
        """All of it for a device, int64."""
        even = np.pad(self.masks, ((0, 0), (0, self.masks.shape[1] % 2)))
        return np.ascontiguousarray(even).view(np.int64).reshape(-1)

    def __call__(self, scores: Tensor, words: Tensor) -> Tensor:
        """The segment's float32 scores [rows, vocab] without what is forbidden; `words` are on their device."""
        places = torch.arange(64, device=scores.device)
        bits = (words.reshape(len(self.masks), -1, 1) >> places) & 1
        return scores.masked_fill(bits.flatten(1)[:, : scores.shape[1]] == 0, -torch.inf)
