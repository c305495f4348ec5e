"""What is asked: benchmark prompts, held-out corpus prompts, and held-out dialogues to read."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa_apar.finetune.corpus import Example, read_examples
from medusa_apar.finetune.mixture import is_held_out
from medusa_apar.finetune.rules import splice
from medusa_apar.json_files import parsed_lines
from medusa_apar.models.chat import encode_messages

CORPUS = "corpus"  # the name of the held-out corpus prompts among the prompt sets
PLAIN = "plain"  # the kind of corpus answers that should not fork, code among them
MAX_PROMPT = 400  # tokens of a corpus prompt
MAX_DIALOGUE = 1024  # tokens of a dialogue whose loss is taken


@dataclass(slots=True, frozen=True)
class Question:
    set: str
    id: str
    messages: list[dict[str, str]]
    kind: str = ""  # the rule that forks the corpus's answer, or "plain: " and why none does

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.messages).encode()).hexdigest()[:16]


def read_questions(name: str, path: Path) -> list[Question]:
    """First turns of a FastChat JSONL file; ValueError names the first line that is none."""
    questions = []
    for number, row in parsed_lines(path):
        try:
            messages = [{"role": "user", "content": row["turns"][0]}]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{path}:{number} is no question with `turns`, as FastChat writes them") from error
        questions.append(Question(name, str(row.get("question_id", number - 1)), messages))
    if not questions:
        raise ValueError(f"{path} holds no questions")
    return questions


def held_out(paths: list[Path], seed: int) -> list[Example]:
    """The corpora's examples that training never saw, shuffled."""
    examples = [example for example in read_examples(paths) if is_held_out(example.id)]
    random.Random(seed).shuffle(examples)
    return examples


def corpus_questions(examples: list[Example], count: int, tokenizer: Any) -> list[Question]:
    """Up to `count` prompts whose corpus answer is structured, and up to `count` whose answer is code or plain."""
    found: dict[bool, list[Question]] = {True: [], False: []}
    for example in examples:
        chosen = found[example.kind != PLAIN]
        if len(chosen) >= count or _prompt_ids(tokenizer, example.messages, MAX_PROMPT) is None:
            continue
        kind = f"{PLAIN}: {example.reason}" if example.kind == PLAIN else example.kind
        chosen.append(Question(CORPUS, example.id, example.messages, kind))
    return found[True] + found[False]


def plain_dialogues(examples: list[Example], count: int, tokenizer: Any) -> list[tuple[str, list[int], int]]:
    """(id, prompt and answer and end token, prompt length) of plain examples."""
    found: list[tuple[str, list[int], int]] = []
    for example in examples:
        if example.kind != PLAIN or len(found) >= count:
            continue
        prompt = _prompt_ids(tokenizer, example.messages, MAX_PROMPT)
        text = tokenizer(splice(example.tree), add_special_tokens=False)["input_ids"]
        if prompt is not None and text and len(prompt) + len(text) < MAX_DIALOGUE:
            found.append((example.id, [*prompt, *text, tokenizer.eos_token_id], len(prompt)))
    return found


def _prompt_ids(tokenizer: Any, messages: list[dict[str, str]], most: int) -> list[int] | None:
    if sum(len(message["content"]) for message in messages) > 8 * most:  # saves tokenizing whole books
        return None
    ids = encode_messages(tokenizer, messages)["input_ids"][0].tolist()
    return ids if len(ids) <= most else None
