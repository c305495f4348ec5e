"""Medians of repeats, and what chance could do to a ratio of totals or to a mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the 95 % bootstrap interval around it."""

    value: float
    low: float
    high: float


def ratio_of_totals(
    numerators: Sequence[float], denominators: Sequence[float], draws: int = DRAWS, seed: int = 0
) -> Interval:
    """sum(numerators) / sum(denominators), prompts drawn anew with replacement (percentile bootstrap).

    The i-th entries belong to the same prompt, and are drawn together.
    """
    top, bottom = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    if len(top) != len(bottom) or not len(top):
        raise ValueError(f"a ratio needs as many numerators as denominators, got {len(top)} and {len(bottom)}")
    picks = np.random.default_rng(seed).integers(len(top), size=(draws, len(top)))
    ratios = top[picks].sum(1) / bottom[picks].sum(1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Interval(float(top.sum() / bottom.sum()), float(low), float(high))


def mean_of(values: Sequence[float], draws: int = DRAWS, seed: int = 0) -> Interval:
    """The mean of a value per prompt, prompts drawn anew with replacement."""
    return ratio_of_totals(values, [1.0] * len(values), draws, seed)


def speed_ratio(
    ours: Sequence[tuple[float, float]], theirs: Sequence[tuple[float, float]], draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Tokens per second of `ours` over those of `theirs`: (tokens, seconds) per prompt, the same prompts in order."""
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"a comparison needs the same prompts on both sides, got {len(ours)} and {len(theirs)}")
    both = np.asarray([(*one, *other) for one, other in zip(ours, theirs, strict=True)], dtype=float)

    def ratio(sums: np.ndarray) -> np.ndarray:
        ratios: np.ndarray = (sums[..., 0] / sums[..., 1]) / (sums[..., 2] / sums[..., 3])
        return ratios

    picks = np.random.default_rng(seed).integers(len(both), size=(draws, len(both)))
    low, high = np.percentile(ratio(both[picks].sum(1)), [2.5, 97.5])
    return Interval(float(ratio(both.sum(0))), float(low), float(high))


def median_of(values: Sequence[float]) -> float:
    """The median of a prompt's repeats."""
    return float(median(values))
