"""What events add up to: the paragraph trees at any step, with where each token came from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, NamedTuple, cast

import torch

from medusa_apar.threads.paragraph_tree import Fork, ParagraphTree, ReadingCursor, Thread

from . import (
    Drafted,
    Event,
    RequestStarted,
    StepFinished,
    StepStarted,
    ThreadContinuedParent,
    ThreadFinished,
    ThreadStarted,
    TokensAccepted,
    TokensInserted,
    TokensRejected,
)


class Origin(NamedTuple):
    """Where a token came from: the step, and who drafted it: "heads", "ngrams", "recycled", "model" where nobody did,
    or "rule" where a fork rule wrote it."""

    step: int
    source: str


@dataclass(slots=True)
class Recording:
    """A consumer of events. Requests are numbered as they start, so that those of a generate call are its rows.

    Where a request starts whose id is known already, another generate call has begun: it forgets all it knew.

    Attributes:
        rows: number of each request, by id.
        trees: one a request, what `MedusaAparOutput.paragraph_tree` would be had the call ended here. Threads are the
            recording's own, equal to the engine's in all that is told.
        origins: of each thread's own tokens.
        started: in which step a thread was forked; finished: in which it ended.
        drafted: each live thread's part of the latest forest, with what is guessed for it while that is being checked.
        accepted: what it brought each thread; rejected: guesses that proved wrong.
        steps: what each finished step cost.
    """

    rows: dict[str, int] = field(default_factory=dict)
    trees: list[ParagraphTree] = field(default_factory=list)
    origins: dict[Thread, list[Origin]] = field(default_factory=dict)
    started: dict[Thread, int] = field(default_factory=dict)
    finished: dict[Thread, int] = field(default_factory=dict)
    drafted: dict[Thread, Drafted] = field(default_factory=dict)
    accepted: dict[Thread, TokensAccepted] = field(default_factory=dict)
    rejected: dict[Thread, TokensRejected] = field(default_factory=dict)
    steps: list[StepFinished] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # of each request, how many tokens of its answer are final
    checking: bool = False  # whether the latest step's guesses are still being checked

    @classmethod
    def of(cls, events: Iterable[Event]) -> Recording:
        recording = cls()
        for event in events:
            recording(event)
        return recording

    def at(self, step: int, checking: bool = False) -> Recording:
        """What it was after a step; with `checking`, in the middle of it, its guesses being checked."""

        def over(event: Event) -> bool:
            return event.step > step or (checking and event.step == step and not isinstance(event, StepStarted))

        return Recording.of(takewhile(lambda event: not over(event), self.events))

    @property
    def step(self) -> int:
        """The latest that has begun."""
        return self.events[-1].step if self.events else 0

    def readable(self, row: int = 0) -> int:
        """How many tokens of a row's answer are final."""
        return self.lengths[row] if row < len(self.lengths) else 0

    def text(self, row: int = 0) -> list[tuple[Thread, int]]:
        """A row's visible tokens so far, in reading order; within the caller's limit once that is reached."""
        tree = self.trees[row]
        order = list(tree.reading_order())
        return order if tree.live else order[: self.readable(row)]

    def tree_of(self, named: Any) -> ParagraphTree:
        """The paragraph tree of the request that an event, or a part of one, names."""
        return self.trees[self.rows[named.request]]

    def __call__(self, event: Event) -> None:
        if isinstance(event, RequestStarted) and event.request in self.rows:
            self.__init__()  # type: ignore[misc]
        self.events.append(event)
        match event:
            case RequestStarted():
                control = event.fork_id, event.child_id
                self.rows[event.request] = len(self.trees)
                self.lengths.append(0)
                self.trees.append(ParagraphTree(list(event.prompt_ids), 0, event.eos_ids, *control))
            case ThreadStarted():
                self._start(event)
            case StepStarted():
                self.accepted.clear()
                self.rejected.clear()
                self.drafted = {self._thread(drafted): drafted for drafted in event.drafted}
                self.checking = True
            case TokensAccepted():
                thread = self._thread(event)
                sources: list[str] = [self.drafted[thread].sources[node] for node in event.nodes]
                sources += ["model"] * (len(event.token_ids) - len(sources))
                thread.tokens += event.token_ids
                self.accepted[thread] = event
                self.origins[thread] += [Origin(event.step, source) for source in sources]
            case TokensInserted():
                thread = self._thread(event)
                self.tree_of(event).insert(thread, event.token_ids)
                self.origins[thread] += [Origin(event.step, "rule")] * len(event.token_ids)
            case TokensRejected():
                self.rejected[self._thread(event)] = event
            case ThreadContinuedParent():
                self._thread(event).continues_parent = True
            case ThreadFinished():
                thread = self._thread(event)
                thread.finish_reason, thread.ends_line = event.reason, event.ends_line
                self.finished[thread] = event.step
            case StepFinished():
                self.steps.append(event)
                for name, length in event.text_lengths:
                    self.lengths[self.rows[name]] = length
                self.checking = False

    def _start(self, event: ThreadStarted) -> None:
        tree = self.tree_of(event)
        thread = tree.trunk
        if event.parent is not None:
            fork = Fork(event.forced_ids, event.seen, line_break=event.line_break)
            thread = tree.fork(tree.threads[event.parent], event.fork_index, 0, fork)
        self.origins[thread] = []
        self.started[thread] = event.step

    def _thread(self, named: Any) -> Thread:
        thread: Thread = self.tree_of(named).threads[named.thread]
        return thread


class ReadingOrder:
    """A consumer that feeds one row's answer, as it becomes readable, to a streamer of transformers.

    What `generate(streamer=...)` does for a whole batch at once, where transformers' own streamers take but one row;
    here each row may have one. With `regenerate_below` it shows what was written first.
    """

    def __init__(self, streamer: Any, row: int = 0):
        self._streamer, self._row = streamer, row
        self._recording = Recording()
        self._cursor: ReadingCursor | None = None
        self._sent = 0
        self._ended = False

    def __call__(self, event: Event) -> None:
        recording = self._recording
        recording(event)
        if isinstance(event, RequestStarted) and recording.rows[event.request] == self._row:
            self._sent, self._ended = 0, False
            self._streamer.put(torch.tensor([event.prompt_ids], dtype=torch.long, device="cpu"))
            self._cursor = ReadingCursor(recording.trees[self._row])
        if not isinstance(event, StepFinished) or self._ended:
            return
        for _ in range(recording.readable(self._row) - self._sent):
            thread, index = next(cast(ReadingCursor, self._cursor).advance())
            self._streamer.put(torch.tensor([thread.tokens[index]], dtype=torch.long, device="cpu"))
            self._sent += 1
        if not recording.trees[self._row].live:
            self._ended = True
            self._streamer.end()
