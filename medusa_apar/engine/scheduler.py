"""Which requests and threads run in a step, and with how many draft nodes: when a token is made, never which.

Waiting requests are admitted in the order of their priority, then of their arrival, as soon as the KV pool has room for
what they are expected to need. In a step every running request that can run gets a row before any gets a second, for
the first thread in reading order that can; further threads run where a row is worth it (`row_worth`). A prompt, and
whatever else has to be fed again, goes in pieces beside requests that decode. Under memory pressure threads are
preempted before requests, the youngest first. What a prefix cache has of a path is not fed.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np

from medusa_apar.drafting.budget import EvenBudget, ForestBudget, thread_weights
from medusa_apar.drafting.candidates import Proposal
from medusa_apar.drafting.speculator import Load
from medusa_apar.drafting.step_cost import LearnedCost, StepCost
from medusa_apar.forest.forest import Segment
from medusa_apar.kv.slot_ledger import SlotLedger
from medusa_apar.threads.paragraph_tree import Thread
from medusa_apar.threads.request import Request, Status

from .plan import MAX_PREFILL_ROWS, Feed, Plan
from .prefix_hits import is_being_fed, most_tokens, num_shared
from .row_worth import PRICED_ROWS, ChildLengths, chances, worth
from .segments import segments
from .slot_needs import Course, SlotNeeds, peak

Candidates = Callable[[Thread], Proposal | None]


@dataclass(slots=True)
class Scheduler:
    """Args:
    budget: which candidates become draft nodes after every thread has its root.
    context_length: no draft node may stand at or beyond this path position.
    cost: what a step costs; None: every thread is worth its row.
    max_prefill_rows: most rows of a step beside those of threads that decode, where there are any.
    max_requests: most requests that run at once; None: as many as the pool has room for.
    """

    ledger: SlotLedger
    budget: ForestBudget | EvenBudget
    context_length: int | None = None
    max_prefill_rows: int = 24
    max_requests: int | None = None
    cost: StepCost | LearnedCost | None = None
    needs: SlotNeeds = field(init=False)
    running: list[Request] = field(default_factory=list)  # by priority, then by arrival
    preemptions: int = 0  # of requests
    thread_preemptions: int = 0
    prefix_cache_queries: int = 0  # tokens of prompts that were admitted
    prefix_cache_hits: int = 0  # of these, that were there
    _waiting: list[tuple[int, int, Request]] = field(default_factory=list)  # a heap: priority, arrival
    _refed: set[Thread] = field(default_factory=set)  # preempted threads that are not whole again
    _child_lengths: ChildLengths = field(default_factory=ChildLengths)
    # As of the last `load`: the requests that were to go on, and which of their threads are worth a row.
    _judged: tuple[list[Request], set[Thread]] | None = None

    def __post_init__(self) -> None:
        self.needs = SlotNeeds(self.context_length)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def free_places(self) -> float:
        """How many more requests could run for sure."""
        if self.ledger.pool.max_slots is not None:
            return 0 if self.running else 1
        return math.inf if self.max_requests is None else self.max_requests - len(self.running)

    def waiting(self) -> Iterator[Request]:
        """In the order in which they will be admitted."""
        return (request for _, _, request in sorted(self._waiting, key=lambda entry: entry[:2]))

    def add(self, request: Request) -> None:
        heapq.heappush(self._waiting, (*_rank(request), request))

    def remove(self, request: Request) -> None:
        """Takes out a request that has ended, wherever it stands."""
        if request in self.running:
            self.running.remove(request)
            if request.status is Status.FINISHED:
                self._child_lengths.learn(request)
        else:
            self._waiting = [entry for entry in self._waiting if entry[2] is not request]
            heapq.heapify(self._waiting)
        self.needs.learn(request)
        self._refed.difference_update(request.tree.threads)

    def load(self) -> Load:
        """What the next step will run at most, now that threads have gone on; its plan goes by the same judgement."""
        going_on = [request for request in self.running if not request.done]
        worthy = self._worthy(going_on)
        self._judged = going_on, worthy
        return _load(going_on, worthy)

    def plan(self, candidates: Candidates) -> tuple[Plan, list[list[Segment]]]:
        """The step's threads, and their segments request by request, ancestors first."""
        self._admit()
        if self.ledger.pool.max_slots is not None:
            for request in self.running:
                self.needs.note(request, self._held(request))
        plan = Plan()
        if any(request.status is Status.DECODING for request in self.running):
            plan.prefill_left = min(self.max_prefill_rows, MAX_PREFILL_ROWS)
        for request in list(self.running):
            if request in self.running:  # an older one may have preempted it meanwhile
                self._choose_first(request, plan)
        requests, worthy = self._judged or ([], set())
        self._judged = None  # threads go on before the next plan
        if requests != self.running:  # somebody has joined or left since
            worthy = self._worthy(self.running)
        plan.load = _load(self.running, worthy)
        for request in self.running:
            self._choose_others(request, plan, worthy)
        if not plan.feed:
            assert self.ledger.pool.max_slots is not None, "a running request has a live thread"
            raise MemoryError(
                f"The KV pool's {self.ledger.pool.max_slots} slots are too few to go on with any thread; "
                "give `pool_slots` more room or lower `max_new_tokens`."
            )
        trees = self._trees(plan, candidates)
        return plan, [segments(request, plan, trees, self.ledger) for request in plan.requests]

    # ---- who runs

    def _admit(self) -> None:
        while self._waiting and (self.max_requests is None or len(self.running) < self.max_requests):
            request = self._waiting[0][2]
            if self.running and not self._has_room(request):
                return
            heapq.heappop(self._waiting)
            self.running.append(request)
            self.running.sort(key=_rank)
            request.status = Status.PREFILLING
            if self.ledger.shares and not request.stats.preemptions and request.options.score_from is None:
                self.prefix_cache_queries += len(request.prompt_ids)

    def _has_room(self, request: Request) -> bool:
        """Whether the pool holds what the request and the running ones are expected to need until all have ended."""
        available = self.ledger.pool.available
        if available is None:
            return True
        found = num_shared(request, self.ledger)
        newcomer = self.needs.course(request, 0, found)
        room = available - self.budget.rows
        if newcomer.at_once > room:
            return False
        return peak([*map(self._course, self.running), newcomer]) <= room

    def _course(self, request: Request) -> Course:
        held = self._held(request)
        kept = held - self.ledger.num_booked_by(request.tree.threads) if self.ledger.shares else 0
        return self.needs.course(request, held, kept=kept)

    def _held(self, request: Request) -> int:
        return sum(self.ledger.cached(thread) for thread in request.tree.threads)

    def _choose_first(self, request: Request, plan: Plan) -> None:
        """The request's earliest thread in reading order that can run; others give their slots back for it."""
        thread = _ready_first(request)[0]
        feed: Feed | None = self._feed(request, thread, plan)
        if feed is not None and self._is_being_fed(request, thread, feed, plan):
            return
        if feed is not None and not self._fits(feed, plan):
            feed = self._make_room(request, thread, plan)
        if feed is not None and feed.stops:
            self._take(request, thread, feed, plan)

    def _worthy(self, requests: Sequence[Request]) -> set[Thread]:
        """Threads which are worth a row beside the first of each request that can run."""
        firsts = {_ready_first(request)[0] for request in requests}
        shared = [one for one in requests if len(one.live) > 1 and one.options.score_from is None]
        if self.cost is None:
            return {thread for request in shared for thread, _ in request.live if thread not in firsts}
        others = [pair for request in shared for pair in self._chances(request, firsts)]
        if others:
            others.sort(key=lambda pair: -pair[0])
            costs = self.cost.rows(_rounded_up(len(firsts) + PRICED_ROWS))
            del others[worth([chance for chance, _ in others], len(firsts), costs) :]
        return {thread for _, thread in others}

    def _chances(self, request: Request, taken: Container[Thread]) -> Iterator[tuple[float, Thread]]:
        """The chance of each further thread of the request that its next token is read, or that of one that can only
        run beside it."""
        needed: dict[Thread, float] = {}
        within = request.live[: request.options.max_threads]
        for chance, (thread, _) in zip(chances(request, self._child_lengths.mean(request)), within, strict=False):
            chance = max(chance, needed.get(thread, 0.0))
            if _forks_now(thread) and thread.parent is not None:
                needed[thread.parent] = max(chance, needed.get(thread.parent, 0.0))
            if thread not in taken:
                yield chance, thread

    def _choose_others(self, request: Request, plan: Plan, worthy: Container[Thread]) -> None:
        if request not in plan.requests or request.options.score_from is not None:
            return
        limit = math.inf if request.options.max_threads is None else request.options.max_threads
        taken = sum(thread in plan.chosen for thread in plan.requests[request])
        for thread in _ready_first(request):
            if taken >= limit:
                return
            if thread not in worthy or _waits_for_parent(thread, plan):
                continue
            feed = self._feed(request, thread, plan)
            # What was preempted comes back only where it will not have to go again at once.
            spare = 0 if self.ledger.claims(thread) else len(plan.chosen)
            if feed.stops and self._fits(feed, plan, spare):
                self._take(request, thread, feed, plan)
                taken += feed.whole

    def _feed(self, request: Request, thread: Thread, plan: Plan) -> Feed:
        """What the thread needs beside what the plan has, or as much of it as the step has rows for."""
        scoring = request.options.score_from is not None
        decodes = request.status is Status.DECODING and thread not in self._refed
        found = [] if decodes else self.ledger.found(thread, most_tokens(request, thread))
        # What the plan feeds goes on where it was when that was planned, whatever has been kept since.
        found = list(takewhile(lambda pair: pair[0] not in plan.feed, found))
        more = {member: len(slots) for member, slots in found}
        left = math.inf if decodes else plan.prefill_left
        if scoring:
            left = min(left, plan.scored_left)
        stops: list[tuple[Thread, int]] = []
        rows, whole = 0, True
        for member, until in self.ledger.missing(thread, len(thread.tokens) - 1 if scoring else None):
            have = max(plan.feed.get(member, 0), self.ledger.cached(member) + more.get(member, 0))
            take = min(until - have, left - rows)
            if take > 0:
                stops.append((member, have + int(take)))
                rows += int(take)
            if have + take < until:
                whole = False
                break
        return Feed(stops, rows, not decodes, whole, found, self.ledger.num_idle(found))

    def _take(self, request: Request, thread: Thread, feed: Feed, plan: Plan) -> None:
        self.ledger.resume(thread)
        for member, slots in feed.found:
            self._count_hit(request, member, len(slots))
            self.ledger.assign(member, slots)
        members = plan.requests.setdefault(request, [])
        for member, stop in feed.stops:
            if member not in plan.feed:
                members.append(member)
            plan.feed[member] = stop
        plan.rows += feed.rows
        if feed.prefills:
            plan.prefill_rows += feed.rows
            plan.prefill_left -= feed.rows
        if request.options.score_from is not None:
            plan.scored_left -= feed.rows
        if feed.whole:
            self._refed.discard(thread)
        if feed.whole and request.options.score_from is None:
            plan.chosen[thread] = request

    def _count_hit(self, request: Request, thread: Thread, count: int) -> None:
        """Counts what a prompt finds before it was fed for the first time."""
        begin, end = self.ledger.cached(thread), len(request.prompt_ids)
        if thread.parent is None and request.stats.first_token is None and not request.stats.preemptions:
            hits = max(min(begin + count, end) - begin, 0)
            request.stats.cached_tokens += hits
            self.prefix_cache_hits += hits

    def _is_being_fed(self, request: Request, thread: Thread, feed: Feed, plan: Plan) -> bool:
        """Whether it pays to wait a step, since an older request feeds what this one would."""
        if not feed.prefills or thread.parent is not None:
            return False
        have = self.ledger.cached(thread) + sum(len(slots) for _, slots in feed.found)
        return is_being_fed(request, have, plan.feed, plan.requests, self.ledger)

    def _fits(self, feed: Feed, plan: Plan, spare: int = 0) -> bool:
        available = self.ledger.pool.available
        return available is None or plan.rows + feed.rows + feed.idle + spare <= available

    def _make_room(self, request: Request, thread: Thread, plan: Plan) -> Feed | None:
        """Preempts others until the thread fits: threads that no request waits for first, then younger requests. What
        the thread then needs, or None where it does not fit."""
        if not self._could_fit(request, thread, plan):
            return None
        self.ledger.resume(thread)  # claim the path first, or preempting its relatives would take it
        for other in reversed(self.running):
            kept = _ready_first(other)[0]
            for victim, _ in reversed(other.live):
                if victim is thread or victim is kept or victim in plan.feed:
                    continue
                self.thread_preemptions += self._evict(victim)
                if self._fits(feed := self._feed(request, thread, plan), plan):
                    return feed
        for other in self.running[:0:-1]:
            if other is request:
                break
            self._preempt(other)
            if self._fits(feed := self._feed(request, thread, plan), plan):
                return feed
        return None

    def _could_fit(self, request: Request, thread: Thread, plan: Plan) -> bool:
        """Whether the thread might fit if all that may go for it went."""
        younger = self.running[self.running.index(request) + 1 :]
        kept = {_ready_first(other)[0] for other in self.running}
        may_go = [
            victim
            for other in self.running
            for victim, _ in other.live
            if victim not in plan.feed and (other in younger or victim not in kept) and victim is not thread
        ]
        # Of threads that have ended, slots go with the last one that sees them.
        ended = [thread for other in self.running for thread in other.tree.threads if thread.ended]
        return self._fits(self._feed(request, thread, plan), plan, -self.ledger.num_booked_by([*may_go, *ended]))

    def _evict(self, thread: Thread) -> bool:
        """Takes a thread's slots back, if it has any of its own; it will have to be fed again."""
        self._refed.add(thread)
        return self.ledger.evict(thread) > 0

    def _preempt(self, request: Request) -> None:
        for thread, _ in request.live:
            self._evict(thread)
        self.needs.back_off()
        self.running.remove(request)
        self.preemptions += 1
        request.stats.preemptions += 1
        request.status = Status.PREEMPTED
        self.add(request)

    # ---- what they draft

    def _trees(self, plan: Plan, candidates: Candidates) -> dict[Thread, tuple[Proposal, np.ndarray]]:
        """Which nodes of which candidates each thread drafts."""
        by_request = [[thread for thread in members if thread in plan.chosen] for members in plan.requests.values()]
        threads = [thread for members in by_request for thread in members]
        if not threads:
            return {}
        proposals = [self._within_context(thread, candidates(thread)) for thread in threads]
        if not any(proposals):
            room = 0
        elif self.ledger.pool.available is None:
            room = self.budget.rows
        else:
            room = max(0, self.ledger.pool.available - plan.rows)
        weights = np.concatenate([self._weights(members) for members in by_request if members])
        kept = self.budget.choose(proposals, weights, room, sum(map(bool, by_request)))
        return {
            thread: (proposal, nodes)
            for thread, proposal, nodes in zip(threads, proposals, kept, strict=True)
            if proposal is not None and len(nodes)
        }

    def _weights(self, threads: Sequence[Thread]) -> np.ndarray:
        """What a token of each of a request's threads brings its answer, 1 in all."""
        return thread_weights(threads) if self.budget.weigh_threads else np.full(len(threads), 1 / len(threads))

    def _within_context(self, thread: Thread, proposal: Proposal | None) -> Proposal | None:
        if proposal is None or self.context_length is None:
            return proposal
        room = self.context_length - thread.end
        return proposal if len(proposal.tokens) <= room else proposal.within(room)


def _rank(request: Request) -> tuple[int, int]:
    """Who goes first: by priority, then by arrival."""
    return request.options.priority, request.arrival


def _load(requests: Sequence[Request], worthy: Container[Thread]) -> Load:
    """What requests run at most, each its first thread and those that are worth it."""
    threads = sum(_num_threads(request, worthy) for request in requests)
    speculation = any(request.options.speculation for request in requests)
    return Load(max(threads, 1), len(requests), speculation)


def _num_threads(request: Request, worthy: Container[Thread]) -> int:
    count = 1 + sum(thread in worthy for thread, _ in request.live)
    return count if request.options.max_threads is None else min(count, request.options.max_threads)


def _rounded_up(rows: int) -> int:
    """Costs are kept for every number of rows that is asked for."""
    return -(-rows // 64) * 64


def _waits_for_parent(thread: Thread, plan: Plan) -> bool:
    """Whether its `[Fork]` is the root of a parent that does not run in this step."""
    return _forks_now(thread) and thread.parent not in plan.chosen


def _forks_now(thread: Thread) -> bool:
    """Whether its `[Fork]` is the parent's root, so that it can only run in a forest that the parent runs in too."""
    parent = thread.parent
    return parent is not None and parent.live and thread.seen == len(parent.tokens)


def _ready_first(request: Request) -> list[Thread]:
    """Live threads in reading order, those that wait for their parent's root behind all others."""
    live = [thread for thread, _ in request.live]
    return sorted(live, key=_forks_now)
