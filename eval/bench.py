"""The latency benchmark: the same prompts through several systems, prompt by prompt and turn by turn.

`results.jsonl` has a line per system, prompt and repeat, and a killed run goes on where it stopped. A summary is made
of nothing but these lines, and only where every system has answered the same prompts under the same limit.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from medusa_apar.finetune.corpus import repeated_share
from medusa_apar.generate import MedusaApar
from medusa_apar.job import Job, machine, write_text
from medusa_apar.models.chat import encode

from .bench_tables import table
from .ceilings import BUSY, Ceilings, others_share
from .loops import LOOPS, looping_share
from .plan import Plan
from .prompts import Prompt
from .runs import Runs
from .statistics import median_of, ratio_of_totals, speed_ratio
from .systems import System, seeded

SUMMARY, TABLE = "summary.json", "table.md"
WARM_UP_TOKENS = 16
# What is averaged over a prompt's repeats.
COUNTED = (
    *("tokens", "steps", "rows", "threads", "peak_threads", "peak_slots", "undrafted_steps", "repeated_4grams"),
    *("forward_seconds", "read_bytes", "macs"),
)


def run(
    job: Job,
    results: Runs,
    apar: MedusaApar,
    systems: Sequence[System],
    prompts: Sequence[Prompt],
    plan: Plan,
    repeats: int,
) -> None:
    """Answers what `results` do not hold yet, the systems taking turns at every prompt."""
    wanted = [(p, n, s) for n in range(repeats) for p in prompts for s in systems]
    todo = [(p, n, s) for p, n, s in wanted if (s.name, p.id, n) not in results]
    if not todo:
        return
    busy = others_share()
    inputs = {p.id: encode(apar.tokenizer, p.text) for p, _, _ in todo}
    device = apar.model.device
    for system in {s.name: s for _, _, s in todo}.values():
        first = {name: tensor.to(device) for name, tensor in inputs[todo[0][0].id].items()}
        # On a GPU kernels are compiled and graphs captured for every size of step that an answer comes to.
        tokens = plan.max_new_tokens if device.type == "cuda" else min(WARM_UP_TOKENS, plan.max_new_tokens)
        system.answer(first, tokens, seeded(plan.sampling, "warm-up", 0))
    with job.bar("answering", len(wanted), len(wanted) - len(todo)) as bar:
        for prompt, number, system in todo:
            given = {name: tensor.to(device) for name, tensor in inputs[prompt.id].items()}
            sampling = seeded(plan.sampling, prompt.id, number)
            answer = system.answer(given, plan.max_new_tokens, sampling)
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
                        "seed": sampling.seed,
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


# ---- what follows from the lines


@contextmanager
def results_of(path: Path) -> Iterator[None]:
    """ValueError, in a sentence, where lines of the file have not what is made of them here."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{path} holds a line that is no result of ours ({error!r})") from error


@dataclass(frozen=True, slots=True)
class Median:
    """A system's answer to a prompt: of one text, greedily repeated, the median of its times; of sampled texts, as many
    as repeats, the mean of everything, in which a busy repeat counts with all its time. `rate` is always a median."""

    prompt: str
    category: str
    tokens: float
    seconds: float
    first_token_seconds: float
    rate: float  # tokens per second: the median of the repeats' own
    stopped: float  # share of the repeats that ended by themselves
    texts: list[Any]  # token ids of the repeats in order; None where nobody wrote them down
    row: dict[str, Any]  # of the first repeat, its counts those of all: means, `looping` the most, drafts added up

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]]) -> Median:
        """All repeats of a prompt by one system."""
        typical = fmean if is_sampled(rows) else median_of
        row = _together(rows) if len(rows) > 1 else rows[0]
        return cls(
            prompt=row["prompt"],
            category=row["category"],
            tokens=row["tokens"],
            seconds=typical([row["seconds"] for row in rows]),
            first_token_seconds=typical([row["first_token_seconds"] for row in rows]),
            rate=median_of([row["tokens"] / row["seconds"] for row in rows]),
            stopped=fmean(row["finish"] == "stop" for row in rows),
            texts=[row.get("ids") for row in sorted(rows, key=lambda row: row["repeat"])],
            row=row,
        )


def is_sampled(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether repeats of a prompt are other texts; earlier versions were greedy."""
    return any(row.get("seed") is not None for row in rows)


def _together(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found = dict(rows[0]) | {"looping": max(row["looping"] for row in rows)}
    for name in COUNTED:
        values = [row[name] for row in rows if row.get(name) is not None]
        found |= {name: fmean(values)} if values else {}
    for name in ("drafted", "accepted"):
        if name in found:
            found[name] = dict(sum((Counter(row[name]) for row in rows), Counter()))
    return found


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
    return {name: [Median.of(by[name][prompt]) for prompt in by[first]] for name in names}


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
    summary["sampled"] = is_sampled(rows)
    summary["repeats"] = 1 + max(row["repeat"] for row in rows if row["system"] in names)
    for what in ("weights", "software"):  # of earlier versions' lines nobody knows
        summary[what] = {name: found[name][0].row.get(what, "") for name in names}
    for part, chosen in parts.items():
        if not chosen:
            continue
        base = [m for m in found[names[0]] if m.prompt in chosen]
        summary["parts"][part] = {
            name: _figures([m for m in found[name] if m.prompt in chosen], base, summary["sampled"]) for name in names
        } | {"prompts": len(chosen)}
    return summary


def _figures(answers: list[Median], base: list[Median], sampled: bool) -> dict[str, Any]:
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
        # Sampled answers are other texts, of other lengths: sooner done says nothing.
        "times_the_answer": None if sampled else asdict(ratio_of_totals([m.seconds for m in base], seconds)),
        "seconds_per_answer": sum(seconds) / count,
        "first_token_seconds": median_of([m.first_token_seconds for m in answers]),
        "tokens_per_answer": sum(tokens) / count,
        "tokens_per_step": None if None in steps else sum(tokens) / sum(steps),
        "rows_per_step": None if None in steps or None in rows else sum(rows) / sum(steps),
        "threads": sum(m.row["threads"] for m in answers) / count,
        "peak_slots": None if None in slots else sum(slots) / count,
        "repeated_4grams": sum(repeated) / len(repeated) if repeated else None,
        "stopped": sum(m.stopped for m in answers) / count,
        "looping": sum(m.row["looping"] > LOOPS for m in answers),
        "forward": _forward([m.row for m in answers]),
    }


def _forward(rows: list[dict[str, Any]]) -> dict[str, float] | None:
    """GB and GMAC a second in forward passes, and seconds of one; None of what is not the compiled CPU runtime's."""
    if any(row.get("forward_seconds") is None for row in rows):
        return None
    seconds = sum(row["forward_seconds"] for row in rows)
    return {
        "seconds_per_step": seconds / sum(row["steps"] for row in rows),
        "gb_per_second": sum(row["read_bytes"] for row in rows) / 1e9 / seconds,
        "gmac_per_second": sum(row["macs"] for row in rows) / 1e9 / seconds,
    }


def write(
    job: Job, results: Runs, names: Sequence[str], plan: Plan, repeats: int, ceilings: Ceilings | None = None
) -> dict[str, Any]:
    """summary.json and table.md of the first so many repeats of each answer, report.json of the run.

    ceilings: of the machine, beside what systems on the compiled CPU runtime have reached.
    """
    with results_of(results.path):
        summary = summarise([row for row in results.rows.values() if row["repeat"] < repeats], names)
    job.report(**asdict(plan), systems=list(names), repeats=repeats)
    whole = {"plan": asdict(plan), **machine(), **summary}
    write_text(job.folder / SUMMARY, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    write_text(job.folder / TABLE, table(summary, plan, ceilings))
    return whole
