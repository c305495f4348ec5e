"""Which records heads are judged by: no prompt of these is trained on."""

from __future__ import annotations

import hashlib
import json

from .answers import AnswerFile

HELD_OUT = 20  # of so many prompts about one is held out


def by_prompt(file: AnswerFile, positions: int) -> tuple[list[int], list[int]]:
    """Records to train on and held-out ones, no prompt among both and no record twice.

    A hash of the prompt decides, so that a prompt is on the same side in every run, whatever its answers come from.
    """
    unique: dict[str, int] = {}
    for index, record in enumerate(file.records):
        unique.setdefault(json.dumps([record["prompt_ids"], record["threads"]], sort_keys=True), index)
    hashes = {index: _prompt_hash(file.records[index]) for index in unique.values()}
    # The model's own answers are what counts, where there are enough.
    own = len(file.records) if file.own is None or file.own < 10 * HELD_OUT else file.own
    held = {found for found in hashes.values() if found % HELD_OUT == 0}
    held_out = [index for index in hashes if index < own and hashes[index] in held]
    if not held_out:  # few records: one of them
        held |= {min(found for index, found in hashes.items() if index < own)}
        held_out = [index for index in hashes if index < own and hashes[index] in held]
    kept = [index for index in hashes if hashes[index] not in held] or held_out  # a lone record serves both ends
    return kept, _first_tokens(file, held_out, positions)


def by_place(file: AnswerFile, positions: int) -> tuple[list[int], list[int]]:
    """The same as it was done before: every 20th record is held out."""
    own = len(file.records) if file.own is None or file.own < 10 * HELD_OUT else file.own
    held_out = list(range(0, own, HELD_OUT))
    kept = sorted(set(range(len(file.records))) - set(held_out)) or held_out
    return kept, _first_tokens(file, held_out, positions)


def _prompt_hash(record: dict) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(record["prompt_ids"]).encode()).digest()[:8], "big")


def _first_tokens(file: AnswerFile, records: list[int], tokens: int) -> list[int]:
    """As many of these records as hold so many tokens of threads, spread over them all."""
    total = sum(len(thread["token_ids"]) for record in records for thread in file.records[record]["threads"])
    return records[:: max(1, total // max(1, tokens))]
