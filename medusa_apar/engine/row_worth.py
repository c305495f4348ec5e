"""Which threads are worth their row in a step: those whose tokens will be read, while a row costs less than it brings.

An answer ends at its limit, and what threads have written behind it was in vain. How likely that is depends on what the
threads that are read before will still write. Beside one answer a row is nearly free, so that even an unlikely one
pays; where many answers share the steps a row costs nearly what it would cost later, when more is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medusa_apar.threads.paragraph_tree import Thread
from medusa_apar.threads.request import Request

_TYPICAL = 48.0  # tokens of a child, as far as nothing else is known: it counts as one that has ended
_PRIOR = 2.0  # children that other answers count for beside an answer's own
PRICED_ROWS = 16  # over which the price of one is measured
_MEMORY = 0.98  # of what is known of children's lengths, at each child: half of it are the last 35


@dataclass(slots=True)
class ChildLengths:
    """How many tokens children write: the mean over answers that have ended, and that of an answer's own children.

    A child that is still writing tells that it is no shorter. Its tokens count and its end does not, as in the estimate
    of a constant chance of ending at each token.
    """

    _tokens: float = 0.0
    _ends: float = 0.0

    def mean(self, request: Request) -> float:
        """Expected tokens of a child of this answer."""
        tokens, ends = _counts(request)
        usual = (self._tokens + _TYPICAL) / (self._ends + 1)
        return (tokens + _PRIOR * usual) / (ends + _PRIOR)

    def learn(self, request: Request) -> None:
        """Takes over what an answer that has ended tells."""
        tokens, ends = _counts(request)
        fading = _MEMORY ** max(ends, 1)  # children that are all cut should not count for long either
        self._tokens, self._ends = fading * self._tokens + tokens, fading * self._ends + ends


def chances(request: Request, mean: float) -> list[float]:
    """The chance of each thread in `request.live` that its next token will be read.

    mean: tokens that a child is expected to write still, whatever it has written. Sums of k such lengths follow an
    Erlang distribution.
    """
    limit = request.max_new_tokens
    return [_erlang(place, (limit - before) / mean) for place, (_, before) in enumerate(request.live)]


def worth(likely: Sequence[float], rows: int, costs: np.ndarray) -> int:
    """How many rows more give the most tokens for the time.

    likely: the chance of each further row's token to be read, descending. rows: that run in any case, each for a token.
    costs: float64 [rows + PRICED_ROWS or more], of 1, 2, ... rows. What a row costs is the mean over the next
    `PRICED_ROWS`: a few measured ones differ by more than that from moment to moment.
    """
    first = costs[rows - 1]
    each = (costs[rows + PRICED_ROWS - 1] - first) / PRICED_ROWS
    gained = rows + np.concatenate([[0.0], np.cumsum(likely)])
    return int(np.argmax(gained / (first + each * np.arange(len(gained)))))


def _counts(request: Request) -> tuple[int, int]:
    """Tokens that the children have written, and how many of them came to their end."""
    children = [thread for thread in request.tree.threads if thread.parent is not None]
    return sum(map(_written, children)), sum(thread.finish_reason == "stop" for thread in children)


def _written(thread: Thread) -> int:
    return len(thread.tokens) - thread.num_forced


def _erlang(count: int, time: float) -> float:
    """The chance that `count` events of a Poisson process, one in a unit of time on average, happen within `time`."""
    if time <= 0:
        return 0.0
    term = left = math.exp(-time)
    for number in range(1, count):
        term *= time / number
        left += term
    return 1.0 if not count else max(1.0 - left, 0.0)
