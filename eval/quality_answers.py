"""The answers whose quality is measured: every question by every system, many at once in one engine.

DIR gets settings.json, questions.jsonl and answers.jsonl, a line per system, question and repeat; nothing else is
needed to measure them. A killed run goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from os.path import commonprefix
from pathlib import Path
from typing import Any

from medusa_apar.engine.engine import Engine
from medusa_apar.engine.plan import MAX_PREFILL_ROWS
from medusa_apar.engine.rescoring import Rescoring, run
from medusa_apar.engine.stats import ThreadAgreement
from medusa_apar.job import Job, write_text
from medusa_apar.json_files import json_object, parsed_lines
from medusa_apar.models.chat import encode
from medusa_apar.requests import Sampling
from medusa_apar.threads.paragraph_tree import Thread
from medusa_apar.threads.request import Request

from .plan import SETTINGS, keep_settings
from .prompts import Prompt
from .runs import Runs
from .systems import System, seeded

QUESTIONS, ANSWERS = "questions.jsonl", "answers.jsonl"
KEYS = ("system", "prompt", "repeat")


@dataclass(frozen=True, slots=True)
class QualityPlan:
    """What a folder's answers are of; it holds answers of one plan only."""

    model: str
    weights: str  # fingerprint
    base: str  # the untuned model's name
    base_weights: str  # fingerprint
    dtype: str
    runtime: str  # of the systems, and its weights
    prompts: str  # digest of ids and texts
    max_new_tokens: int
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, top_p=self.top_p)


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and the name of its set."""

    set: str
    prompt: Prompt


def open_answers(folder: Path, plan: QualityPlan, questions: Sequence[Question]) -> Runs:
    """answers.jsonl; ValueError where the folder holds answers of another plan."""
    keep_settings(folder, asdict(plan), {})
    rows = ({"set": question.set, **asdict(question.prompt)} for question in questions)
    write_text(folder / QUESTIONS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return Runs(folder / ANSWERS, KEYS)


def read_answers(folder: Path) -> tuple[QualityPlan, list[Question], Runs]:
    """What `open_answers` and `answer_all` left in a folder. ValueError or OSError where that is not so."""
    try:
        plan = QualityPlan(**json_object(folder / SETTINGS))
        questions = [Question(row.pop("set"), Prompt(**row)) for _, row in parsed_lines(folder / QUESTIONS)]
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder} holds no answers of `medusa-apar bench --quality` ({error})") from error
    return plan, questions, Runs(folder / ANSWERS, KEYS)


def answer_all(
    job: Job,
    answers: Runs,
    names: Sequence[str],
    make: Callable[[str], System],
    questions: Sequence[Question],
    plan: QualityPlan,
    repeats: int,
    batch: int,
) -> None:
    """Has each system answer what is not answered yet. `make` is called for those alone that have to answer."""
    wanted = [(question, repeat) for repeat in range(repeats) for question in questions]
    for name in names:
        todo = [(q, repeat) for q, repeat in wanted if (name, q.prompt.id, repeat) not in answers]
        if not todo:
            continue
        system = make(name)
        with (
            job.bar(name, len(wanted), len(wanted) - len(todo)) as bar,
            system.apar.engine(max_prefill_rows=MAX_PREFILL_ROWS) as engine,
        ):
            for first in range(0, len(todo), batch):
                rows = answer_batch(engine, system, todo[first : first + batch], plan)
                answers.add(rows)
                bar.advance(len(rows))
                if not job.console.is_terminal:
                    job.say(f"{name}: {len(wanted) - len(todo) + first + len(rows)}/{len(wanted)}")


def answer_batch(
    engine: Engine, system: System, asked: Sequence[tuple[Question, int]], plan: QualityPlan
) -> list[dict[str, Any]]:
    """A row for each question and repeat, in order.

    Tokens are chosen by the model's scores, temperature and top-p alone, whatever else its generation config asks for.
    Answers with threads are held against plain decoding of their text (`Rescoring`); those of one thread are that.
    """
    apar, requests = system.apar, []
    for question, repeat in asked:
        prompt = question.prompt
        ids = encode(apar.tokenizer, prompt.text)["input_ids"][0].tolist()
        sampling = seeded(plan.sampling, prompt.id, repeat)
        options: dict[str, Any] = {"max_new_tokens": plan.max_new_tokens, "sampling": sampling, "fork": system.fork}
        requests.append(apar.request(f"{prompt.id}/{repeat}", ids, **options))
    run(engine, requests)
    forked = [request for request in requests if len({thread for thread, _ in request.text}) > 1]
    reports = Rescoring(engine, forked, plan.max_new_tokens, None).run() if forked else []
    agreements = dict(zip((request.id for request in forked), reports, strict=True))
    return [
        {"system": system.name, "prompt": question.prompt.id, "repeat": repeat, "seed": request.options.seed}
        | record(request, apar.tokenizer, agreements.get(request.id, ()))
        for (question, repeat), request in zip(asked, requests, strict=True)
    ]


def record(request: Request, tokenizer: Any, agreements: Sequence[ThreadAgreement]) -> dict[str, Any]:
    """A finished request's answer, the same whatever ran beside it.

    ids and text: without special tokens. threads: the trunk and every thread that stands in the text, parents first;
    the parent's place among them (-1 for the trunk), its own text and where that is in the answer's, as [begin, end) of
    characters, and of its tokens how many plain decoding has `scored` and `chosen`, and their mean log-probability.
    What a thread wrote beyond the limit depends on when the answer was done, and is left out.
    """
    special = set(tokenizer.all_special_ids)
    shown = [thread for (thread, _), id in zip(request.text, request.text_ids, strict=True) if id not in special]
    ids = [id for id in request.text_ids if id not in special]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    spans: dict[Thread, list[list[int]]] = {request.tree.trunk: []}
    for thread, begin, end in _stretches(shown, ids, text, tokenizer):
        if begin < end:
            spans.setdefault(thread, []).append([begin, end])
    agreed = {agreement.thread: agreement for agreement in agreements}
    order = [thread for thread in request.tree.depth_first() if thread in spans]
    threads = []
    for thread in order:
        its, parent = agreed.get(thread.index), thread.parent
        while parent is not None and parent not in spans:
            parent = parent.parent
        threads.append(
            {"parent": -1 if parent is None else order.index(parent)}
            | {"text": "".join(text[begin:end] for begin, end in spans[thread]), "spans": spans[thread]}
            | {"scored": its and its.tokens, "chosen": its and its.chosen, "log_prob": its and its.log_prob}
        )
    return {"finish": request.finish_reason, "ids": ids, "text": text, "threads": threads}


def _stretches(
    shown: Sequence[Thread], ids: Sequence[int], text: str, tokenizer: Any
) -> Iterator[tuple[Thread, int, int]]:
    """Thread, begin and end in the text of every stretch of tokens that one thread wrote.

    A character that two threads wrote half each is the later one's.
    """
    first = begin = 0
    for thread, own in groupby(shown):
        first += sum(1 for _ in own)
        before = tokenizer.decode(ids[:first], skip_special_tokens=True)
        end = len(text) if first == len(ids) else max(begin, len(commonprefix([before, text])))
        yield thread, begin, end
        begin = end
