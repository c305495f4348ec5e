"""Systems held against each other question by question, and the three figures that decide, named before any run."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from .statistics import Interval, mean_of
from .systems import BASE, LISTS

Figures = Mapping[str, float | None]
# By system, then by question and repeat.
Measured = Mapping[str, Mapping[tuple[str, int], Figures]]

ONE_THREAD, THREADS = "ours-ar", "threads"
SYSTEMS = (BASE, ONE_THREAD, THREADS, LISTS)
# Who is held against whom; the first two pairs decide.
PAIRS = ((THREADS, ONE_THREAD), (ONE_THREAD, BASE), (THREADS, BASE), (LISTS, BASE))
DECIDING_PAIRS = PAIRS[:2]
MARGIN = 0.02  # by which the lower end of an interval may be worse
CHECKED = "checks"


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure of an answer. kind: "share", of answers or of something in them, "nats" or "number"."""

    name: str
    title: str
    kind: str = "number"
    digits: int = 2


@dataclass(frozen=True, slots=True)
class Goal:
    """A metric that decides.

    change: a difference of means, ours less theirs, as a change for the better, of which 0.01 is one percent.
    calm: whether questions on which one of the two loops are left out.
    """

    metric: str
    title: str
    change: Callable[[float], float]
    calm: bool


METRICS = (
    Metric("ended", "ended by itself", "share"),
    Metric("stopped_after_one", "stopped after item 1", "share"),
    Metric("has_list", "answers with a list", "share"),
    Metric("items_per_list", "items per list", digits=1),
    Metric("duplicate_heads", "duplicate heads", "share"),
    Metric("looping", "loops", "share"),
    Metric("repeated_4grams", "repeated 4-grams", "share"),
    Metric("distinct_1", "distinct-1", "share"),
    Metric("distinct_2", "distinct-2", "share"),
    Metric("distinct_3", "distinct-3", "share"),
    Metric("compression", "compression"),
    Metric("tokens", "tokens", digits=0),
    Metric("threads", "threads", digits=1),
    Metric("likelihood", "log-likelihood per token", "nats", 3),
    Metric("likelihood_seam", "the same of seams", "nats", 3),
    Metric("likelihood_rest", "the same of the rest", "nats", 3),
    Metric("agreement", "agreement of rescoring", "share"),
    Metric("between_details", "similarity of two details"),
    Metric("detail_to_head", "similarity of detail and head"),
    Metric("detail_to_prompt", "similarity of detail and prompt"),
    Metric("chrf", "chrF", digits=1),
    Metric("rouge_l", "ROUGE-L", "share"),
    Metric(CHECKED, "checked instructions", "share"),
    Metric("all_checks", "all of an answer's instructions", "share"),
)
GOALS = (
    Goal("likelihood", "likelihood of a token under the base", lambda nats: math.expm1(nats), True),
    Goal("repeated_4grams", "4-grams that are not repeated", lambda share: -share, False),
    Goal(CHECKED, "checked instructions", lambda share: share, False),
)


def means(answers: Iterable[Figures]) -> dict[str, float | None]:
    """Each metric's mean over the answers that have it."""
    rows = list(answers)
    found = {m.name: [value for row in rows if (value := row.get(m.name)) is not None] for m in METRICS}
    return {name: fmean(values) if values else None for name, values in found.items()}


def differences(measured: Measured, ours: str, theirs: str, metric: str, calm: bool = False) -> dict[str, float]:
    """By question, how much more of the metric ours has: the mean over repeats in which both have it.

    calm: leaves out repeats in which one of the two loops.
    """
    found: dict[str, list[float]] = {}
    for key, one in measured[ours].items():
        other = measured[theirs].get(key, {})
        value, base = one.get(metric), other.get(metric)
        loops = bool(one.get("looping") or other.get("looping"))
        if value is not None and base is not None and not (calm and loops):
            found.setdefault(key[0], []).append(value - base)
    return {question: fmean(values) for question, values in found.items()}


def compared(measured: Measured, ours: str, theirs: str) -> dict[str, dict[str, Any]]:
    """Each metric's mean difference over questions that both have, with its interval."""
    found = {}
    for metric in METRICS:
        by_question = differences(measured, ours, theirs, metric.name)
        if by_question:
            interval = mean_of(list(by_question.values()))
            found[metric.name] = {**asdict(interval), "questions": len(by_question)}
    return found


def verdict(
    measured: Measured, asked: Collection[str], checked: Collection[str], pairs: Sequence[tuple[str, str]] = PAIRS
) -> list[dict[str, Any]]:
    """Every goal for every pair of systems that have answered.

    asked, checked: the questions of the first two goals, and of the third. `difference` is a change for the
    better where it is above zero. `reached`: whether the lower end of its 95 % interval is no worse than `MARGIN`; None
    where there is no question to go by.
    """
    found = []
    for ours, theirs in pairs:
        if ours not in measured or theirs not in measured:
            continue
        for goal in GOALS:
            chosen = checked if goal.metric == CHECKED else asked
            by_question = differences(measured, ours, theirs, goal.metric, goal.calm)
            values = [value for question, value in by_question.items() if question in chosen]
            interval = _change(goal, mean_of(values)) if values else None
            row = {"metric": goal.metric, "title": goal.title, "ours": ours, "theirs": theirs, "questions": len(values)}
            row |= {"decides": (ours, theirs) in DECIDING_PAIRS, "calm": goal.calm}
            row |= {"difference": None, "low": None, "high": None, "reached": None}
            if interval is not None:
                row |= {"difference": interval.value, "low": interval.low, "high": interval.high}
                row["reached"] = interval.low >= -MARGIN
            found.append(row)
    return found


def _change(goal: Goal, interval: Interval) -> Interval:
    """The interval as a change for the better; where less is better, its ends trade places."""
    value, low, high = map(goal.change, (interval.value, interval.low, interval.high))
    return replace(interval, value=value, low=min(low, high), high=max(low, high))
