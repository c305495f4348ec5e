"""What an engine counts of its steps, and how it stands between two of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from medusa_apar.drafting.advance import Advance
from medusa_apar.drafting.speculator import Speculator
from medusa_apar.forest.forest import Forest
from medusa_apar.kv.slot_ledger import SlotLedger
from medusa_apar.threads.request import Request

from .plan import Plan
from .scheduler import Scheduler
from .stats import PhaseTimer, Stats


@dataclass(frozen=True, slots=True)
class Counting:
    """Keeps an engine's `stats` up to date with what it is made of."""

    stats: Stats
    ledger: SlotLedger
    scheduler: Scheduler
    speculator: Speculator

    def record_written_tokens(self, advances: list[Advance], forks: int) -> None:
        """What a verified segment has brought its thread and the children that began with it, read or not."""
        self.stats.forks += forks
        self.stats.accepted_lengths.update(advance.gained for advance in advances)
        for advance in advances:
            self.stats.written_tokens += advance.gained
            advance.request.stats.written_tokens += advance.gained

    def record_generated_tokens(self, request: Request, before: int) -> None:
        """A step of a request whose text had `before` tokens: what can be read now, and when the first token could."""
        self.stats.generated_tokens += len(request.text) - before
        request.stats.steps += 1
        if before == 0 < len(request.text):
            request.stats.first_token = time.perf_counter() - request.added

    def record_queue_times(self, plan: Plan) -> None:
        """How long those have waited whose first step this is."""
        for request in plan.requests:
            if request.stats.queued is None:
                request.stats.queued = time.perf_counter() - request.added

    def record_iteration(self, plan: Plan, forest: Forest, phase: PhaseTimer, advances: Sequence[Advance]) -> None:
        stats = self.stats
        stats.count_iteration(plan.prefill_rows + sum(advance.gained for advance in advances))
        stats.steps += 1
        stats.forward_tokens += len(forest)
        stats.undrafted_steps = self.speculator.undrafted_steps
        stats.preemptions, stats.thread_preemptions = self.scheduler.preemptions, self.scheduler.thread_preemptions
        stats.peak_threads = max(stats.peak_threads, len(forest.verified))
        stats.peak_slots = self.ledger.pool.peak
        stats.prefix_cache_queries = self.scheduler.prefix_cache_queries
        stats.prefix_cache_hits = self.scheduler.prefix_cache_hits
        self.record_slot_usage()
        if plan.prefill_rows:
            stats.prefill_seconds += phase.total
        else:
            stats.decode_seconds += phase.total

    def record_slot_usage(self) -> None:
        stats, pool = self.stats, self.ledger.pool
        stats.live_slots, stats.cached_slots = pool.live, pool.cached
        stats.free_slots = (pool.capacity if pool.max_slots is None else pool.max_slots) - pool.in_use

    def snapshot(self, places: float) -> Stats:
        """Counts so far, and how the engine stands, which would take so many requests more; a copy."""
        self.record_slot_usage()
        running = self.scheduler.running
        return replace(
            self.stats.copy(),
            running=len(running),
            waiting=self.scheduler.num_waiting,
            places=places,
            threads=sum(len(request.live) for request in running),
            unread_tokens=sum(request.stats.written_tokens - len(request.text) for request in running),
            unfreed_slots=sum(map(self._unfreed, running)),
        )

    def _unfreed(self, request: Request) -> int:
        """Slots that a request would hold now if its threads' had stayed after their ends; a last token has none."""
        cached = self.ledger.cached
        return sum(len(each.tokens) - 1 if each.ended else cached(each) for each in request.tree.threads)
