"""A benchmark's summary as Markdown: systems side by side, and how near the machine's ceilings ours come."""

from __future__ import annotations

from typing import Any

from .ceilings import Ceilings, sentence
from .plan import Plan

COLUMNS = (
    *("system", "weights", "tokens/s", "times the tokens/s", "times as soon done", "s per answer", "first token, s"),
    *("tokens per answer", "tokens per step", "rows per step", "threads", "slots", "repeated 4-grams", "ended"),
)
SAMPLED = (
    "Sampled answers are other texts from system to system, longer or shorter: only tokens per second compare them."
)
FORWARD = ("system", "ms per step", "rows per step", "GB/s", "of the ceiling", "GMAC/s", "of the ceiling at such rows")


def table(summary: dict[str, Any], plan: Plan, ceilings: Ceilings | None = None) -> str:
    """Every number with what it was measured on."""
    first, sampled = summary["systems"][0], summary["sampled"]
    often = f", {summary['repeats']} times each" if summary["repeats"] > 1 else ""
    lines = [
        f"{plan.model}, {plan.device}, {plan.threads} threads, our runtime {plan.runtime}; {plan.decoding}, at most "
        f"{plan.max_new_tokens} new tokens; {summary['prompts']} prompts{often}, {len(summary['looping'])} of which "
        f"loop in some system. Speeds are totals over prompts (95 % bootstrap interval), times are against {first}.",
        *(["", SAMPLED] if sampled else []),
        *_engines(summary),
        "",
    ]
    columns = [column for column in COLUMNS if not (sampled and column == "times as soon done")]
    for part, figures in summary["parts"].items():
        lines += [
            f"**{part}** ({figures['prompts']} prompts)",
            "",
            f"| {' | '.join(columns)} |",
            "|---" * len(columns) + "|",
        ]
        for name in summary["systems"]:
            f = figures[name]
            cells = [
                name,
                summary["weights"][name] or plan.dtype,
                _interval(f["tokens_per_second"], 1),
                _interval(f["times_the_speed"], 2),
                *([] if sampled else [_interval(f["times_the_answer"], 2)]),
                f"{f['seconds_per_answer']:.2f}",
                f"{f['first_token_seconds']:.2f}",
                f"{f['tokens_per_answer']:.0f}",
                _number(f["tokens_per_step"], 2),
                _number(f["rows_per_step"], 1),
                f"{f['threads']:.1f}",
                _number(f["peak_slots"], 0),
                "-" if f["repeated_4grams"] is None else f"{f['repeated_4grams']:.0%}",
                f"{f['stopped']:.0%}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, *_forward(summary, plan, ceilings)])


def _forward(summary: dict[str, Any], plan: Plan, ceilings: Ceilings | None) -> list[str]:
    """What the systems that run compiled code read and multiplied in their forward passes."""
    figures = summary["parts"]["all"]
    rows = [(name, found) for name in summary["systems"] if (found := figures[name]["forward"])]
    if not rows:
        return []
    kind = plan.runtime.rpartition(", ")[2]
    about = f" {sentence(ceilings, [kind])}" if ceilings else ""
    lines = [
        "**In forward passes** of the compiled runtime, prompts' among them: weights and used KV slots, each read once "
        f"a step, and products, over the time of the passes.{about}",
        "",
        f"| {' | '.join(FORWARD)} |",
        "|---" * len(FORWARD) + "|",
    ]
    for name, found in rows:
        per_step = figures[name]["rows_per_step"]
        shares = ["-", "-"]
        if ceilings:
            most = ceilings.gb_per_second, ceilings.products(kind, per_step)
            reached = found["gb_per_second"], found["gmac_per_second"]
            shares = [_share(value, ceiling) for value, ceiling in zip(reached, most, strict=True)]
        cells = [
            *(name, f"{found['seconds_per_step'] * 1e3:.2f}", _number(per_step, 1)),
            *(f"{found['gb_per_second']:.1f}", shares[0], f"{found['gmac_per_second']:.0f}", shares[1]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _share(value: float, ceiling: float | None) -> str:
    """What share of a ceiling a value is, "-" where none was measured. Above 100 % the ceiling cannot be right."""
    if ceiling is None:
        return "-"
    return f"{value / ceiling:.0%}{' (not to be trusted)' if value > ceiling else ''}"


def _engines(summary: dict[str, Any]) -> list[str]:
    known = [f"{name}: {software}" for name, software in summary["software"].items() if software]
    return ["", f"Engines: {'; '.join(known)}."] if known else []


def _interval(value: dict[str, float], digits: int) -> str:
    return f"{value['value']:.{digits}f} ({value['low']:.{digits}f} to {value['high']:.{digits}f})"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
