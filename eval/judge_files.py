"""Answers as FastChat's llm_judge has them, so that anyone with a judge of theirs can run its gen_judgment on them.

Link the folder as `data/NAME` beside gen_judgment.py and give `--bench-name NAME`. For math, reasoning and coding it
wants reference answers too: those to MT-bench's questions are written here, others (Vicuna's) come with FastChat. They
are filed under the judge's name, here gpt-4: another judge needs a copy under its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medusa_apar.job import Job, write_text
from medusa_apar.json_files import parsed_lines

from . import prompts
from .prompts import Prompt
from .runs import Runs

FOLDER = "judge"
WITH_REFERENCE = ("math", "reasoning", "coding")  # categories, by FastChat's names
MT_BENCH = ("mt", "spec")  # sets that hold its questions, under its ids


def write(job: Job, results: Runs, asked: Sequence[Prompt], names: Sequence[str], set_name: str) -> None:
    """question.jsonl, model_answer/SYSTEM.jsonl of first answers, and the references there are, in `judge/`."""
    folder = job.folder / FOLDER
    stamp = results.path.stat().st_mtime  # the same answers make the same files
    _write(
        folder / "question.jsonl",
        [{"question_id": _id(p.id), "category": p.category, "turns": [p.text]} for p in asked],
    )
    for name in names:
        rows = []
        for prompt in asked:
            text = results.rows[name, prompt.id, 0]["text"]
            answer_id = hashlib.sha256(json.dumps([name, prompt.id, text]).encode()).hexdigest()[:22]
            choices = [{"index": 0, "turns": [text]}]
            rows.append(
                {
                    "question_id": _id(prompt.id),
                    "answer_id": answer_id,
                    "model_id": name,
                    "choices": choices,
                    "tstamp": stamp,
                }
            )
        _write(folder / "model_answer" / f"{name}.jsonl", rows)
    try:
        known = references(set_name)
    except ConnectionError as error:
        job.say(f"No reference answers beside the judge files: {error}")
        return
    if rows := [known[p.id] for p in asked if p.id in known]:
        _write(folder / "reference_answer" / "gpt-4.jsonl", rows)


def references(set_name: str) -> dict[str, dict[str, Any]]:
    """GPT-4's answers by id of the question, FastChat's lines; none for sets that have no question of MT-bench."""
    if set_name not in MT_BENCH:
        return {}
    return {str(row["question_id"]): row for _, row in parsed_lines(prompts.fetch(prompts.REFERENCES))}


def _id(id: str) -> int | str:
    """FastChat's own questions have numbers."""
    return int(id) if id.isdecimal() and str(int(id)) == id else id


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
