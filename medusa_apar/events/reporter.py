"""Says as events what an engine's steps do, to whoever watches a request."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from medusa_apar.drafting.advance import Advance
from medusa_apar.forest.forest import Forest, Segment
from medusa_apar.threads.paragraph_tree import Thread
from medusa_apar.threads.request import Request

from . import (
    Consumer,
    Drafted,
    Event,
    RequestStarted,
    Source,
    StepFinished,
    StepStarted,
    ThreadContinuedParent,
    ThreadFinished,
    ThreadStarted,
    TokensAccepted,
    TokensInserted,
    TokensRejected,
)


class Reporter:
    """Tells of some requests: all rows of a generate call, say. A request's options name it as their `watcher`.

    Args:
        consumer: called with every event at once; None for nobody.
        keep: whether `events` holds all that was said.
        max_new_tokens: the caller's, where requests have a greater limit of their own.
    """

    def __init__(self, consumer: Consumer | None = None, keep: bool = True, max_new_tokens: int | None = None) -> None:
        self.events: list[Event] = []
        self._consumer, self._keep, self._limit = consumer, keep, max_new_tokens
        self._queue: list[Event] = []
        self._reported: dict[Thread, int] = {}  # how many of its tokens
        self._known: dict[Request, int] = {}  # how many of its threads
        self._open: dict[Request, list[Thread]] = {}  # that have not ended
        self._lengths: dict[Request, int] = {}  # readable tokens
        self._took_over: set[Thread] = set()
        self._step, self._slots_used = 0, 0
        self._started, self._consumed = time.perf_counter(), 0.0

    def take(self) -> list[Event]:
        """What was kept, which is kept no longer."""
        events, self.events = self.events, []
        return events

    def deliver(self) -> None:
        """Hands over what is in the queue. Raises what the consumer raises."""
        queue, self._queue = self._queue, []
        if self._keep:
            self.events += queue
        if self._consumer is None:
            return
        started = time.perf_counter()
        try:
            for event in queue:
                self._consumer(event)
        finally:
            self._consumed += time.perf_counter() - started

    def added(self, request: Request) -> None:
        tree = request.tree
        self._known[request], self._open[request], self._lengths[request] = 0, [], 0
        control = tree.fork_id, tree.child_id
        self._queue.append(RequestStarted(0, request.id, tuple(tree.trunk.tokens), tree.eos_ids, *control))
        self._start(request)

    def ended(self, request: Request) -> None:
        """Lets go of a request. Threads that are told as open were aborted, or have failed, between two steps."""
        if self._open[request]:
            for thread in self._open[request]:
                reason = thread.finish_reason or "cancelled"
                self._queue.append(ThreadFinished(self._step, request.id, thread.index, reason, thread.ends_line))
            seconds = time.perf_counter() - self._started - self._consumed
            self._queue.append(StepFinished(self._step, 0, self._slots_used, self._slots_used, (), seconds))
        for thread in request.tree.threads:
            self._reported.pop(thread, None)
            self._took_over.discard(thread)
        for known in (self._known, self._open, self._lengths):
            known.pop(request)

    def planned(self, segments: Iterable[Segment], slots_used: int) -> None:
        """A step's forest, before it runs."""
        self._step += 1
        self._slots_used = slots_used
        self._queue.append(StepStarted(self._step, tuple(map(_drafted, segments))))

    def committed(self, segment: Segment, nodes: Sequence[int], advances: Sequence[Advance]) -> None:
        """What became of a segment: its accepted nodes, and the threads that went on, its own first."""
        accepted = set(nodes)
        accepted.update(child for fork, child in segment.forks.items() if fork in accepted)
        request, members = segment.request, [advance.thread for advance in advances]
        if members and members[0] is segment.thread:
            self._tell_tokens(request, members.pop(0), nodes)
        wrong = tuple(node for node in range(len(segment.draft_tokens)) if node not in accepted)
        if wrong:
            ids = tuple(segment.draft_tokens[node] for node in wrong)
            self._queue.append(TokensRejected(self._step, request.id, segment.thread.index, ids, wrong))
        self._start(request)
        for thread in members:
            self._tell_tokens(request, thread, [])

    def wrote(self, request: Request, thread: Thread) -> None:
        """A thread went on in a step whose forest nobody knows, and may have forked."""
        self._tell_tokens(request, thread, [])
        self._start(request)

    def stepped(self, requests: Sequence[Request], rows: int, slots_kept: int) -> None:
        """A step of these requests has ended, cancelled threads included."""
        step = self._step
        for request in requests:
            for thread in self._open[request]:
                if thread.continues_parent and thread not in self._took_over:
                    self._took_over.add(thread)
                    self._queue.append(ThreadContinuedParent(step, request.id, thread.index))
        lengths = []
        for request in requests:
            still = []
            for thread in self._open[request]:
                if thread.finish_reason is None:
                    still.append(thread)
                    continue
                ended = ThreadFinished(step, request.id, thread.index, thread.finish_reason, thread.ends_line)
                self._queue.append(ended)
            self._open[request] = still
            length = len(request.text) if self._limit is None else min(len(request.text), self._limit)
            if length != self._lengths[request]:
                self._lengths[request] = length
                lengths.append((request.id, length))
        seconds = time.perf_counter() - self._started - self._consumed
        self._queue.append(StepFinished(step, rows, self._slots_used, slots_kept, tuple(lengths), seconds))

    def _start(self, request: Request) -> None:
        """Tells of threads that are new in the request's tree."""
        threads = request.tree.threads
        new = threads[self._known[request] :]
        self._known[request] = len(threads)
        self._open[request] += new
        for thread in new:
            self._reported[thread] = thread.num_forced
            if thread.parent is None:
                self._queue.append(ThreadStarted(self._step, request.id, thread.index))
                continue
            place = thread.parent.index, thread.fork_index, tuple(thread.tokens[: thread.num_forced])
            self._queue.append(
                ThreadStarted(self._step, request.id, thread.index, *place, thread.seen, thread.line_break)
            )

    def _tell_tokens(self, request: Request, thread: Thread, nodes: Sequence[int]) -> None:
        """Reports the thread's new tokens: chosen ones first, then inserted ones."""
        known, self._reported[thread] = self._reported[thread], len(thread.tokens)
        inserted = next((index for index in range(known, len(thread.tokens)) if index in thread.inserted), None)
        new = tuple(thread.tokens[known:inserted])
        self._queue.append(TokensAccepted(self._step, request.id, thread.index, new, tuple(nodes)))
        if inserted is not None:
            rest = tuple(thread.tokens[inserted:])
            self._queue.append(TokensInserted(self._step, request.id, thread.index, rest))


class Reporters:
    """All reporters of an engine. An unwatched request costs nothing, and one whose consumer raises fails alone."""

    def __init__(self) -> None:
        self._requests: dict[Reporter, set[Request]] = {}
        self.failed: list[Request] = []  # requests whose consumer has raised, until the engine has ended them

    def added(self, request: Request) -> None:
        if request.options.events and request.options.watcher is None:
            request.watcher = Reporter()
        if request.watcher is not None:
            self._requests.setdefault(request.watcher, set()).add(request)
            request.watcher.added(request)

    def ended(self, request: Request) -> None:
        if request.watcher is None:
            return
        request.watcher.ended(request)
        self._requests[request.watcher].remove(request)
        self._deliver(request.watcher)
        if not self._requests[request.watcher]:
            del self._requests[request.watcher]

    def planned(self, forest: Forest, slots_used: int) -> None:
        """What is guessed is told while it is checked."""
        if not self._requests:
            return
        segments: dict[Reporter, list[Segment]] = {}
        for segment in forest.segments:
            if segment.request.watcher is not None:
                segments.setdefault(segment.request.watcher, []).append(segment)
        for reporter, own in segments.items():
            reporter.planned(own, slots_used)
            self._deliver(reporter)

    def began(self, request: Request, slots_used: int) -> None:
        """A step, of which nothing but the tokens is known that it brings."""
        if request.watcher is not None:
            request.watcher.planned((), slots_used)
            self._deliver(request.watcher)

    def committed(self, segment: Segment, nodes: Sequence[int], advances: Sequence[Advance]) -> None:
        if segment.request.watcher is not None:
            segment.request.watcher.committed(segment, nodes, advances)

    def wrote(self, request: Request, thread: Thread) -> None:
        if request.watcher is not None:
            request.watcher.wrote(request, thread)

    def stepped(self, requests: Iterable[Request], rows: int, slots_kept: int) -> None:
        """rows: of the step's forest. slots_kept: of the KV pool, now that it is committed."""
        if not self._requests:
            return
        watched: dict[Reporter, list[Request]] = {}
        for request in requests:
            if request.watcher is not None:
                watched.setdefault(request.watcher, []).append(request)
        for reporter, own in watched.items():
            reporter.stepped(own, rows, slots_kept)
            self._deliver(reporter)

    def _deliver(self, reporter: Reporter) -> None:
        try:
            reporter.deliver()
        except Exception as error:
            for request in self._requests[reporter]:
                request.error = request.error or error
                self.failed.append(request)


def _drafted(segment: Segment) -> Drafted:
    thread, nodes, request = segment.thread, len(segment.draft_tokens), segment.request.id
    fed = segment.cached - thread.start, len(segment.extend_tokens)
    if not nodes:
        return Drafted(request, thread.index, *fed, verified=segment.verified)
    counts: dict[Source, int] = {}
    if segment.proposal is None:
        counts["ngrams"] = segment.num_candidates
    else:
        counts.update(segment.proposal.sources(segment.kept[: segment.num_candidates]).items())
    counts["fork"] = len(segment.forks)
    sources = tuple(source for source, count in counts.items() for _ in range(count))
    parents = tuple(segment.draft_tree.parents[:nodes].tolist())
    return Drafted(request, thread.index, *fed, tuple(segment.draft_tokens), parents, sources)
