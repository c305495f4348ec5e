"""Which examples are trained on, in what proportion, and how their rows fill updates."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass

from medusa_apar.finetune.corpus import Example
from medusa_apar.finetune.packing import PackedRow, Tokens, join, pack_example

# Share of all packed tokens by kind of example: lists 45 %, paragraphs 25 %, and 30 % that must not fork.
SHARES = {"titled": 0.39, "items": 0.06, "paragraphs": 0.25, "plain": 0.30}
HELD_OUT_ONE_IN = 40


@dataclass(slots=True, frozen=True)
class Limits:
    """How much to take, in tokens."""

    total: int = 450_000
    example: int = 600
    prompt: int = 250
    held_out: int = 40  # examples, not tokens


def is_held_out(example_id: str) -> bool:
    """Whether an example is kept from training, by a hash of its id."""
    return int.from_bytes(hashlib.sha256(example_id.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def draw(
    examples: Iterable[Example], tokenizer, tokens: Tokens, limits: Limits, seed: int
) -> tuple[list[PackedRow], list[PackedRow]]:
    """Training rows and held-out rows, one an example, in shuffled order and in the proportions of SHARES."""
    rng = random.Random(seed)
    pool = list(examples)
    rng.shuffle(pool)
    train: list[PackedRow] = []
    held_out: list[PackedRow] = []
    for kind, share in SHARES.items():
        taken, kept = 0, 0
        for example in (example for example in pool if example.kind == kind):
            apart = is_held_out(example.id)
            if taken >= share * limits.total if not apart else kept >= round(share * limits.held_out):
                continue
            row = _fitting_row(example, tokenizer, tokens, limits)
            if row is None:
                continue
            if apart:
                held_out.append(row)
                kept += 1
            else:
                train.append(row)
                taken += len(row)
    rng.shuffle(train)
    return train, held_out


def _fitting_row(example: Example, tokenizer, tokens: Tokens, limits: Limits) -> PackedRow | None:
    characters = sum(len(message["content"]) for message in example.messages)
    if characters > 6 * limits.prompt:  # English averages four to five characters a token
        return None
    row = pack_example(example, tokenizer, tokens)
    forks = int((row.input_ids == tokens.fork).sum())
    prompt = int((~row.trained).sum()) + 1
    if forks != example.tree.forks:  # the text itself spells a control token
        return None
    return row if len(row) <= limits.example and prompt <= limits.prompt else None


def updates(rows: list[PackedRow], row_tokens: int, update_tokens: int) -> list[list[PackedRow]]:
    """Examples joined into rows of at most `row_tokens`, and rows gathered into updates of about `update_tokens`."""
    joined: list[PackedRow] = []
    waiting: list[PackedRow] = []
    for row in rows:
        if waiting and sum(map(len, waiting)) + len(row) > row_tokens:
            joined.append(join(waiting))
            waiting = []
        waiting.append(row)
    if waiting:
        joined.append(join(waiting))
    groups: list[list[PackedRow]] = [[]]
    for row in joined:
        if sum(map(len, groups[-1])) >= update_tokens:
            groups.append([])
        groups[-1].append(row)
    return groups
