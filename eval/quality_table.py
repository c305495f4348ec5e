"""A quality report as Markdown: what decides, then every figure of every system with differences between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .plan import decoding
from .quality_compare import MARGIN, METRICS, Metric


def table(found: dict[str, Any]) -> str:
    """report.md of what `quality.measure` found."""
    plan, names = found["plan"], found["systems"]
    sets = ", ".join(f"{its['parts']['all']['questions']} of {name}" for name, its in found["sets"].items())
    often = f", {found['repeats']} times each" if found["repeats"] > 1 else ""
    lines = [
        f"{plan['model']} ({plan['weights']}) against {plan['base']} as it was before tuning ({plan['base_weights']}), "
        f"{plan['runtime']}; {decoding(plan['temperature'], plan['top_p'])}, at most {plan['max_new_tokens']} new "
        f"tokens; questions: {sets}{often}.",
        "",
        *(line for sentence in found["left_out"] for line in (sentence, "")),
        *_verdict(found["verdict"]),
    ]
    for name, its in found["sets"].items():
        parts = its["parts"] if its["looping"] else {"all": its["parts"]["all"]}
        for part, figures in parts.items():
            loops = f", {len(its['looping'])} of which loop in some system" if part == "all" else ""
            lines += [f"**{name}, {part}** ({figures['questions']} questions{loops})", ""]
            lines += [*_figures(names, figures), ""]
    return "\n".join(lines)


def _verdict(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "**What decides**: change for the better, in percent of a token's likelihood and else in points, with the "
        "paired 95 % bootstrap interval over questions. A goal is reached where the interval does not reach below "
        f"-{MARGIN:.0%}.",
        "",
        "| figure | whose | against | change | questions | goal reached |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        calm = ", without loops" if row["calm"] else ""
        change = "-" if row["difference"] is None else _change(row)
        reached = "-" if row["reached"] is None else "yes" if row["reached"] else "no"
        decides = reached if row["decides"] else f"({reached})"
        cells = (row["title"] + calm, row["ours"], row["theirs"], change, str(row["questions"]), decides)
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", "In brackets what is reported and does not decide.", ""]


def _change(row: dict[str, Any]) -> str:
    return f"{row['difference']:+.1%} ({row['low']:+.1%} to {row['high']:+.1%})"


def _figures(names: Sequence[str], figures: dict[str, Any]) -> list[str]:
    """A line per metric that some system has: means, and differences between pairs of systems."""
    pairs = figures["pairs"]
    columns = ["figure", *names, *(f"{pair['ours']} less {pair['theirs']}" for pair in pairs)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for metric in METRICS:
        values = [figures["systems"][name][metric.name] for name in names]
        if all(value is None for value in values):
            continue
        cells = [_shown(metric, value) for value in values]
        cells += [_difference(metric, pair["metrics"].get(metric.name)) for pair in pairs]
        lines.append(f"| {' | '.join([metric.title, *cells])} |")
    return lines


def _shown(metric: Metric, value: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:{sign}.1%}" if metric.kind == "share" else f"{value:{sign}.{metric.digits}f}"


def _difference(metric: Metric, found: dict[str, float] | None) -> str:
    if found is None:
        return "-"
    value, low, high = (_shown(metric, found[name], "+") for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"
