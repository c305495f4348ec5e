"""Which threads run in a step and with how many draft nodes. It decides when a token is made, never which."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .draft_tree import DraftTree
from .forest import Stem
from .paragraph_tree import Thread
from .request import Request
from .slot_ledger import SlotLedger

Guess = Callable[[Thread], list[int] | None]


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a step takes, in any unit of time.

    curve: (rows, cost) of some sizes, rows ascending; linear in between, and beyond the last as before it.
    level: drafting one level of the trees.
    """

    curve: tuple[tuple[float, float], ...]
    level: float = 0.0

    def of(self, rows: np.ndarray) -> np.ndarray:
        sizes, costs = np.array(self.curve).T
        slope = (costs[-1] - costs[-2]) / (sizes[-1] - sizes[-2])
        return np.interp(rows, sizes, costs) + slope * np.maximum(rows - sizes[-1], 0)

    def nodes(self, threads: int, tree: DraftTree) -> int:
        """How many nodes below each of so many roots give the most tokens for the time; those of a tree whose chances
        nobody said are all wanted."""
        if tree.chances is None or not len(tree):
            return len(tree)
        tokens = 1 + np.concatenate([[0], np.cumsum(tree.chances)])
        costs = self.of(threads * (1 + np.arange(len(tokens))))
        costs[1:] += self.level * np.maximum.accumulate(tree.depths + 1)
        return int(np.argmax(tokens / costs))


@dataclass(slots=True)
class Scheduler:
    """Args:
    budget: rows of the forest to fill with draft nodes after every thread has its root.
    max_threads: most threads of one request in a step; the others wait.
    context_length: no draft node may stand at or beyond this path position.
    cost: what a step costs; None drafts all that the budget has room for.
    """

    ledger: SlotLedger
    draft_tree: DraftTree
    budget: int
    max_threads: int | None = None
    context_length: int | None = None
    cost: StepCost | None = None
    _paying: dict[int, int] = field(default_factory=dict)  # threads of a forest -> nodes of each that pay

    def plan(self, requests: Sequence[Request], guess: Guess) -> list[tuple[Request, list[Stem]]]:
        """Stems for the next forest, for each request that runs, ancestors first.

        `guess(thread)` gives the tokens of the draft tree's first nodes, or None where nothing was drafted.
        """
        chosen: dict[Thread, Request] = {}
        for request in requests:
            self._choose(request, requests, chosen)
        if not chosen:
            raise MemoryError(
                f"The KV pool's {self.ledger.pool.max_slots} slots are too few to go on with any thread; "
                "give `pool_slots` more room or lower `max_new_tokens`."
            )
        nodes = self._nodes_each(chosen, guess)
        return [(request, stems) for request in requests if (stems := self._stems(request, chosen, nodes, guess))]

    def most_nodes(self, requests: Sequence[Request], drafting: int) -> int:
        """Draft nodes that each of `drafting` threads can expect of the next plan; deeper guesses would be in vain."""
        limit = math.inf if self.max_threads is None else self.max_threads
        running = int(sum(min(len(list(request.tree.live_in_reading_order())), limit) for request in requests))
        room = max(self.budget - running, 0)
        return min(room // max(min(drafting, running), 1), self._nodes_that_pay(running))

    def _nodes_that_pay(self, threads: int) -> int:
        if self.cost is None:
            return len(self.draft_tree)
        if threads not in self._paying:
            self._paying[threads] = self.cost.nodes(threads, self.draft_tree)
        return self._paying[threads]

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

    def _nodes_each(self, chosen: dict[Thread, Request], guess: Guess) -> int:
        """Draft nodes per thread that has guesses, from what the budget and the pool leave."""
        drafting = sum(guess(thread) is not None for thread in chosen)
        if not drafting:
            return 0
        room = self.budget - len(chosen)
        if self.ledger.pool.available is not None:
            room = min(room, self.ledger.pool.available - sum(self._to_feed(list(chosen)).values()))
        return min(max(room, 0) // drafting, self._nodes_that_pay(len(chosen)))

    def _stems(self, request: Request, chosen: dict[Thread, Request], nodes: int, guess: Guess) -> list[Stem]:
        mine = [thread for thread in chosen if chosen[thread] is request]
        fed = self._to_feed(mine)
        return [
            self._verified(thread, nodes, guess)
            if thread in chosen
            else Stem(thread, self.ledger.cached(thread) + fed[thread], verified=False)
            for thread in request.tree.depth_first()
            if thread in fed
        ]

    def _verified(self, thread: Thread, nodes: int, guess: Guess) -> Stem:
        guessed = guess(thread)
        tree = self.draft_tree
        beyond = self.context_length is not None and thread.end + tree.num_heads > self.context_length
        if not guessed or not nodes or beyond:
            return Stem(thread, len(thread.tokens))
        return Stem(thread, len(thread.tokens), draft_tree=tree, draft_tokens=guessed[:nodes])
