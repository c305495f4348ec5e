"""A benchmark's pictures: speed by category, tokens per step, speed against length, one answer's threads over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from medusa_apar.job import replacing

from .runs import Runs

# Distinguishable in grey and by people who do not see red and green apart; hatches say the same again.
COLOURS = ("#9aa0a6", "#c5c9cc", "#1b6ca8", "#2a9d6f", "#e07b39", "#a23b72", "#d9b44a", "#5b5f97")
HATCHES = ("", "..", "", "//", "", "\\\\", "xx", "--")
# These have the first styles wherever they are drawn, the others those that follow.
FIRST = ("hf", "ours-ar", "threads", "heads", "ours")


def plot(folder: Path, results: Runs, summary: dict[str, Any]) -> None:
    """speed.png, steps.png, length.png and, where an answer had threads, timeline.png."""
    _by_category(folder / "speed.png", summary, "tokens_per_second", "tokens per second")
    _by_category(folder / "steps.png", summary, "tokens_per_step", "tokens per step")
    _against_length(folder / "length.png", results, summary)
    rows = [row for row in results.rows.values() if row["threads"] > 1 and row["system"] in ("ours", "threads")]
    if rows:
        _timeline(folder / "timeline.png", max(rows, key=lambda row: row["threads"]))


def axes_of(width: float, height: float, panels: int = 1) -> tuple[Any, Any]:
    """A figure and its axes; several panels stand in a row, and their axes in an array."""
    figure: Any = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, panels)
    for each in axes if panels > 1 else [axes]:
        each.grid(axis="y", color="#e6e6e6", linewidth=0.7)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _styles(names: list[str]) -> dict[str, int]:
    others = [name for name in names if name not in FIRST]
    return {name: index % len(COLOURS) for index, name in enumerate([*FIRST, *others])}


def _by_category(path: Path, summary: dict[str, Any], key: str, title: str) -> None:
    names = summary["systems"]
    parts = list(summary["parts"])
    inches = 2 + 0.28 * len(parts) * (len(names) + 1)
    figure, axes = axes_of(inches, 3.6)
    width, styles = 0.8 / len(names), _styles(names)
    for index, name in enumerate(names):
        values = [summary["parts"][part][name][key] for part in parts]
        heights = [v["value"] if isinstance(v, dict) else v or 0.0 for v in values]
        places = [place + (index - (len(names) - 1) / 2) * width for place in range(len(parts))]
        colour, hatch = COLOURS[styles[name]], HATCHES[styles[name]]
        errors = None
        if isinstance(values[0], dict):
            errors = [[v["value"] - v["low"] for v in values], [v["high"] - v["value"] for v in values]]
        axes.bar(places, heights, width, label=name, color=colour, hatch=hatch, edgecolor="white", yerr=errors,
                 error_kw={"elinewidth": 0.8})  # fmt: skip
    labels = [f"{part}\n({summary['parts'][part]['prompts']})" for part in parts]
    axes.set_xticks(range(len(parts)), labels, fontsize=8)
    axes.set_ylabel(title)
    figure.legend(frameon=False, fontsize=8, ncols=min(len(names), int(inches / 1.2)), loc="outside upper left")
    save(figure, path)


def _against_length(path: Path, results: Runs, summary: dict[str, Any]) -> None:
    figure, axes = axes_of(6.4, 3.8)
    styles = _styles(summary["systems"])
    for name in summary["systems"]:
        rows = [row for row in results.rows.values() if row["system"] == name]
        lengths, speeds = [row["tokens"] for row in rows], [row["tokens"] / row["seconds"] for row in rows]
        colour, marker = COLOURS[styles[name]], "os^vD*PX"[styles[name]]
        axes.plot(lengths, speeds, marker, color=colour, label=name, markersize=4, alpha=0.8)
    axes.set_xlabel("tokens of the answer")
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def _timeline(path: Path, row: dict[str, Any]) -> None:
    """A bar per thread, from its first to its last step."""
    spans = [(index, span) for index, span in enumerate(row["spans"]) if span]
    figure, axes = axes_of(7.0, 1.2 + 0.24 * len(spans))
    for place, (index, (first, last)) in enumerate(spans):
        axes.barh(place, last - first + 1, left=first - 1, color=COLOURS[2] if index else COLOURS[0], edgecolor="white")
    axes.set_yticks(range(len(spans)), ["trunk" if not index else f"thread {index}" for index, _ in spans], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"step ({row['steps']} in all for {row['tokens']} tokens; prompt {row['prompt']}, {row['system']})")
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.7)
    save(figure, path)
