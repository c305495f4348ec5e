"""The latency benchmark: the same prompts through several systems, prompt by prompt and turn by turn.

`results.jsonl` has a line per system, prompt and repeat, and a killed run goes on where it stopped. A summary is made
of nothing but these lines, and only where every system has answered the same prompts under the same limit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from medusa_apar.finetune.corpus import repeated_share
from medusa_apar.generate import MedusaApar
from medusa_apar.job import Job, machine, write_text
from medusa_apar.models.chat import encode

from .loops import LOOPS, looping_share
from .plan import Plan, open_results
from .prompts import Prompt
from .runs import Runs
from .statistics import median_of, ratio_of_totals, speed_ratio
from .systems import System

SUMMARY, TABLE = "summary.json", "table.md"
WARM_UP_TOKENS = 16
BUSY = 20.0  # per cent of the machine that others may use before it is said
COLUMNS = (
    *("system", "weights", "tokens/s", "times the tokens/s", "times as soon done", "s per answer", "first token, s"),
    *("tokens per answer", "tokens per step", "rows per step", "threads", "slots", "repeated 4-grams", "ended"),
)


def others_share() -> float:
    """Per cent of all cores that are busy while this process only waits, over half a second."""
    return psutil.cpu_percent(interval=0.5)


def run(
    job: Job, apar: MedusaApar, systems: Sequence[System], prompts: Sequence[Prompt], plan: Plan, repeats: int
) -> Runs:
    """Answers what `job.folder` does not hold yet, the systems taking turns at every prompt."""
    results = open_results(job.folder, plan)
    wanted = [(p, n, s) for n in range(repeats) for p in prompts for s in systems]
    todo = [(p, n, s) for p, n, s in wanted if (s.name, p.id, n) not in results]
    if not todo:
        return results
    busy = others_share()
    inputs = {p.id: encode(apar.tokenizer, p.text) for p, _, _ in todo}
    device = apar.model.device
    for system in {s.name: s for _, _, s in todo}.values():
        first = {name: tensor.to(device) for name, tensor in inputs[todo[0][0].id].items()}
        # On a GPU kernels are compiled and graphs captured for every size of step that an answer comes to.
        tokens = plan.max_new_tokens if device.type == "cuda" else min(WARM_UP_TOKENS, plan.max_new_tokens)
        system.answer(first, tokens)
    with job.bar("answering", len(wanted), len(wanted) - len(todo)) as bar:
        for prompt, number, system in todo:
            given = {name: tensor.to(device) for name, tensor in inputs[prompt.id].items()}
            answer = system.answer(given, plan.max_new_tokens)
            tokenizer: Any = apar.tokenizer
            shown = [token for token in answer.ids if token not in tokenizer.all_special_ids]
            results.add(
                [
                    {
                        "system": system.name,
                        "weights": system.weights,
                        "software": system.software,
                        "prompt": prompt.id,
                        "category": prompt.category,
                        "repeat": number,
                        "tokens": len(answer.ids),
                        "looping": round(looping_share(shown), 3),
                        "repeated_4grams": round(repeated_share(shown), 3) if len(shown) >= 4 else None,
                        **asdict(answer),
                        "text": tokenizer.decode(answer.ids, skip_special_tokens=True),
                    }
                ]
            )
            rate = len(answer.ids) / answer.seconds
            bar.advance(shown=f"{system.name} {rate:.0f} tokens/s")
            if not job.console.is_terminal:
                job.say(f"{prompt.id} {system.name}: {len(answer.ids)} tokens, {rate:.1f} a second")
    after = others_share()
    job.log("idle", before=busy, after=after)
    if max(busy, after) > BUSY:
        job.say(
            f"warning: other processes took {max(busy, after):.0f} % of the machine, so the times are not to be trusted"
        )
    return results


# ---- what follows from the lines


@dataclass(frozen=True, slots=True)
class Median:
    """A system's answer to a prompt: tokens, the median time of its repeats."""

    prompt: str
    category: str
    tokens: int
    seconds: float
    first_token_seconds: float
    row: dict[str, Any]  # of the first repeat


def medians(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, list[Median]]:
    """Per system its answers in one order of prompts.

    ValueError where the systems have not answered the same prompts as often as each other, or one of them has not
    answered all from the same weights and with the same software.
    """
    by: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in names}
    for row in rows:
        if row["system"] in by:
            by[row["system"]].setdefault(row["prompt"], []).append(row)
    first = names[0]
    for name in names:
        for what in ("weights", "software"):
            values = {row[what] for found in by[name].values() for row in found if what in row}
            if len(values) > 1:
                raise ValueError(f"{name} answered with {what} {' and '.join(sorted(values))}: give another --out")
        if (here := {prompt: len(found) for prompt, found in by[name].items()}) != {
            prompt: len(found) for prompt, found in by[first].items()
        }:
            missing = set(by[first]).symmetric_difference(here) or {"some prompts, in the number of repeats"}
            raise ValueError(f"{name} and {first} did not answer the same prompts ({sorted(missing)[0]} differs)")
    if not by[first]:
        raise ValueError(f"there are no results of {', '.join(names)}")
    return {
        name: [
            Median(
                prompt,
                by[name][prompt][0]["category"],
                by[name][prompt][0]["tokens"],
                median_of([row["seconds"] for row in by[name][prompt]]),
                median_of([row["first_token_seconds"] for row in by[name][prompt]]),
                by[name][prompt][0],
            )
            for prompt in by[first]
        ]
        for name in names
    }


def summarise(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Per system and part of the prompts: speeds with intervals, and how each compares with the first system.

    Parts are all prompts, those on which no system's answer loops, and every category.
    """
    found = medians(rows, names)
    order = [median.prompt for median in found[names[0]]]
    loops = {m.prompt for answers in found.values() for m in answers if m.row["looping"] > LOOPS}
    categories = {m.prompt: m.category for m in found[names[0]]}
    parts = {"all": set(order), "no loops": set(order) - loops}
    parts |= {c: {p for p in order if categories[p] == c} for c in dict.fromkeys(categories.values()) if c}
    summary: dict[str, Any] = {"systems": list(names), "prompts": len(order), "looping": sorted(loops), "parts": {}}
    for what in ("weights", "software"):  # of earlier versions' lines nobody knows
        summary[what] = {name: found[name][0].row.get(what, "") for name in names}
    for part, chosen in parts.items():
        if not chosen:
            continue
        base = [m for m in found[names[0]] if m.prompt in chosen]
        summary["parts"][part] = {
            name: _figures([m for m in found[name] if m.prompt in chosen], base) for name in names
        } | {"prompts": len(chosen)}
    return summary


def _figures(answers: list[Median], base: list[Median]) -> dict[str, Any]:
    tokens, seconds = [m.tokens for m in answers], [m.seconds for m in answers]
    steps = [m.row["steps"] for m in answers]
    slots = [m.row["peak_slots"] for m in answers]
    rows: list[Any] = [m.row.get("rows") for m in answers]  # of earlier versions' lines nobody knows
    repeated = [m.row["repeated_4grams"] for m in answers if m.row["repeated_4grams"] is not None]
    count = len(answers)
    return {
        "tokens_per_second": asdict(ratio_of_totals(tokens, seconds)),
        "times_the_speed": asdict(
            speed_ratio([(m.tokens, m.seconds) for m in answers], [(m.tokens, m.seconds) for m in base])
        ),
        "times_the_answer": asdict(ratio_of_totals([m.seconds for m in base], seconds)),
        "seconds_per_answer": sum(seconds) / count,
        "first_token_seconds": median_of([m.first_token_seconds for m in answers]),
        "tokens_per_answer": sum(tokens) / count,
        "tokens_per_step": None if None in steps else sum(tokens) / sum(steps),
        "rows_per_step": None if None in steps or None in rows else sum(rows) / sum(steps),
        "threads": sum(m.row["threads"] for m in answers) / count,
        "peak_slots": None if None in slots else sum(slots) / count,
        "repeated_4grams": sum(repeated) / len(repeated) if repeated else None,
        "stopped": sum(m.row["finish"] == "stop" for m in answers) / count,
        "looping": sum(m.row["looping"] > LOOPS for m in answers),
    }


def table(summary: dict[str, Any], plan: Plan) -> str:
    """The summary as Markdown; every number with what it was measured on."""
    first = summary["systems"][0]
    lines = [
        f"{plan.model}, {plan.device}, {plan.threads} threads, our runtime {plan.runtime}; greedy, at most "
        f"{plan.max_new_tokens} new tokens; {summary['prompts']} prompts, {len(summary['looping'])} of which loop in "
        f"some system. Speeds are totals over prompts (95 % bootstrap interval), times are against {first}.",
        *_engines(summary),
        "",
    ]
    for part, figures in summary["parts"].items():
        lines += [
            f"**{part}** ({figures['prompts']} prompts)",
            "",
            f"| {' | '.join(COLUMNS)} |",
            "|---" * len(COLUMNS) + "|",
        ]
        for name in summary["systems"]:
            f = figures[name]
            cells = [
                name,
                summary["weights"][name] or plan.dtype,
                _interval(f["tokens_per_second"], 1),
                _interval(f["times_the_speed"], 2),
                _interval(f["times_the_answer"], 2),
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
    return "\n".join(lines)


def _engines(summary: dict[str, Any]) -> list[str]:
    known = [f"{name}: {software}" for name, software in summary["software"].items() if software]
    return ["", f"Engines: {'; '.join(known)}."] if known else []


def _interval(value: dict[str, float], digits: int) -> str:
    return f"{value['value']:.{digits}f} ({value['low']:.{digits}f} to {value['high']:.{digits}f})"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def write(job: Job, results: Runs, names: Sequence[str], plan: Plan, repeats: int) -> dict[str, Any]:
    """summary.json and table.md of the first so many repeats of each answer, report.json of the run."""
    try:
        summary = summarise([row for row in results.rows.values() if row["repeat"] < repeats], names)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{results.path} holds a line that is no result of ours ({error!r})") from error
    job.report(**asdict(plan), systems=list(names), repeats=repeats)
    whole = {"plan": asdict(plan), **machine(), **summary}
    write_text(job.folder / SUMMARY, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    write_text(job.folder / TABLE, table(summary, plan))
    return whole
