"""What a language model thinks of the answers: FastChat's prompts and verdicts, any OpenAI-compatible endpoint.

Every answer is rated alone, from 1 to 10; with a system to judge against, every other system's answer is also compared
with that one's, in both orders: it wins where it wins both, and all else is a tie. `judge/said.jsonl` keeps what the
judge said by what it was asked, so that a killed run goes on, a changed answer is judged anew, and systems that gave
the same answer share one verdict.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from medusa_apar.job import Job, write_text
from medusa_apar.json_files import json_object, parsed_lines

from . import prompts
from .bench import SUMMARY, TABLE
from .chat_endpoint import ChatEndpoint
from .judge_files import FOLDER, WITH_REFERENCE, references
from .prompts import Prompt
from .runs import Runs
from .statistics import mean_of

SAID = "said.jsonl"
RATING = re.compile(r"\[\[(\d+(?:\.\d*)?)\]\]")
LENIENT_RATING = re.compile(r"\[(\d+(?:\.\d*)?)\]")  # for judges that forget a pair of brackets
VERDICTS = {"[[A]]": "A", "[[B]]": "B", "[[C]]": "tie"}
POINTS = {"win": 1.0, "tie": 0.5, "loss": 0.0}


class Judge:
    """The endpoint, its prompts, and the references to the set of prompts called `set_name`.

    Raises what `ChatEndpoint` and `prompts.fetch` raise, so before anything is timed.
    """

    def __init__(self, url: str, model: str | None, set_name: str) -> None:
        self.endpoint = ChatEndpoint(url, model)
        self.templates = {row["name"]: row for _, row in parsed_lines(prompts.fetch(prompts.JUDGE_PROMPTS))}
        self.references = references(set_name)

    def rate(self, said: Runs, prompt: Prompt, answer: str) -> float | None:
        """None where no rating can be read."""
        return rating(self._ask(said, ("single-v1", "single-math-v1"), prompt, {"answer": answer}))

    def compare(self, said: Runs, prompt: Prompt, ours: str, theirs: str) -> str | None:
        """`ours` against `theirs`: win, tie or loss; None where one of the two verdicts cannot be read."""
        if ours == theirs:  # nothing to ask
            return "tie"
        kind = ("pair-v2", "pair-math-v1")
        first = verdict(self._ask(said, kind, prompt, {"answer_a": ours, "answer_b": theirs}))
        second = verdict(self._ask(said, kind, prompt, {"answer_a": theirs, "answer_b": ours}))
        if first is None or second is None:
            return None
        return {("A", "B"): "win", ("B", "A"): "loss"}.get((first, second), "tie")

    def _ask(self, said: Runs, kind: tuple[str, str], prompt: Prompt, answers: dict[str, str]) -> str:
        values = {"question": prompt.text, **answers}
        reference = self.references.get(prompt.id) if prompt.category in WITH_REFERENCE else None
        if reference is not None:
            values["ref_answer_1"] = reference["choices"][0]["turns"][0]
        template = self.templates[kind[reference is not None]]
        messages = [
            {"role": "system", "content": template["system_prompt"]},
            {"role": "user", "content": template["prompt_template"].format(**values)},
        ]
        key = self.endpoint.model, hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:32]
        if not isinstance(said.rows.get(key, {}).get("said"), str):
            row = {"judge": key[0], "asked": key[1], "template": template["name"], "prompt": prompt.id}
            said.add([row | {"said": self.endpoint.complete(messages), "at": round(time.time(), 1)}])
        judgement: str = said.rows[key]["said"]
        return judgement


def rating(text: str) -> float | None:
    """The first rating in the judge's text, as FastChat reads it; None for one that is not on the scale."""
    found = RATING.search(text) or LENIENT_RATING.search(text)
    value = float(found[1]) if found else 0.0
    return value if 1 <= value <= 10 else None


def verdict(text: str) -> str | None:
    """A, B or tie, as FastChat reads it: [[A]] anywhere goes before [[B]], that before [[C]]."""
    return next((name for mark, name in VERDICTS.items() if mark in text), None)


def run(
    job: Job, judge: Judge, results: Runs, asked: Sequence[Prompt], names: Sequence[str], against: str | None
) -> dict[str, Any]:
    """Has the first answers of `names` judged, and adds what came of it to summary.json and table.md."""
    folder = job.folder / FOLDER
    folder.mkdir(exist_ok=True)
    said = Runs(folder / SAID, ("judge", "asked"))
    ratings: dict[str, dict[str, float | None]] = {name: {} for name in names}
    games: dict[str, dict[str, str | None]] = {name: {} for name in names if against and name != against}
    with job.bar("judging", len(asked) * len(names)) as bar:
        for prompt in asked:
            texts = {name: results.rows[name, prompt.id, 0]["text"] for name in names}
            for name in names:
                ratings[name][prompt.id] = judge.rate(said, prompt, texts[name])
                if against and name != against:
                    games[name][prompt.id] = judge.compare(said, prompt, texts[name], texts[against])
                bar.advance(shown=f"{prompt.id} {name}")
            if not job.console.is_terminal:
                job.say(f"{prompt.id} judged")
    found = summarise(ratings, games, {p.id: p.category for p in asked})
    found = {"judge": judge.endpoint.model, "url": judge.endpoint.url, "against": against, **found}
    job.log("judge", **found)
    summary = json_object(job.folder / SUMMARY)
    write_text(job.folder / SUMMARY, json.dumps(summary | {"judge": found}, indent=2, ensure_ascii=False) + "\n")
    speeds = (job.folder / TABLE).read_text(encoding="utf-8")
    write_text(job.folder / TABLE, f"{speeds}\n{table(found)}")
    return found


def summarise(
    ratings: dict[str, dict[str, float | None]], games: dict[str, dict[str, str | None]], categories: dict[str, str]
) -> dict[str, Any]:
    """Mean ratings over the prompts where every system's could be read, and how the pairs ended."""
    readable = [p for p in categories if all(given[p] is not None for given in ratings.values())]
    kinds = dict.fromkeys(categories[p] for p in readable if categories[p])
    found: dict[str, Any] = {"prompts": len(categories), "rated": len(readable), "systems": {}}
    for name, given in ratings.items():
        found["systems"][name] = {
            "rating": _mean([given[p] for p in readable]),
            "categories": {kind: _mean([given[p] for p in readable if categories[p] == kind]) for kind in kinds},
            "unreadable": sum(value is None for value in given.values()),
        }
    for name, ended in games.items():
        counts = Counter(ended.values())
        points = [POINTS[how] for how in ended.values() if how is not None]
        found["systems"][name]["games"] = {
            **{how: counts[how] for how in POINTS},
            "points": _mean(points),
            "unreadable": counts[None],
        }
    return found


def _mean(values: Sequence[Any]) -> dict[str, float] | None:
    return asdict(mean_of(values)) if values else None


def table(found: dict[str, Any]) -> str:
    """The judge's opinion as Markdown."""
    against = found["against"]
    columns = ["system", "rating", "unreadable"]
    lines = [
        f"**judged** by {found['judge']}: mean ratings of 1 to 10 over the {found['rated']} of {found['prompts']} "
        "prompts where every system's could be read (95 % bootstrap interval)"
        + (f"; pairs against {against}, in both orders, a win counting 1 and a tie 0.5." if against else "."),
        "",
    ]
    if against:
        columns += ["wins", "ties", "losses", "points", "unreadable pairs"]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, figures in found["systems"].items():
        cells = [name, _interval(figures["rating"], 2), str(figures["unreadable"])]
        if against and "games" not in figures:
            cells += ["-"] * 5
        elif against:
            games = figures["games"]
            cells += [str(games[how]) for how in POINTS] + [_interval(games["points"], 2), str(games["unreadable"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _interval(value: dict[str, float] | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value['value']:.{digits}f} ({value['low']:.{digits}f} to {value['high']:.{digits}f})"
