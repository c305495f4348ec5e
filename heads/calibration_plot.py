"""calibration.png: what `calibrate.report` found, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .calibrate import LEAST, OCTAVES, Table

COLOURS = ("#1b6ca8", "#e07b39", "#2a9d6f", "#a23b72", "#7a6c5d", "#4c4c9d", "#b8a12b", "#555555")


def plot(found: dict[str, Any], path: Path, title: str = "") -> None:
    """The report as calibration.png: acceptance, reliability, tokens. ImportError where matplotlib is missing."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(13.5, 4.3), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15)
    left, middle, right = figure.subplots(1, 3)
    if title:
        figure.suptitle(title, fontsize=11)
    table, marginal = found["acceptance"], found["marginal"]
    colours = [COLOURS[head % len(COLOURS)] for head in range(len(table))]
    _plot_acceptance(left, table, marginal, colours)
    _plot_reliability(middle, found["reliability"], colours)
    _plot_tokens(right, found["tokens"])
    for axes in (left, middle, right):
        axes.grid(color="#e6e6e6", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.minorticks_off()
        axes.title.set_fontsize(10.5)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=150, format="png")
    temporary.replace(path)


def _plot_acceptance(axes: Any, table: Table, marginal: Table, colours: Sequence[str]) -> None:
    ranks = range(1, len(table[0]) + 1)
    for head, colour in enumerate(colours):
        axes.plot(ranks, table[head], "o-", color=colour, markersize=4, label=f"head {head + 1}")
        axes.plot(ranks, [max(share, LEAST) for share in marginal[head]], ":", color=colour, linewidth=1.2)
    axes.plot([], [], ":", color="#777777", linewidth=1.2, label="whatever came before")
    axes.set(title="acceptance where the path so far is right", xlabel="rank of the guess", ylabel="share accepted")
    axes.set_yscale("log")
    axes.set_yticks([0.001, 0.01, 0.1, 1], ["0.1 %", "1 %", "10 %", "100 %"])
    lowest = min(share for ranks_ in (*table, *marginal) for share in ranks_)
    axes.set_ylim(max(0.5 * lowest, 5e-4), 1.0)
    axes.set_xticks(list(ranks))
    axes.legend(frameon=False, fontsize=8)


def _plot_reliability(axes: Any, reliability: list[list[dict[str, Any]]], colours: Sequence[str]) -> None:
    low = 2.0**-OCTAVES
    axes.plot([low, 1], [low, 1], color="#999999", linewidth=1, label="as claimed")
    for head, (rows, colour) in enumerate(zip(reliability, colours, strict=True)):
        shown = [row for row in rows if row["count"] >= 100 and row["right"] > 0 and row["claimed"] >= low]
        claimed, right = [row["claimed"] for row in shown], [row["right"] for row in shown]
        axes.plot(claimed, right, "o-", color=colour, markersize=3, linewidth=1.2, label=f"head {head + 1}")
    axes.set(title="claimed probability against the truth", xlabel="claimed probability", ylabel="share right")
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks, labels = [0.001, 0.01, 0.1, 1], ["0.1 %", "1 %", "10 %", "100 %"]
    axes.set_xticks(ticks, labels)
    axes.set_yticks(ticks, labels)
    axes.set(xlim=(low, 1.15), ylim=(low, 1.15))
    axes.legend(frameon=False, fontsize=8)


def _plot_tokens(axes: Any, tokens: dict[str, list[float]]) -> None:
    lines = {
        "expected": ("expected from the table", "--", COLOURS[0]),
        "measured": ("measured, every position", "-", COLOURS[0]),
        "simulated": ("measured, step by step", "-", COLOURS[1]),
        "joint_simulated": ("step by step, tree from joint counts", ":", COLOURS[2]),
    }
    for name, (label, style, colour) in lines.items():
        axes.plot(range(1, len(tokens[name]) + 1), tokens[name], style, color=colour, label=label)
    axes.set(title="tokens per thread and step", xlabel="draft nodes (measured on answers held out)", ylabel="tokens")
    axes.set_xlim(0, len(tokens["expected"]) + 1)
    axes.set_ylim(bottom=1)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
