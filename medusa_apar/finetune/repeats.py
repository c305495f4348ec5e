"""Answers that loop, as examples of what not to write.

Unlikelihood training (Welleck et al. 2020, arXiv 1908.04319, section 5.2): where a model's own answer repeats an
n-gram, the repeated token is made unlikely. Nothing else of such an answer is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from .corpus import Example
from .packing import Forks, PackedRow, Tokens, TokenThread, pack_threads, row_index, tokenize_example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens of a repeat. The numbered heads of two items differ in the number alone; four tokens also open innocent ones.
NGRAM = 5
MOST_AVOIDED = 64  # tokens of a thread: a loop that goes on teaches nothing new


def repeated_places(ids: Sequence[int], skip: int | None = None) -> list[int]:
    """Indices of the tokens with which an n-gram ends that was there before.

    skip: a token that may always come again, and so may what follows it: `[Fork]`, and the line break behind it.
    """
    seen: set[tuple[int, ...]] = set()
    found = []
    for end in range(NGRAM, len(ids) + 1):
        gram = tuple(ids[end - NGRAM : end])
        if gram in seen and skip not in gram[-2:]:
            found.append(end - 1)
        seen.add(gram)
    return found


def pack_loop(
    example: Example, tokenizer: PreTrainedTokenizerBase, tokens: Tokens, forks: Forks | None = None
) -> PackedRow:
    """A looping answer as one row: its repeated tokens are avoided, and nothing of it is trained.

    Every thread stops after `MOST_AVOIDED` of them, and what it would have forked behind that is left out.
    """
    tree = tokenize_example(example, tokenizer, tokens, forks)
    kept: list[TokenThread] = []
    places: list[tuple[int, int]] = []  # (thread, index) before each repeated token
    numbers: dict[int, int] = {-1: -1}  # of the threads that are kept, by what they were
    for number, (ids, parent, fork) in enumerate(tree.threads):
        if parent not in numbers or (parent >= 0 and fork >= len(kept[numbers[parent]][0])):
            continue
        opening = tree.prompt_length if parent < 0 else 1
        repeats = [opening + place for place in repeated_places(ids[opening:-1], tokens.fork)]
        if len(repeats) > MOST_AVOIDED:
            ids = ids[: repeats[MOST_AVOIDED]]
            repeats = repeats[:MOST_AVOIDED]
        numbers[number] = len(kept)
        places += [(len(kept), place - 1) for place in repeats]
        kept.append((ids, numbers[parent], fork))
    row = pack_threads(kept, tree.prompt_length)
    avoided = torch.zeros_like(row.trained)
    avoided[row_index(kept, places)] = True
    return replace(row, trained=torch.zeros_like(row.trained), avoided=avoided)
