"""Prompt sets of benchmarks, by name or file.

Benchmark files are not copied into this repository. A name is looked for in `$MEDUSA_APAR_DATA`, then in the cache,
then downloaded from its upstream; what lies in the data folder and what is downloaded must have the digest written
here. `default` and `instructions` are our own.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medusa_apar.json_files import is_text, numbered_lines, parse
from medusa_apar.models.hub import build_once, cache_dir

FASTCHAT = "https://raw.githubusercontent.com/lm-sys/FastChat/main/fastchat/llm_judge/data"


@dataclass(frozen=True, slots=True)
class PromptSet:
    """A benchmark's file."""

    file: str  # as `$MEDUSA_APAR_DATA` and the cache call it
    sha256: str  # of upstream's bytes
    url: str
    local_sha256: str = ""  # of the file in `$MEDUSA_APAR_DATA`, where that is not upstream's, byte for byte


SETS = {
    "vicuna": PromptSet(
        "vicuna_bench.jsonl",
        "c248c5c98ba45bb0c2aadae2f270e643bd32679c6c306a3b2a503ac4254cdaa5",
        f"{FASTCHAT}/vicuna_bench/question.jsonl",
    ),
    "mt": PromptSet(
        "mt_bench.jsonl",
        "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
        f"{FASTCHAT}/mt_bench/question.jsonl",
    ),
    "spec": PromptSet(
        "spec_bench.jsonl",
        "4b6d33e79484f9841c487ee87d1cf6aa8c6066f61d5d482ff09e5a007fafdf04",
        "https://raw.githubusercontent.com/hemingkx/Spec-Bench/main/data/spec_bench/question.jsonl",
    ),
    "humaneval": PromptSet(
        "humaneval.jsonl.gz",
        "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
        "https://raw.githubusercontent.com/openai/human-eval/master/data/HumanEval.jsonl.gz",
    ),
    # With an id added to every row, and packed, in `$MEDUSA_APAR_DATA`.
    "gsm8k": PromptSet(
        "gsm8k_test.jsonl.gz",
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/test.jsonl",
        "5190a21446aca61f15ac80b7310cc8698574db89611bdc311e67d2ae0ab963a0",
    ),
}
DEFAULT = "default"
INSTRUCTIONS = "instructions"  # whose answers can be checked
OURS = (DEFAULT, INSTRUCTIONS)
# What a judge is asked with, and what it may compare answers to MT-bench with.
JUDGE_PROMPTS = PromptSet(
    "judge_prompts.jsonl",
    "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
    f"{FASTCHAT}/judge_prompts.jsonl",
)
REFERENCES = PromptSet(
    "mt_bench_reference_gpt4.jsonl",
    "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
    f"{FASTCHAT}/mt_bench/reference_answer/gpt-4.jsonl",
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """The first turn of a benchmark's question.

    reference: an answer that its file has, "" for none. checks: what an answer is held to, as `instructions.py` has it.
    """

    id: str
    category: str
    text: str
    reference: str = ""
    checks: dict[str, Any] = field(default_factory=dict, hash=False)


def find(name: str) -> Path:
    """The file of a prompt set, or the file that `name` is.

    FileNotFoundError for a name that is neither; ValueError where a file has another digest than is known;
    ConnectionError where it would have to be downloaded and cannot.
    """
    if name in OURS:
        return Path(__file__).with_name("prompt_sets") / f"{name}.jsonl"
    if name not in SETS:
        path = Path(name).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{name} is no file and none of {', '.join([DEFAULT, *SETS, INSTRUCTIONS])}")
        return path
    return fetch(SETS[name])


def fetch(spec: PromptSet) -> Path:
    """The file on this machine. ValueError where its digest is another; ConnectionError where it cannot be had."""
    if data := os.environ.get("MEDUSA_APAR_DATA"):
        path = Path(data).expanduser() / spec.file
        if path.is_file():
            _check(path.read_bytes(), spec.local_sha256 or spec.sha256, str(path))
            return path
    target = cache_dir() / "prompts" / spec.sha256[:16]
    return build_once(target, lambda _, folder: _download(spec, folder)) / spec.file


def read(name: str, limit: int | None = None) -> list[Prompt]:
    """The first `limit` prompts of a set or file; each line is FastChat's, HumanEval's, GSM8K's or a chat.

    ValueError with file and line for one that is none, or a second time the same id.
    """
    path = find(name)
    prompts: dict[str, Prompt] = {}
    for number, line in numbered_lines(path):
        if limit is not None and len(prompts) == limit:
            break
        place = f"{path}:{number}"
        try:
            row = parse(line)
        except ValueError as error:
            raise ValueError(f"{place} is no prompt: {error}") from error
        try:
            prompt = _prompt(row, number)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{place} is no prompt: it needs `turns`, `messages`, `question` or `prompt`, as JSON"
            ) from error
        if prompt.id in prompts:
            raise ValueError(f"{place} has the id {prompt.id} of an earlier line")
        prompts[prompt.id] = prompt
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return list(prompts.values())


def digest(prompts: list[Prompt]) -> str:
    """A hash of what was asked: two runs with the same one are about the same prompts."""
    return hashlib.sha256(json.dumps([(p.id, p.text) for p in prompts]).encode()).hexdigest()[:16]


def _prompt(row: dict[str, Any], number: int) -> Prompt:
    if "turns" in row:
        text = row["turns"][0]
    elif "messages" in row:
        text = next((message["content"] for message in row["messages"] if message["role"] == "user"), "")
    elif "question" in row:  # GSM8K
        text = row["question"]
    else:  # HumanEval
        text = f"Complete this Python function.\n\n```python\n{row['prompt']}```" if "task_id" in row else row["prompt"]
    if not isinstance(text, str) or not text.strip() or not is_text(text):
        raise ValueError("an empty prompt, or one that is no text")
    id = next((row[key] for key in ("question_id", "task_id", "id") if key in row), number)
    category = row.get("category") or ("code" if "task_id" in row else "maths" if "question" in row else "")
    checks = row.get("checks", {})
    if not isinstance(checks, dict):
        raise ValueError("checks that are no object")
    return Prompt(str(id), str(category), text, _reference(row), checks)


def _reference(row: dict[str, Any]) -> str:
    """The first turn's answer: MT-bench's, GSM8K's, a chat's, or "" where the line has none that is text."""
    if "messages" in row:
        found = next((message.get("content") for message in row["messages"] if message["role"] == "assistant"), "")
    else:
        found = row.get("reference") or row.get("answer") or ""
    if isinstance(found, list):
        found = found[0]
    return found if isinstance(found, str) and is_text(found) else ""


def _download(spec: PromptSet, folder: Path) -> None:
    try:
        with urllib.request.urlopen(spec.url, timeout=60) as answer:
            content = answer.read()
    except OSError as error:
        raise ConnectionError(
            f"{spec.file} cannot be had from {spec.url} ({error}): put it into a folder and name that in "
            "MEDUSA_APAR_DATA"
        ) from error
    _check(content, spec.sha256, spec.url)
    packed = spec.file.endswith(".gz") and not spec.url.endswith(".gz")
    (folder / spec.file).write_bytes(gzip.compress(content, mtime=0) if packed else content)


def _check(content: bytes, sha256: str, place: str) -> None:
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(f"{place} has sha256 {found}, expected {sha256}: it is not used")
