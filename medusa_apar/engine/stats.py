"""Counts of an engine, and how plain decoding sees an answer."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any


@dataclass(slots=True)
class Stats:
    """Counts of one engine over all its requests; those of a generate call are of that call's own engine."""

    steps: int = 0  # forward passes, prefill included, and those of rescoring
    generated_tokens: int = 0  # visible tokens in the answers
    # Tokens that threads chose, control and end tokens and those that nobody reads in the end included.
    written_tokens: int = 0
    forward_tokens: int = 0  # rows of all forests, prompts included
    accepted_lengths: Counter[int] = field(default_factory=Counter)  # tokens gained by a thread in a step -> how often
    # Draft nodes, and those that were right, by who proposed them: "heads", "ngrams" (what had been written before),
    # "recycled" (what the model would have said before), "forks" (a `[Child]` below a drafted `[Fork]`); over vLLM by
    # its own name for how it drafts, such as "eagle3".
    drafted: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    # Draft trees, by how many of its nodes the thread then accepted, one behind the other.
    drafts: Counter[int] = field(default_factory=Counter)
    # Steps, by their tokens: those fed beyond the roots of threads that decode (prompts as a rule), and those that
    # threads gained; rounded up to a power of two, 1 where there is none.
    iteration_tokens: Counter[int] = field(default_factory=Counter)
    iteration_tokens_sum: int = 0  # of these tokens, not rounded
    undrafted_steps: int = 0  # in which the heads were not asked, since of late they did not pay
    forks: int = 0
    requests: int = 0  # that have been added
    preemptions: int = 0  # requests whose slots were all taken back, to be fed again later
    thread_preemptions: int = 0  # the same of single threads of requests that went on
    peak_threads: int = 0  # most threads in one forest
    peak_slots: int = 0  # most KV slots that live threads needed at once, draft nodes included
    final_slots: int = 0  # slots that live threads need after the call: 0, or something leaked
    # Slots as of now: that live threads need, that the prefix cache keeps beyond these, and the rest.
    live_slots: int = 0
    cached_slots: int = 0
    free_slots: int = 0
    prefix_cache_queries: int = 0  # prompt tokens that were looked for in the prefix cache
    prefix_cache_hits: int = 0  # of these, that were there
    # How the engine stood when `Engine.snapshot` copied this; elsewhere they are not set: requests that run, those in
    # the queue, how many more it would take, and live threads of those that run.
    running: int = 0
    waiting: int = 0
    places: float = math.inf
    threads: int = 0
    unread_tokens: int = 0  # written in requests that run, but not in their texts so far
    unfreed_slots: int = 0  # that would be live, had none gone back before its request's end: what forking saves
    prefill_seconds: float = 0.0  # steps that fed a prompt
    decode_seconds: float = 0.0  # all other steps
    rescore_seconds: float = 0.0  # rescore=True: passes over the reading order
    agreement: float | None = None  # rescore=True, greedy: share of the text that plain greedy decoding chooses
    regenerated: int = 0  # threads that regenerate_below had written anew
    # What the steps' time went into: plan, forest, forward, verify, commit, draft, count.
    phase_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_step(self) -> float:
        return self.generated_tokens / max(self.steps, 1)

    def __str__(self) -> str:
        """What a reader wants first; `repr` has it all."""
        seconds = self.prefill_seconds + self.decode_seconds + self.rescore_seconds
        lines = [
            f"{self.generated_tokens} tokens in {self.steps} steps, {self.tokens_per_step:.2f} a step, {seconds:.2f} s",
            f"{self.forks} forks, {self.peak_threads} threads at most, {self.peak_slots} KV slots at most",
        ]
        if guesses := [f"{self.accepted[who]} of {count} by {who}" for who, count in self.drafted.items() if count]:
            lines.append(f"guesses that were right: {', '.join(guesses)}")
        if self.agreement is not None:
            lines.append(f"plain decoding would have chosen {self.agreement:.1%} of the text")
        return "\n".join(lines)

    def count_iteration(self, tokens: int) -> None:
        """A step has fed and gained so many."""
        self.iteration_tokens[1 << (max(tokens, 1) - 1).bit_length()] += 1
        self.iteration_tokens_sum += tokens

    def copy(self) -> Stats:
        """One that counts no further."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        counters: dict[str, Any] = {name: value.copy() for name, value in values.items() if isinstance(value, dict)}
        return replace(self, **counters)


@dataclass(frozen=True, slots=True)
class ThreadAgreement:
    """How plain decoding, which reads everything before it in reading order, sees one thread's part of the answer.

    It reads prompt and answer at ordinary positions and without control tokens, which it never writes. Counted are the
    thread's own visible tokens in the answer, without its descendants' and what lies beyond the model's context.
    """

    thread: int  # its index in the row's paragraph tree
    tokens: int
    chosen: int | None  # tokens that greedy decoding under the call's logits processors chooses; None when sampling
    # Mean natural log of the model's own probability of a token, before logits processors, temperature among them; None
    # where there are no tokens.
    log_prob: float | None
    # Written anew. Such a thread's context was no path, but the prompt, the text before it, `[Fork]` and `[Child]`.
    regenerated: bool = False

    @property
    def agreement(self) -> float | None:
        """Share of the tokens that are chosen, from 0 to 1; None when sampling and without tokens."""
        return self.chosen / self.tokens if self.tokens and self.chosen is not None else None


class PhaseTimer:
    """Adds up, by name, the seconds of a step's phases; what lies between two phases is in none."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self.seconds: dict[str, float] = {}  # of this step alone
        self.total = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        took = self.seconds[name] = time.perf_counter() - started
        self._seconds[name] = self._seconds.get(name, 0.0) + took
        self.total += took
