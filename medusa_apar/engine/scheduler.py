"""Which threads run in a step and with how many draft nodes. It decides when a token is made, never which."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from medusa_apar.drafting.budget import EvenBudget, ForestBudget, worths
from medusa_apar.drafting.candidates import Proposal
from medusa_apar.drafting.draft_tree import TreeShape
from medusa_apar.forest.forest import Stem
from medusa_apar.kv.slot_ledger import SlotLedger
from medusa_apar.threads.paragraph_tree import Thread
from medusa_apar.threads.request import Request

Guess = Callable[[Thread], Proposal | None]


@dataclass(slots=True)
class Scheduler:
    """Args:
    budget: which candidates become draft nodes after every thread has its root.
    max_threads: most threads of one request in a step; the others wait.
    context_length: no draft node may stand at or beyond this path position.
    """

    ledger: SlotLedger
    budget: ForestBudget | EvenBudget
    max_threads: int | None = None
    context_length: int | None = None

    def plan(self, requests: Sequence[Request], guess: Guess) -> list[tuple[Request, list[Stem]]]:
        """Stems for the next forest, for each request that runs, ancestors first.

        `guess(thread)` gives candidates for its draft tree, or None where there are none.
        """
        chosen: dict[Thread, Request] = {}
        for request in requests:
            self._choose(request, requests, chosen)
        if not chosen:
            assert self.ledger.pool.max_slots is not None, "a request that is not done has a live thread"
            raise MemoryError(
                f"The KV pool's {self.ledger.pool.max_slots} slots are too few to go on with any thread; "
                "give `pool_slots` more room or lower `max_new_tokens`."
            )
        trees = self._trees(chosen, guess)
        return [(request, stems) for request in requests if (stems := self._stems(request, chosen, trees))]

    def running(self, requests: Sequence[Request]) -> int:
        """How many threads the next plan can have."""
        limit = math.inf if self.max_threads is None else self.max_threads
        return int(sum(min(len(list(request.tree.live_in_reading_order())), limit) for request in requests))

    def _choose(self, request: Request, requests: Sequence[Request], chosen: dict[Thread, Request]) -> None:
        """Adds the request's threads that run, earliest in reading order first."""
        live = [thread for thread, _ in request.tree.live_in_reading_order()]
        waiting = [thread for thread in live if self._fork_pending(thread)]
        ready = [thread for thread in live if thread not in waiting]
        limit = math.inf if self.max_threads is None else self.max_threads
        taken = 0
        for thread in ready + waiting:
            if taken >= limit or (thread in waiting and thread.parent not in chosen):
                continue
            if self._make_room(thread, chosen, requests):
                self.ledger.resume(thread)
                chosen[thread] = request
                taken += 1

    def _fork_pending(self, thread: Thread) -> bool:
        """Its `[Fork]` is the parent's root, so the child can only run in a forest the parent runs in too."""
        parent = thread.parent
        return parent is not None and parent.live and thread.seen == len(parent.tokens)

    def _make_room(self, thread: Thread, chosen: dict[Thread, Request], requests: Sequence[Request]) -> bool:
        """Whether the pool has slots for it beside those chosen; the first choice may evict the last in line."""
        if self.ledger.pool.available is None:
            return True
        if self._fits([*chosen, thread]):
            return True
        if chosen:
            return False
        self.ledger.resume(thread)  # claim the path first, or evicting its relatives would take it
        for request in reversed(requests):
            for victim, _ in reversed(request.tree.live_in_reading_order()):
                if victim is not thread and self.ledger.evict(victim) and self._fits([thread]):
                    return True
        return False

    def _fits(self, threads: Sequence[Thread]) -> bool:
        return sum(self._to_feed(threads).values()) <= (self.ledger.pool.available or 0)

    def _to_feed(self, threads: Sequence[Thread]) -> dict[Thread, int]:
        """Every thread that must be fed so that these can run, with how many of its tokens lack a slot."""
        count: dict[Thread, int] = {}
        for thread in threads:
            for member, stop in self.ledger.missing(thread):
                count[member] = max(count.get(member, 0), stop - self.ledger.cached(member))
        return count

    def _trees(self, chosen: dict[Thread, Request], guess: Guess) -> dict[Thread, tuple[Proposal, np.ndarray]]:
        """Which nodes of which candidates each thread drafts."""
        threads = list(chosen)
        proposals = [self._within_context(thread, guess(thread)) for thread in threads]
        if not any(proposals):
            room = 0
        elif self.ledger.pool.available is None:
            room = self.budget.rows
        else:
            room = max(0, self.ledger.pool.available - sum(self._to_feed(threads).values()))
        worth, requests = np.ones(len(threads)), list(chosen.values())
        first = 0
        while first < len(threads):  # a request's threads stand side by side
            last = first + requests.count(requests[first])
            alike = np.full(last - first, 1 / (last - first))
            worth[first:last] = worths(threads[first:last]) if self.budget.weighs else alike
            first = last
        kept = self.budget.choose(proposals, worth, room, len(set(requests)))
        return {
            thread: (proposal, nodes)
            for thread, proposal, nodes in zip(threads, proposals, kept, strict=True)
            if proposal is not None and len(nodes)
        }

    def _within_context(self, thread: Thread, proposal: Proposal | None) -> Proposal | None:
        if proposal is None or self.context_length is None:
            return proposal
        room = self.context_length - thread.end
        return proposal if len(proposal.tokens) <= room else proposal.within(room)

    def _stems(
        self, request: Request, chosen: dict[Thread, Request], trees: dict[Thread, tuple[Proposal, np.ndarray]]
    ) -> list[Stem]:
        mine = [thread for thread in chosen if chosen[thread] is request]
        fed = self._to_feed(mine)
        return [
            _verified(thread, *trees.get(thread, (None, None)))
            if thread in chosen
            else Stem(thread, self.ledger.cached(thread) + fed[thread], verified=False)
            for thread in request.tree.depth_first()
            if thread in fed
        ]


def _verified(thread: Thread, proposal: Proposal | None, kept: np.ndarray | None) -> Stem:
    if proposal is None or kept is None:
        return Stem(thread, len(thread.tokens))
    places = np.full(len(proposal.tokens) + 1, -1)  # the last entry is the root's
    places[kept] = np.arange(len(kept))
    return Stem(
        thread,
        len(thread.tokens),
        draft_tree=TreeShape.of(places[proposal.parents[kept]]),
        draft_tokens=proposal.tokens[kept].tolist(),
        forks={int(places[f]): int(places[c]) for f, c in proposal.forks.items() if places[c] >= 0},
        proposal=proposal,
        kept=kept,
    )
