"""Log-probabilities that requests ask to be told, of all rows of a step at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from medusa_apar.threads.request import TokenLogprobs


class Top(NamedTuple):
    """The likeliest tokens of N rows, the best first.

    ids: int64 [N, count]. values: float32 [N, count], their logits; behind the last possible one it is -inf, and the id
    says nothing. log_sums: float64 [N], logarithms of the sums of all exponentials.
    """

    ids: np.ndarray
    values: np.ndarray
    log_sums: np.ndarray


class TopOfRows(Protocol):
    def __call__(self, logits: Tensor, rows: np.ndarray, count: int) -> Top:
        """Of these rows (int64 [N]) of `logits` [M, vocab], at most vocab tokens each. NaN is as impossible as -inf."""


def top(logits: Tensor, rows: np.ndarray, count: int) -> Top:
    """In torch, which leaves the order of equals open."""
    own = logits[torch.from_numpy(rows).to(logits.device)].float()
    own = own.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    values, ids = own.topk(count)
    log_sums = own.double().logsumexp(-1)
    return Top(*(part.cpu().numpy() for part in (ids, values, log_sums)))


class RowLogprobs:
    """Log-probabilities in rows of `logits` [M, vocab], of the model's own distribution as it is now.

    Args:
        rows: places among the M. most: how many of the likeliest tokens can be asked for.
        top: the runtime's, or the one above.
    """

    def __init__(self, logits: Tensor, rows: Sequence[int], most: int, top: TopOfRows) -> None:
        self._logits, self._place = logits, {row: place for place, row in enumerate(rows)}
        ids, values, log_sums = top(logits, np.array(rows, dtype=np.int64), max(1, min(most, logits.shape[1])))
        log_probs = values.astype(np.float64) - log_sums[:, None]
        self._ids, self._log_probs, self._log_sums = ids.tolist(), log_probs.tolist(), log_sums.tolist()

    def __call__(self, row: int, token: int, count: int) -> TokenLogprobs:
        """At a token of a row, whose logit still is the model's; and at the `count` likeliest, as far as possible."""
        place = self._place[row]
        pairs = zip(self._ids[place][:count], self._log_probs[place], strict=False)
        own = float(self._logits[row, token]) - self._log_sums[place]
        return TokenLogprobs(own, tuple((id, value) for id, value in pairs if value > -torch.inf))
