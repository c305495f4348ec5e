"""The ways in which an answer that can fork is written: every detail forked, every one in line, or some of each.

A model that has only seen forked details takes the end of a detail for the end of an answer: where it may not fork, or
does not, it stops a list after the first item.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .corpus import Example
from .packing import Forks, PackedRow, Tokens, pack_example
from .repeats import pack_loop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORKED_OF_MIXED = 0.5  # chance of each detail of a mixed answer to be a thread


@dataclass(slots=True, frozen=True)
class Forms:
    """Shares of the answers that can fork; the rest forks at every detail."""

    in_line: float = 0.0
    mixed: float = 0.0

    def __post_init__(self) -> None:
        if min(self.in_line, self.mixed) < 0 or self.in_line + self.mixed > 1:
            raise ValueError(
                f"the shares of answers in line and mixed are {self.in_line} and {self.mixed}: "
                "neither may be below 0, nor both together above 1."
            )

    def draw(self, rng: random.Random) -> Forks:
        """How the next answer is written: whether each of its details forks."""
        form = rng.random()
        if form < self.in_line:
            return lambda detail: False
        if form < self.in_line + self.mixed:
            return lambda detail: rng.random() < FORKED_OF_MIXED
        return lambda detail: True


def pack(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, tokens: Tokens, forms: Forms, rng: random.Random
) -> Iterator[PackedRow]:
    """One row an example, each in a form of its own; a looping answer as what to avoid."""
    for example in examples:
        make = pack_loop if example.loops else pack_example
        yield make(example, tokenizer, tokens, forms.draw(rng))
