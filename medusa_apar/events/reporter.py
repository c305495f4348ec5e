"""Says as events what a decoder's steps do."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from medusa_apar.forest.forest import Forest, Stem
from medusa_apar.kv.pool import KVPool
from medusa_apar.threads.paragraph_tree import Thread
from medusa_apar.threads.request import Request
from medusa_apar.verify.verdict import Verdict

from . import (
    Consumer,
    Drafted,
    Event,
    RequestStarted,
    Source,
    StepFinished,
    StepStarted,
    ThreadFinished,
    ThreadStarted,
    ThreadTookOver,
    TokensAccepted,
    TokensInserted,
    TokensRejected,
)


class Reporter:
    """Of one generate call. `events` holds all that was said, where it is to be kept; `watched` is whether somebody
    wants to know at once.

    The decoder tells it what it does in `plans`, `commits` and `finishes`; `deliver` hands over what came of it.
    max_new_tokens: the caller's, where requests have a greater limit of their own.
    """

    def __init__(self, requests: Sequence[Request], consumer: Consumer | None, keep: bool, max_new_tokens: int):
        self.events: list[Event] = []
        self.watched = consumer is not None
        self._requests, self._consumer, self._keep = requests, consumer, keep
        self._limit = max_new_tokens
        self._queue: list[Event] = []
        self._reported: dict[Thread, int] = {}  # how many of its tokens
        self._known = dict.fromkeys(requests, 0)  # how many of its threads
        self._open: dict[Request, list[Thread]] = {request: [] for request in requests}  # that have not ended
        self._took_over: set[Thread] = set()
        self._step, self._slots_used = 0, 0
        self._started, self._consumed = time.perf_counter(), 0.0
        for request in requests:
            tree = request.tree
            control = tree.fork_id, tree.child_id
            self._queue.append(RequestStarted(0, request.row, tuple(tree.trunk.tokens), tree.eos_ids, *control))
            self._start(request)

    def deliver(self) -> float:
        """Hands over what is in the queue; returns the seconds that this took."""
        queue, self._queue = self._queue, []
        if self._keep:
            self.events += queue
        if self._consumer is None:
            return 0.0
        started = time.perf_counter()
        for event in queue:
            self._consumer(event)
        took = time.perf_counter() - started
        self._consumed += took
        return took

    def plans(self, forest: Forest, owner: dict[Stem, Request], pool: KVPool) -> None:
        """A step's forest, before it is committed."""
        self._step += 1
        self._slots_used = pool.in_use
        drafted = (_drafted(owner[stem].row, stem) for stem in forest.stems)
        self._queue.append(StepStarted(self._step, tuple(drafted)))

    def commits(self, request: Request, stem: Stem, advanced: Iterable[tuple[Thread, Verdict, int]]) -> None:
        """What became of a stem; `advanced` as the fork manager returns it: the stem's thread first, if it went on."""
        accepted: set[int] = set()
        members = list(advanced)
        if members and members[0][0] is stem.thread:
            thread, verdict, gained = members.pop(0)
            nodes = verdict.nodes[:gained]
            accepted.update(nodes)
            accepted.update(child for fork, child in stem.forks.items() if fork in accepted)
            self._tell_tokens(request, thread, nodes)
        wrong = tuple(node for node in range(len(stem.draft_tokens)) if node not in accepted)
        if wrong:
            ids = tuple(stem.draft_tokens[node] for node in wrong)
            self._queue.append(TokensRejected(self._step, request.row, stem.thread.index, ids, wrong))
        self._start(request)
        for thread, _, _ in members:
            self._tell_tokens(request, thread, [])

    def finishes(self, running: Sequence[Request], forest: Forest, pool: KVPool) -> None:
        """A step has ended, cancelled threads included."""
        step = self._step
        for request in running:
            for thread in self._open[request]:
                if thread.takes_over and thread not in self._took_over:
                    self._took_over.add(thread)
                    self._queue.append(ThreadTookOver(step, request.row, thread.index))
        for request in running:
            still = []
            for thread in self._open[request]:
                if thread.finish_reason is None:
                    still.append(thread)
                    continue
                ended = ThreadFinished(step, request.row, thread.index, thread.finish_reason, thread.ends_line)
                self._queue.append(ended)
            self._open[request] = still
        lengths = tuple(min(len(request.text), self._limit) for request in self._requests)
        seconds = time.perf_counter() - self._started - self._consumed
        self._queue.append(StepFinished(step, len(forest), self._slots_used, pool.in_use, lengths, seconds))

    def _start(self, request: Request) -> None:
        """Tells of threads that are new in the request's tree."""
        threads = request.tree.threads
        new = threads[self._known[request] :]
        self._known[request] = len(threads)
        self._open[request] += new
        for thread in new:
            self._reported[thread] = thread.num_forced
            if thread.parent is None:
                self._queue.append(ThreadStarted(self._step, request.row, thread.index))
                continue
            place = thread.parent.index, thread.fork_index, tuple(thread.tokens[: thread.num_forced])
            self._queue.append(
                ThreadStarted(self._step, request.row, thread.index, *place, thread.seen, thread.line_break)
            )

    def _tell_tokens(self, request: Request, thread: Thread, nodes: list[int]) -> None:
        """Of its tokens those that have not been told of; inserted ones come behind all chosen in the same step."""
        known, self._reported[thread] = self._reported[thread], len(thread.tokens)
        inserted = next((index for index in range(known, len(thread.tokens)) if index in thread.inserted), None)
        new = tuple(thread.tokens[known:inserted])
        self._queue.append(TokensAccepted(self._step, request.row, thread.index, new, tuple(nodes)))
        if inserted is not None:
            rest = tuple(thread.tokens[inserted:])
            self._queue.append(TokensInserted(self._step, request.row, thread.index, rest))


def _drafted(row: int, stem: Stem) -> Drafted:
    thread, nodes = stem.thread, len(stem.draft_tokens)
    fed = stem.cached - thread.start, len(stem.pending)
    if not nodes:
        return Drafted(row, thread.index, *fed, verified=stem.verified)
    heads = 0 if stem.proposal is None else int((stem.kept < stem.proposal.heads).sum())
    counts: tuple[tuple[Source, int], ...] = (
        ("heads", heads),
        ("siblings", stem.guessed - heads),
        ("fork", len(stem.forks)),
    )
    sources = tuple(source for source, count in counts for _ in range(count))
    parents = tuple(stem.draft_tree.parents[:nodes].tolist())
    return Drafted(row, thread.index, *fed, tuple(stem.draft_tokens), parents, sources)
