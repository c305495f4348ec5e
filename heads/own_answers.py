"""`medusa-apar answer`: a chat model's own answers as a corpus."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from medusa_apar.finetune.corpus import Drops
from medusa_apar.job import Job, append_lines, write_text
from medusa_apar.json_files import json_object
from medusa_apar.models.chat import encode_messages, left_padded
from medusa_apar.models.fingerprint import fingerprint

from .ask import Generates, Limits, Prompt, answered, check_same, fitting_prompts

CHATS, UNENDED = "chats.jsonl", "unended.jsonl"  # answers that ended by themselves, and those that were cut
ASKED = "asked.jsonl"  # every prompt that was answered, those whose answer did not end among them
SETTINGS = "asked.json"  # what the answers depend on


@dataclass(slots=True)
class Sampling:
    temperature: float  # 0: greedy
    top_p: float = 1.0
    quantize: str | None = None  # how the model's weights were rounded


def own_answers(
    apar: Generates, prompts: Sequence[Prompt], limits: Limits, sampling: Sampling, job: Job, drops: Drops
) -> Path:
    """Answers prompts batch by batch, without threads, into the job's folder; returns the corpus of those that ended.

    Batches are the same in every run, so one that was stopped goes on to what it would have sampled. ValueError where
    the folder's answers were made otherwise.

    drops: says what is done about prompts that the chat template refuses, and what was about other bad lines.
    """
    todo, too_long = fitting_prompts(apar.tokenizer, prompts, limits, job, drops)
    _check_same_answers(apar, limits, sampling, job)
    chats, unended, asked = (job.folder / name for name in (CHATS, UNENDED, ASKED))
    done, written, cut = answered(asked), answered(chats), answered(unended)
    budget = job.seconds + 60 * limits.max_minutes
    tokens = 0
    with job.bar("answering prompts", len(todo)) as bar:
        for first in range(0, len(todo), limits.batch):
            batch = todo[first : first + limits.batch]
            if all(prompt.id in done for prompt in batch):
                bar.advance(len(batch))
                continue
            if job.seconds > budget:
                break
            seed = random.Random(f"{limits.seed} {first}").getrandbits(62)
            inputs = [encode_messages(apar.tokenizer, prompt.messages) for prompt in batch]
            answers = _answers(apar, inputs, limits.max_new_tokens, sampling, seed)
            rows: list[dict[str, Any]] = []
            loose: list[dict[str, Any]] = []
            marks: list[dict[str, Any]] = []
            for (name, messages, _), (ids, finished) in zip(batch, answers, strict=True):
                if name in done:  # of a batch whose writing was cut short
                    continue
                tokens += len(ids)
                text = cast(Any, apar.tokenizer).decode(ids, skip_special_tokens=True)
                into, names = (rows, written) if finished else (loose, cut)
                if text.strip() and name not in names:
                    names.add(name)
                    into.append({"id": name, "messages": [*messages, {"role": "assistant", "content": text}]})
                marks.append({"id": name, "tokens": len(ids), "finished": finished})
            # In this order: an answer that is marked but not written would be lost for good.
            append_lines(chats, rows)
            append_lines(unended, loose)
            append_lines(asked, marks)
            done.update(prompt.id for prompt in batch)
            bar.advance(len(batch), f"{tokens / max(1e-6, job.seconds):.0f} tokens/s")
    kept = len(written)
    report = job.report(
        asked=len(done),
        kept=kept,
        unfinished=len(done) - kept,
        too_long=too_long,
        tokens=tokens,
        left_out=drops.as_report(),
    )
    job.say(f"{report['kept']} of {report['asked']} answers ended and are in {chats}")
    if drops.counts:
        job.say(f"left out: {drops}")
    return chats


def _check_same_answers(apar: Generates, limits: Limits, sampling: Sampling, job: Job) -> None:
    """ValueError where the folder's answers are of another model or other settings, which would mix in one corpus."""
    fixed = {
        "model": fingerprint(apar.model),
        "dtype": str(apar.model.dtype),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "quantize": sampling.quantize,
        "max_new_tokens": limits.max_new_tokens,
        "max_prompt": limits.max_prompt,
        "seed": limits.seed,
        "batch": limits.batch,
    }
    path = job.folder / SETTINGS
    if path.exists():
        check_same(json_object(path), fixed, f"{job.folder} holds answers")
    write_text(path, json.dumps(fixed, indent=2) + "\n")


def _answers(
    apar: Generates, prompts: list[dict[str, Any]], max_new_tokens: int, sampling: Sampling, seed: int
) -> list[tuple[list[int], bool]]:
    """Per prompt of a batch the answer's ids and whether it ended by itself."""
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        options = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": seed}
    output: Any = apar.generate(
        **left_padded(prompts, apar.model.device),
        max_new_tokens=max_new_tokens,
        fork=False,
        return_dict_in_generate=True,
        **options,
    )
    trunks = [tree.trunk for tree in output.paragraph_tree]
    return [(trunk.token_ids, trunk.finish_reason == "stop") for trunk in trunks]
