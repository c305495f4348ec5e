"""Which examples are trained on, in what proportion, and how their rows fill updates."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .corpus import Drops, Example
from .packing import PackedRow, Tokens, join, pack_example
from .repeats import pack_loop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT_ONE_IN = 40


@dataclass(slots=True, frozen=True)
class Limits:
    """How much to take, in tokens."""

    total: int | None = None  # None: until the scarcest source runs dry
    example: int = 900
    prompt: int = 300
    held_out: int = 60  # examples, not tokens


@dataclass(slots=True)
class Source:
    """Examples and the share of all training tokens that they are to give; no shares at all: by what there is."""

    examples: Iterable[Example]
    share: float | None = None
    name: str = ""


@dataclass(slots=True)
class Given:
    """What one side of a source was to give, and gave."""

    source: str
    side: str  # "forking" or "plain"
    wanted: float  # tokens
    tokens: int
    examples: int

    def as_row(self) -> dict[str, Any]:
        return asdict(self) | {"wanted": round(self.wanted)}


def is_held_out(example_id: str) -> bool:
    """Whether an example is kept from training, by a hash of its id."""
    return int.from_bytes(hashlib.sha256(example_id.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def draw(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tokens,
    limits: Limits,
    seed: int,
    plain_share: float = 0.5,
    drops: Drops | None = None,
) -> tuple[list[Example], list[PackedRow], list[Given]]:
    """Training examples in shuffled order, held-out rows, one an example; and what each side of each source gave.

    Sizes are those of the row in which every detail forks; held-out rows are these.

    `plain_share` of the tokens are of answers that stay whole (APAR trains on as many unstructured as structured ones),
    the rest of answers that fork, each source giving its share of both as far as it has them. Without a `limits.total`
    the source that has the fewest forking tokens for its share gives them all, and sets how many the others give; plain
    text is taken as much as fits to it. Sources without shares count as one.

    drops: says what is done about examples that the chat template refuses; None raises BadCorpus with file and line.
    """
    drops = drops if drops is not None else Drops()
    if not 0 <= plain_share < 1:
        raise ValueError(f"the share of plain answers is {plain_share}, must be from 0 to below 1.")
    rng = random.Random(seed)
    named = [source.share for source in sources if source.share is not None]
    if named and len(named) < len(sources):
        raise ValueError(f"{len(named)} of {len(sources)} sources have a share: give one to each, or to none.")
    if not named and len(sources) > 1:
        every = itertools.chain.from_iterable(source.examples for source in sources)
        sources = [Source(every, 1.0, " and ".join(source.name for source in sources))]
    shares = [share / sum(named) for share in named] or [1.0]
    pools: list[list[Example]] = []
    for source in sources:
        pools.append(list(source.examples))
        rng.shuffle(pools[-1])

    def gather(forking: bool, wanted: float) -> list[_Side]:
        part = 1 - plain_share if forking else plain_share
        sides = []
        for pool, share in zip(pools, shares, strict=True):
            side = _Side(tokenizer, tokens, limits, drops)
            chosen = (example for example in pool if bool(example.tree.forks) == forking)
            side.take(chosen, share * wanted, round(share * part * limits.held_out))
            sides.append(side)
        return sides

    if limits.total is None:
        forks = gather(True, float("inf"))
        # A source without a single fork is no measure of the others.
        enough = min((side.tokens / share for side, share in zip(forks, shares, strict=True) if side.tokens), default=0)
        for side, share in zip(forks, shares, strict=True):
            side.cut(share * enough)
        plain = gather(False, sum(side.tokens for side in forks) * plain_share / (1 - plain_share))
    else:
        forks = gather(True, (1 - plain_share) * limits.total)
        plain = gather(False, plain_share * limits.total)
    given = [
        Given(source.name, name, side.wanted, side.tokens, len(side.train))
        for name, sides in (("forking", forks), ("plain", plain))
        for source, side in zip(sources, sides, strict=True)
    ]
    train = [example for side in (*forks, *plain) for example in side.train]
    held_out = [row for side in (*forks, *plain) for row in side.held_out]
    rng.shuffle(train)
    return train, held_out, given


class _Side:
    """The forking or the plain examples of a source."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: Tokens, limits: Limits, drops: Drops) -> None:
        self._tokenizer, self._tokens, self._limits, self._drops = tokenizer, tokens, limits, drops
        self.train: list[Example] = []
        self.held_out: list[PackedRow] = []
        self._sizes: list[int] = []  # tokens of each training example
        self.tokens = 0  # to train on
        self.wanted = 0.0

    def take(self, examples: Iterable[Example], tokens: float, held_out: int) -> None:
        self.wanted = tokens
        for example in examples:
            apart = is_held_out(example.id)
            if len(self.held_out) >= held_out if apart else self.tokens >= tokens:
                continue
            try:
                row = fitting_row(example, self._tokenizer, self._tokens, self._limits)
            except ValueError as error:
                self._drops.bad(str(error), example.place)
                continue
            if row is None:
                continue
            if apart:
                self.held_out.append(row)
            else:
                self.train.append(example)
                self._sizes.append(len(row))
                self.tokens += len(row)

    def cut(self, tokens: float) -> None:
        """Gives back what goes beyond so many tokens."""
        self.wanted, self.tokens = tokens, 0
        count = 0
        for size in self._sizes:
            if self.tokens >= tokens:
                break
            self.tokens += size
            count += 1
        del self.train[count:], self._sizes[count:]


def fitting_row(
    example: Example, tokenizer: PreTrainedTokenizerBase, tokens: Tokens, limits: Limits
) -> PackedRow | None:
    """An example as the row in which every detail forks, or None where it is too long or its text spells a control
    token; a looping one up to where its loop is well known.

    ValueError where the chat template refuses it.
    """
    characters = sum(len(message["content"]) for message in example.messages)
    if characters > 6 * limits.prompt:  # English averages four to five characters a token
        return None
    row = pack_example(example, tokenizer, tokens)
    forks = int((row.input_ids == tokens.fork).sum())
    prompt = int((~row.trained).sum()) + 1
    if forks != example.tree.forks:
        return None
    if example.loops:
        row = pack_loop(example, tokenizer, tokens)
        if not row.avoided.any():
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
