"""A quality report's picture: the figures that decide with their intervals, and how answers end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .bench_plots import COLOURS, HATCHES, axes_of, save
from .quality_compare import GOALS, MARGIN

SHARES = (("ended", "ended"), ("stopped_after_one", "stopped\nafter item 1"), ("looping", "loops"),
          ("repeated_4grams", "repeated\n4-grams"), ("duplicate_heads", "duplicate\nheads"))  # fmt: skip


def plot(path: Path, found: dict[str, Any]) -> None:
    """A panel for each goal, and one of shares in the first set of questions."""
    figure, axes = axes_of(13.0, 3.4, len(GOALS) + 1)
    for goal, panel in zip(GOALS, axes, strict=False):
        rows = [row for row in found["verdict"] if row["metric"] == goal.metric]
        _changes(panel, goal.title, rows)
    _shares(axes[-1], found)
    save(figure, path)


def _changes(axes: Any, title: str, rows: list[dict[str, Any]]) -> None:
    """A line per pair of systems; what does not decide is grey."""
    for place, row in enumerate(rows):
        if row["difference"] is None:
            continue
        colour = COLOURS[2] if row["decides"] else COLOURS[0]
        value, low, high = (100 * row[name] for name in ("difference", "low", "high"))
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot(value, place, "o", color=colour)
    axes.axvline(0, color="black", linewidth=0.7)
    axes.axvline(-100 * MARGIN, color=COLOURS[4], linestyle="--", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{row['ours']}\nagainst {row['theirs']}" for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("change for the better, %", fontsize=8)


def _shares(axes: Any, found: dict[str, Any]) -> None:
    name, its = next(iter(found["sets"].items()))
    names, means = found["systems"], its["parts"]["all"]["systems"]
    width = 0.8 / len(names)
    for index, system in enumerate(names):
        places = [place + (index - (len(names) - 1) / 2) * width for place in range(len(SHARES))]
        heights = [100 * (means[system][metric] or 0.0) for metric, _ in SHARES]
        style = {"color": COLOURS[index], "hatch": HATCHES[index], "edgecolor": "white"}
        axes.bar(places, heights, width, label=system, **style)
    axes.set_xticks(range(len(SHARES)), [label for _, label in SHARES], fontsize=7)
    axes.set_title(f"{name}, all questions", fontsize=9)
    axes.set_ylabel("%", fontsize=8)
    axes.legend(frameon=False, fontsize=7)
