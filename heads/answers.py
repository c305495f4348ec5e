"""The tuned model's own answers as training data for its heads: every token's final hidden state, computed once.

A row packs one request's threads (`finetune/packing.py`), so one forward pass gives each token's hidden state in its
thread context. That state is both what a head reads and, through the base's unembedding, the distribution it must
match, so the base model runs once per answer however many epochs follow.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from medusa_apar.finetune.packing import TokenThread, attention_mask, pack_threads


@dataclass(slots=True)
class Answers:
    """T positions of many threads, a thread's positions in a row. Prompts count only by their last token."""

    hidden: Tensor  # [T, H] the state from which the base predicts the next token
    ids: Tensor  # [T] the token at this position
    next_ids: Tensor  # [T] the thread's next token, packing.IGNORED where the thread was cut
    threads: Tensor  # [T] distinct for every thread
    records: Tensor  # [T] the line of the file it came from

    def __len__(self) -> int:
        return len(self.next_ids)

    def __getitem__(self, index: Tensor | slice) -> Answers:
        return Answers(*(getattr(self, name)[index] for name in self.__slots__))

    def to(self, device: torch.device) -> Answers:
        return Answers(*(getattr(self, name).to(device) for name in self.__slots__))

    @classmethod
    def join(cls, parts: list[Answers]) -> Answers:
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__slots__))


@dataclass(slots=True)
class AnswerFile:
    """A JSONL file of our decoder: {"prompt_ids": [...], "threads": [{"parent", "fork_index", "token_ids"}...]}."""

    records: list[dict]
    fork_id: int | None = field(init=False, default=None)  # None: nothing forks in this file
    child_id: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        for record in self.records:
            for thread in record["threads"][1:]:
                self.child_id = thread["token_ids"][0]
                self.fork_id = record["threads"][thread["parent"]]["token_ids"][thread["fork_index"]]
                return

    @classmethod
    def read(cls, path: Path) -> AnswerFile:
        with path.open(encoding="utf-8") as lines:
            return cls([json.loads(line) for line in lines if line.strip()])

    def draft_vocabulary(self, size: int, vocab_size: int, eos_ids: list[int]) -> Tensor:
        """`size` ids, sorted: the answers' most frequent, then the prompts', then the lowest. Never `[Child]`."""
        answers = Counter(i for record in self.records for thread in record["threads"] for i in thread["token_ids"])
        prompts = Counter(i for record in self.records for i in record["prompt_ids"])
        needed = eos_ids if self.fork_id is None else [self.fork_id, *eos_ids]
        ranked = itertools.chain(needed, *([i for i, _ in count.most_common()] for count in (answers, prompts)))
        ids = dict.fromkeys(itertools.chain(ranked, range(vocab_size)))
        ids.pop(self.child_id, None)
        return torch.tensor(sorted(itertools.islice(ids, size)))

    def packed_threads(self, record: int) -> tuple[list[TokenThread], int]:
        """A record as `pack_threads` takes it: the prompt at the head of the trunk, and the prompt's length."""
        prompt, threads = self.records[record]["prompt_ids"], self.records[record]["threads"]
        packed: list[TokenThread] = [(prompt + threads[0]["token_ids"], -1, 0)]
        for thread in threads[1:]:
            shift = len(prompt) if thread["parent"] == 0 else 0
            packed.append((thread["token_ids"], thread["parent"], thread["fork_index"] + shift))
        return packed, len(prompt)


@torch.no_grad()
def encode(model: PreTrainedModel, file: AnswerFile, record: int, eos_ids: list[int]) -> Answers:
    """One record's positions. What follows an end-of-text token is nobody's prediction, so that position is dropped."""
    row = pack_threads(*file.packed_threads(record))
    output = model.base_model(
        input_ids=row.input_ids[None].to(model.device),
        attention_mask=attention_mask(row.parents, model.dtype).to(model.device),
        position_ids=row.position_ids[None].to(model.device),
        use_cache=False,
    )
    keep = row.trained & ~torch.isin(row.input_ids, torch.tensor(eos_ids))
    hidden = output.last_hidden_state[0][keep.to(model.device)]
    threads = row.thread_ids[keep]
    # float16 halves the cache; a final norm's output is far from its limits.
    return Answers(
        hidden.half().cpu(), row.input_ids[keep], row.labels()[keep], threads, torch.full_like(threads, record)
    )


@torch.no_grad()
def greedy(model: PreTrainedModel, file: AnswerFile, answers: Answers) -> Tensor:
    """[T] the base's choice of next token by the fork rule: no `[Child]`, no `[Fork]` after `[Fork]` or `[Child]`."""
    lm_head, chosen = model.get_output_embeddings(), []
    for states, ids in zip(answers.hidden.split(256), answers.ids.split(256), strict=True):  # 50 MB of logits
        logits = lm_head(states.to(model.dtype))
        if file.child_id is not None:
            logits[:, file.child_id] = -torch.inf
            logits[(ids == file.fork_id) | (ids == file.child_id), file.fork_id] = -torch.inf
        chosen.append(logits.argmax(-1))
    return torch.cat(chosen)


def encode_cached(
    model: PreTrainedModel, file: AnswerFile, eos_ids: list[int], cache: Path, key: str, deadline: float
) -> Answers:
    """All records until `deadline` (time.monotonic()), after those that an earlier run under `key` left in `cache`."""
    parts: list[Answers] = []
    if cache.exists():
        with safe_open(cache, framework="pt") as tensors:
            if (tensors.metadata() or {}).get("key") == key:
                parts.append(Answers(*(tensors.get_tensor(name) for name in Answers.__slots__)))
    done = int(parts[0].records[-1]) + 1 if parts else 0
    threads = int(parts[0].threads[-1]) + 1 if parts else 0
    for record in range(done, len(file.records)):
        if parts and time.monotonic() > deadline:
            break
        part = encode(model, file, record, eos_ids)
        if len(part):
            part.threads += threads
            threads = int(part.threads.max()) + 1
            parts.append(part)
    if not parts:
        raise ValueError("no answers to train on: every thread of the data is empty.")
    answers = Answers.join(parts)
    if len(parts) > 1 or not cache.exists():
        temporary = cache.with_suffix(f".{os.getpid()}")
        save_file({name: getattr(answers, name) for name in Answers.__slots__}, temporary, metadata={"key": key})
        os.replace(temporary, cache)
    return answers
