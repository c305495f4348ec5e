"""One engine of vLLM without a model: which requests run in a step, and which blocks of KV they hold.

Its rules are those of vLLM 0.32's V1 scheduler and block pool, as far as they decide how many steps something takes:
running requests before waiting ones, `max_num_seqs`, `max_num_batched_tokens` with prompts in chunks, whole blocks
alone shared, blocks that nobody holds kept until they are needed, and preemption by recomputing. A step takes no time.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence as Keys
from dataclasses import dataclass, field
from typing import Generic, TypeVar


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """vLLM's options of the same names.

    kv_blocks: of its pool; None for as many as are asked for. priority: its scheduling policy, else first come first
    served.
    """

    block_size: int = 16
    max_num_seqs: int = 1024
    max_num_batched_tokens: int = 8192
    kv_blocks: int | None = None
    priority: bool = False


@dataclass(slots=True, eq=False)
class Sequence:
    """A request of vLLM: a thread, whose prompt is its path.

    rank: its priority, then when it came; of two that wait the lower goes first.
    tokens: that are known of it, the one written last included.
    inherited: names of the whole blocks that it has from its ancestors; own: those of further ones count from here.
    loaded: whether the KV of all its prompt but the last token comes from elsewhere.
    recomputed: tokens of its prompt that were in no cache when it was first run; None before.
    """

    rank: tuple[int, int]
    tokens: int
    inherited: Keys[int]
    own: int
    loaded: bool = False
    computed: int = 0
    recomputed: int | None = None
    held: list[int | None] = field(default_factory=list)  # its blocks, by name where others may take them
    whole: int = 0  # how many of them are whole
    scheduled: int = 0  # tokens of the step that is being put together
    running: bool = False
    gone: bool = False

    def name(self, block: int) -> int:
        return self.inherited[block] if block < len(self.inherited) else self.own + block


S = TypeVar("S", bound=Sequence)


class Blocks:
    """The pool: blocks by name, or of one sequence alone."""

    def __init__(self, total: int | None) -> None:
        self._total = math.inf if total is None else total
        self._holders: dict[int, int] = {}
        self._idle: dict[int, None] = {}  # held by nobody, the first to go first
        self._unnamed = 0

    @property
    def used(self) -> int:
        return len(self._holders) - len(self._idle) + self._unnamed

    def hits(self, sequence: Sequence, most: int) -> list[int]:
        """Names of the first blocks that are there, up to `most`."""
        found = []
        for block in range(most):
            if (name := sequence.name(block)) not in self._holders:
                break
            found.append(name)
        return found

    def fits(self, count: int, names: Keys[int] = ()) -> bool:
        """Whether so many blocks can be had beside those names."""
        return count + sum(name in self._idle for name in names) <= self._total - self.used

    def take(self, names: Keys[int]) -> None:
        for name in names:
            self._holders[name] += 1
            self._idle.pop(name, None)

    def allocate(self, count: int) -> list[int | None]:
        """New blocks, which have to fit."""
        self._unnamed += count
        while len(self._holders) + self._unnamed > self._total:
            name = next(iter(self._idle))
            del self._idle[name], self._holders[name]
        return [None] * count

    def publish(self, name: int) -> int | None:
        """Has others find a block that has become whole; None where another such block is found already."""
        if name in self._holders:
            return None
        self._holders[name] = 1
        self._unnamed -= 1
        return name

    def release(self, held: list[int | None]) -> None:
        for name in reversed(held):  # the end of a path is the first to go
            if name is None:
                self._unnamed -= 1
                continue
            self._holders[name] -= 1
            if not self._holders[name]:
                self._idle[name] = None
        held.clear()


class SimulatedEngine(Generic[S]):
    """Attributes:
    steps: in which something ran. written: tokens that sequences wrote, whether anybody wanted them or not.
    forwarded: tokens that steps fed. rows: sequences that ran, summed over steps; most_rows: in one step.
    held, most_held: blocks in use, the sum over steps and the most. preemptions: sequences that had to start anew.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self.limits = limits
        self.running: list[S] = []
        self.steps = self.written = self.forwarded = self.rows = self.most_rows = 0
        self.held = self.most_held = self.preemptions = 0
        self._waiting: list[tuple[tuple[int, int], S]] = []
        self._blocks = Blocks(limits.kv_blocks)

    @property
    def busy(self) -> bool:
        return bool(self.running or self._waiting)

    def add(self, sequence: S) -> None:
        if not sequence.gone:
            heapq.heappush(self._waiting, (sequence.rank, sequence))

    def remove(self, sequence: S) -> None:
        """Ends a sequence, wherever it stands."""
        sequence.gone = True
        if sequence.running:
            self.running.remove(sequence)
            self._release(sequence)

    def step(self) -> list[S]:
        """Runs one step, and returns the sequences that wrote a token."""
        chosen, left = self._continued()
        if left is not None:
            self._admit(chosen, left)
        if not chosen:
            return []
        size, wrote = self.limits.block_size, []
        for sequence in chosen:
            sequence.computed += sequence.scheduled
            self.forwarded += sequence.scheduled
            for block in range(sequence.whole, sequence.computed // size):
                sequence.held[block] = self._blocks.publish(sequence.name(block))
            sequence.whole = sequence.computed // size
            if sequence.computed == sequence.tokens:
                sequence.tokens += 1
                wrote.append(sequence)
        self.steps += 1
        self.written += len(wrote)
        self.rows += len(chosen)
        self.most_rows = max(self.most_rows, len(chosen))
        self.held += self._blocks.used
        self.most_held = max(self.most_held, self._blocks.used)
        return wrote

    def _continued(self) -> tuple[list[S], int | None]:
        """Running sequences that go on, and how many tokens the step may have beside theirs; None where it takes no
        further ones, since somebody had to go."""
        left, index, preempted = self.limits.max_num_batched_tokens, 0, False
        chosen: list[S] = []
        while index < len(self.running) and left:
            sequence = self.running[index]
            new = min(sequence.tokens - sequence.computed, left)
            while not self._grow(sequence, sequence.computed + new):
                victim = max(self.running, key=lambda its: its.rank) if self.limits.priority else self.running[-1]
                preempted = True
                if self.running.index(victim) < index:
                    chosen.remove(victim)
                    left += victim.scheduled
                    index -= 1
                self._preempt(victim)
                if victim is sequence:
                    return chosen, None
            sequence.scheduled = new
            chosen.append(sequence)
            left -= new
            index += 1
        return chosen, None if preempted else left

    def _admit(self, chosen: list[S], left: int) -> None:
        size = self.limits.block_size
        while left and self._waiting and len(self.running) < self.limits.max_num_seqs:
            sequence = self._waiting[0][1]
            if not sequence.gone:
                # At least one token has to run, or nothing would be written behind it.
                found = self._blocks.hits(sequence, (sequence.tokens - 1) // size)
                if not self._blocks.fits(_ceil(sequence.tokens, size) - len(found), found):
                    return
                self._blocks.take(found)
                sequence.held = list(found)
                sequence.whole = len(found)
                sequence.computed = sequence.tokens - 1 if sequence.loaded else len(found) * size
                if sequence.recomputed is None:
                    sequence.recomputed = sequence.tokens - sequence.computed
                sequence.scheduled = min(sequence.tokens - sequence.computed, left)
                self._grow(sequence, sequence.computed + sequence.scheduled)
                sequence.running = True
                self.running.append(sequence)
                chosen.append(sequence)
                left -= sequence.scheduled
            heapq.heappop(self._waiting)

    def _grow(self, sequence: S, until: int) -> bool:
        """Gives a sequence the blocks for so many tokens, if there are any."""
        lacking = _ceil(until, self.limits.block_size) - len(sequence.held)
        if lacking <= 0:
            return True
        if not self._blocks.fits(lacking):
            return False
        sequence.held += self._blocks.allocate(lacking)
        return True

    def _preempt(self, sequence: S) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.computed, sequence.loaded = 0, False
        self.preemptions += 1
        self.add(sequence)

    def _release(self, sequence: S) -> None:
        sequence.running, sequence.whole = False, 0
        self._blocks.release(sequence.held)


def _ceil(tokens: int, size: int) -> int:
    return -(-tokens // size)
