"""A load benchmark's pictures: latency and throughput against clients, and throughput against a capped pool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .bench_plots import COLOURS, axes_of, save
from .serve_bench import Load, Results, pools_of
from .serve_figures import KEPT

MARKERS = "os^vD*PX"
# These have the first styles wherever they are drawn, the others those that follow.
FIRST = ("plain", "vllm", "threads", "heads", "both")
STYLES = (0, 7, 2, 3, 4, 5, 6, 1)  # of COLOURS


def plot(folder: Path, results: Results, names: Sequence[str]) -> list[Path]:
    """clients.png, rates.png and pool_N.png (N clients), each where there is anything to draw; returns their paths.

    A cross is over points where requests failed.
    """
    uncapped = [load for load in results.loads() if load.slots is None and load.beside is None]
    clients = [load for load in uncapped if load.clients is not None]
    rates = [load for load in uncapped if load.rate is not None]
    drawn = []
    for path, loads, label in (
        (folder / "clients.png", clients, "clients"),
        (folder / "rates.png", rates, "questions per second"),
    ):
        if loads:
            _against_load(path, results, names, loads, label)
            drawn.append(path)
    for number in sorted({load.clients for load in results.loads() if load.slots is not None and load.clients}):
        drawn.append(_against_pool(folder / f"pool_{number}.png", results, names, number))
    return drawn


def _style(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    others = [name for name in names if name not in FIRST]
    return {
        name: {"color": COLOURS[STYLES[place % len(STYLES)]], "marker": MARKERS[place % len(MARKERS)]}
        for place, name in enumerate([*FIRST, *others])
    }


def _mark(panel: Any, failed: Sequence[Any]) -> None:
    """A cross over points of servers that have failed some of what was asked."""
    if failed:
        panel.plot(*zip(*failed, strict=True), color="black", marker="x", markersize=8, linestyle="none")


def _against_load(path: Path, results: Results, names: Sequence[str], loads: Sequence[Load], label: str) -> None:
    figures: Any = [("tokens_per_second", None, "tokens per second"), ("latency", "mean", "seconds per answer, mean")]
    figures.append(("first_token", "mean", "seconds to the first token, mean"))
    figure, axes = axes_of(11.0, 3.6, panels=len(figures))
    styles = _style(names)
    for panel, (key, part, title) in zip(axes, figures, strict=True):
        for name in names:
            points, failed = [], []
            for load in loads:
                row = results.middle(name, load)
                value = None if row is None else row[key] if part is None else (row[key] or {}).get(part)
                if value is not None:
                    points.append((load.clients if load.clients is not None else load.rate, value))
                    failed += points[-1:] if row is not None and row["errors"] else []
            if points:
                panel.plot(*zip(*points, strict=True), label=name, markersize=4, **styles[name])
                _mark(panel, failed)
        panel.set_xscale("log", base=2)
        shown = [load.clients if load.clients is not None else load.rate for load in loads]
        panel.set_xticks(shown, [f"{value:g}" for value in shown])
        panel.minorticks_off()
        panel.set_xlabel(label)
        panel.set_ylabel(title)
        panel.set_ylim(bottom=0)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=len(labels), loc="outside upper left")
    save(figure, path)


def _against_pool(path: Path, results: Results, names: Sequence[str], clients: int) -> Path:
    figure, axes = axes_of(6.4, 3.8)
    styles = _style(names)
    for name in names:
        loads = [load for load in pools_of(results, clients) if results.middle(name, load) is not None]
        if not loads:
            continue
        rows = [results.middle(name, load) or {} for load in loads]
        points = [(load.slots, row["tokens_per_second"] or 0.0) for load, row in zip(loads, rows, strict=True)]
        axes.plot(*zip(*points, strict=True), label=name, markersize=4, **styles[name])
        _mark(axes, [point for point, row in zip(points, rows, strict=True) if row["errors"]])
        # What was reached without a cap in the same turns.
        beside = [results.middle(name, Load(clients, beside=load.slots)) or {} for load in loads]
        level = [(load.slots, KEPT * speed) for load, row in zip(loads, beside, strict=True)
                 if (speed := row.get("tokens_per_second"))]  # fmt: skip
        if level:
            axes.plot(*zip(*level, strict=True), color=styles[name]["color"], linewidth=0.7, linestyle=":")
    axes.set_xlabel(f"KV slots at most ({clients} clients; dotted: {KEPT:.0%} of what is reached uncapped)")
    axes.set_ylabel("tokens per second")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)
    return path
