"""Have the tuned model answer prompts with our own engine, threads included: what `train.py` learns from.

One JSON line per prompt, {"id", "prompt_ids", "threads": [{"parent", "fork_index", "token_ids"}...]}, a child's
token_ids beginning with its forced `[Child]`.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from medusa_apar.finetune.corpus import Drops, Example, as_messages, file_records
from medusa_apar.finetune.packing import Tokens, tokenize_example
from medusa_apar.finetune.rules import Thread, splice
from medusa_apar.job import Job, append_lines, cut_half_a_line, write_text
from medusa_apar.json_files import is_text, json_object, parsed_lines
from medusa_apar.models.chat import Message, encode_messages, left_padded
from medusa_apar.models.families import end_tokens
from medusa_apar.threads.control_tokens import ControlTokens
from medusa_apar.threads.paragraph_tree import ParagraphTree

ANSWERS, ASKED = "answers.jsonl", "asked.json"  # in a job's folder: answers, and what they were made with


class Generates(Protocol):
    """What answers: a `MedusaApar`, as far as asking goes."""

    model: Any
    tokenizer: Any
    control_token_ids: ControlTokens | None

    def generate(self, **kwargs: Any) -> Any: ...


class Prompt(NamedTuple):
    id: str
    messages: list[Message]  # the conversation up to the answer
    place: str  # file and line


@dataclass(slots=True)
class Limits:
    """How much is answered, and in which order."""

    count: int | None = None  # prompts; None: all
    max_prompt: int = 200  # tokens: longer prompts mostly bring text to work on
    max_new_tokens: int = 320
    batch: int = 16
    max_minutes: float = float("inf")
    seed: int = 0  # of the order of the prompts


def read_prompts(paths: Sequence[Path], drops: Drops | None = None) -> list[Prompt]:
    """Conversations of all the kinds of files that `data` reads, up to their last question; each id once.

    drops: says what is done about a record that is none; None raises BadCorpus with file and line. ValueError where
    there are no prompts at all.
    """
    drops = drops if drops is not None else Drops()
    prompts: dict[str, Prompt] = {}
    for path in paths:
        for place, record in file_records(path, drops.bad):
            try:
                messages = _question(record)
                name = str(record.get("id") or f"{path.name}/{place.rpartition(':')[2]}")
                if not all(map(is_text, [name, *(message["content"] for message in messages)])):
                    raise ValueError("broken text, it holds what is no character in UTF-8")
            except ValueError as error:
                drops.bad(str(error), place)
                continue
            prompts.setdefault(name, Prompt(name, messages, place))
    if not prompts:
        left_out = f" (left out: {drops})" if drops.counts else ""
        raise ValueError(f"there is no prompt in {', '.join(map(str, paths))}{left_out}")
    return list(prompts.values())


def _question(record: Any) -> list[Message]:
    # A corpus must hold an answer, a prompt need not: an empty one is added and cut off again.
    for key, answer in (
        ("messages", {"role": "assistant", "content": ""}),
        ("conversations", {"from": "gpt", "value": ""}),
    ):
        if isinstance(record, dict) and isinstance(record.get(key), list):
            record = {**record, key: [*record[key], answer]}
    messages = as_messages(record)
    while messages and messages[-1]["role"] != "user":
        messages = messages[:-1]
    if not messages or not messages[-1]["content"].strip():
        raise ValueError("no question to answer")
    return messages


def fitting_prompts(
    tokenizer: Any, prompts: Sequence[Prompt], limits: Limits, job: Job, drops: Drops | None = None
) -> tuple[list[Prompt], int]:
    """The first `limits.count` prompts in the order of the run that are short enough, and how many were too long.

    Their tokens are not kept: those of a large corpus would fill the memory long before their turn comes.

    drops: says what is done about those that the chat template refuses; None raises BadCorpus with file and line.
    """
    drops = drops if drops is not None else Drops()
    order = list(prompts)
    random.Random(limits.seed).shuffle(order)
    found: list[Prompt] = []
    too_long = 0
    with job.bar("measuring prompts", len(order)) as bar:
        for prompt in order:
            if len(found) == limits.count:
                break
            bar.advance()
            try:
                tokens = encode_messages(tokenizer, prompt.messages)["input_ids"].shape[1]
            except ValueError as error:
                drops.bad(str(error), prompt.place)
                continue
            if tokens > limits.max_prompt:
                too_long += 1
            else:
                found.append(prompt)
    return found, too_long


def check_same(before: dict[str, Any], now: dict[str, Any], what: str) -> None:
    """ValueError where `what` was made with other settings; those that an earlier version did not keep are not told."""
    for name, value in now.items():
        if name in before and before[name] != value:
            raise ValueError(
                f"{what} made with another {name} ({before[name]}, now {value}): give the same, or another --out"
            )


def check_same_answers(out: Path, settings: dict[str, Any]) -> None:
    """ValueError where the folder's answers were made with other settings."""
    asked = out / ASKED
    if asked.exists() and (out / ANSWERS).exists():
        check_same(json_object(asked), settings, f"{out} holds answers")


def keep_settings(out: Path, settings: dict[str, Any]) -> None:
    """The same check, and the settings are kept beside the answers that are to come."""
    check_same_answers(out, settings)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / ASKED, json.dumps(settings, indent=2) + "\n")


def ask(apar: Generates, prompts: Sequence[Prompt], out: Path, limits: Limits, job: Job) -> None:
    """Appends an answer per prompt to `out` until the time is over; those that it holds are not asked again."""
    started, done = time.monotonic(), answered(out)
    todo = [prompt for prompt in prompts if prompt.id not in done]
    tokens = 0
    with job.bar("answering prompts", len(prompts), len(prompts) - len(todo)) as bar:
        for first in range(0, len(todo), limits.batch):
            if time.monotonic() - started > 60 * limits.max_minutes:
                break
            batch = todo[first : first + limits.batch]
            inputs = [encode_messages(apar.tokenizer, prompt.messages) for prompt in batch]
            records = answer(apar, [prompt.id for prompt in batch], inputs, limits.max_new_tokens)
            append_lines(out, records)
            tokens += sum(len(thread["token_ids"]) for record in records for thread in record["threads"])
            rate = tokens / (time.monotonic() - started)
            bar.advance(len(batch), f"{tokens} tokens, {rate:.0f} a second")
    job.log("answered", prompts=len(prompts), tokens=tokens)


def answered(out: Path) -> set[str]:
    """Ids of the answers in a file; half a line that a killed run left at its end is cut off.

    ValueError with file and line for one that is no answer.
    """
    if not out.exists():
        return set()
    cut_half_a_line(out)
    found = set()
    for number, record in parsed_lines(out):
        if not isinstance(record, dict) or not isinstance(record.get("id"), str):
            raise ValueError(f"{out}:{number}: no answer, which has an id")
        found.add(record["id"])
    return found


def answer(
    apar: Generates, names: list[str], prompts: list[dict[str, torch.Tensor]], max_new_tokens: int
) -> list[dict]:
    """Records of one batch, greedily answered."""
    output = apar.generate(
        **left_padded(prompts, apar.model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
    return [as_record(name, tree) for name, tree in zip(names, output.paragraph_tree, strict=True)]


def as_record(name: str, tree: ParagraphTree) -> dict:
    threads = []
    for thread in tree.threads:
        parent = thread.parent
        # Within a file a trunk's tokens are counted behind the prompt, a child's from its [Child].
        shift = parent.num_forced if parent is tree.trunk else 0
        threads.append(
            {
                "parent": -1 if parent is None else parent.index,
                "fork_index": thread.fork_index - shift,
                "token_ids": thread.token_ids if parent is None else thread.tokens,
            }
        )
    return {"id": name, "prompt_ids": tree.trunk.tokens[: tree.trunk.num_forced], "threads": threads}


def copied_records(
    apar: Generates, examples: Iterable[Example], max_tokens: int, drops: Drops | None = None
) -> Iterator[dict]:
    """Records of the corpora's own answers, cut into threads by rule: no generation, but not the model's words.

    max_tokens: of a prompt and its answer; longer ones are left out. A model without control tokens gets whole answers.
    drops: says what is done about examples that the chat template refuses; None raises BadCorpus with file and line.
    """
    drops = drops if drops is not None else Drops()
    control, eos = apar.control_token_ids, _end(apar)
    for example in examples:
        if control is None:
            example = replace(example, tree=Thread([splice(example.tree)]))
        fork, child = (control.fork_id, control.child_id) if control else (-1, -1)
        try:
            threads, prompt, _ = tokenize_example(example, apar.tokenizer, Tokens(fork, child, eos))
        except ValueError as error:
            drops.bad(str(error), example.place)
            continue
        if sum(len(ids) for ids, _, _ in threads) > max_tokens:
            continue
        trunk = threads[0][0]
        records = [{"parent": -1, "fork_index": -1, "token_ids": trunk[prompt:]}]
        for ids, parent, at in threads[1:]:
            records.append({"parent": parent, "fork_index": at - (prompt if parent == 0 else 0), "token_ids": ids})
        yield {"id": example.id, "prompt_ids": trunk[:prompt], "threads": records}


def _end(apar: Generates) -> int:
    assert apar.tokenizer is not None
    ends = end_tokens(apar.model.generation_config)
    eos = ends[0] if ends else apar.tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the model names no end-of-text token, with which copied answers end")
    return int(eos)
