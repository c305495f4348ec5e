"""Answers that loop: what benchmarks count apart, since loops flatter any drafter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

LOOPS = 0.5  # share of an answer above which benchmarks say that it loops
MISMATCH = 8  # one token in so many may differ between a span and its repeat


def looping_share(ids: Sequence[int]) -> float:
    """The share of `ids` covered by repeats of a span that came directly before; the first copy is no repeat.

    A stretch of at least p tokens repeats a span of p tokens if each token equals the one p places before it, but for
    one in eight at most: a list that counts on while it says the same again is a loop too. Of [a b c a b c a b c] two
    thirds are repeats, of [a b c x a b c] none, since x stands between. 0 for an empty list.
    """
    tokens = np.asarray(ids)
    covered = np.zeros(len(tokens), dtype=bool)
    for period in range(1, len(tokens) // 2 + 1):
        same = tokens[period:] == tokens[:-period]
        if int(same.sum()) * MISMATCH < period * (MISMATCH - 1):
            continue
        for start, stop in _similar_stretches(same.tolist()):
            if stop - start >= period:
                covered[start + period : stop + period] = True
    return float(covered.mean()) if len(tokens) else 0.0


def _similar_stretches(same: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Stretches [start, stop) with one False in eight at most, which begin and end with True.

    A True scores 1 and a False -7. A stretch goes on while its score is above zero, and ends where that was highest.
    """
    start = stop = best = score = 0
    for index, equal in enumerate(same):
        if not score:
            if not equal:
                continue
            start, best = index, 0
        score = max(0, score + (1 if equal else 1 - MISMATCH))
        if score > best:
            best, stop = score, index + 1
        if not score:
            yield start, stop
    if score:
        yield start, stop
