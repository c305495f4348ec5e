"""Which slot holds which token, and for how long: a slot returns as soon as no live thread's path needs it.

Where there is a prefix cache, paths go there instead, and return when slots are needed.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from medusa_apar.threads.paragraph_tree import Thread

from .path_table import PathTable
from .pool import KVPool
from .prefix_cache import PrefixCache

_NONE = array("q")
# A pool that may grow does so for what is cached up to so many slots: 100 MB of a small model in int8, ten short chats.
_ROOM = 4096
_FULL = 0.75  # of its slots, as many as can be in use before it grows (`SlotRuns.crowded`)


class SlotLedger:
    """Books the pool's slots to threads.

    A thread owns slots for a prefix of its tokens. A live thread needs its own slots and, of every ancestor, those up
    to its fork; nobody else needs anything. A fork therefore books nothing and an accept only moves entries here.

    An evicted thread has lent its claim back under memory pressure: it is live but needs nothing until it resumes,
    when whatever is gone is fed again.

    With a prefix cache the paths of requests that `share` theirs stay in the pool after that, and threads of several
    requests may have booked the same slot. Cached slots count as free wherever it is asked whether something fits. They
    are evicted when slots are allocated, as many as are missing; where the pool may grow, once it is of a fair size.
    """

    def __init__(self, pool: KVPool, prefix_cache: bool = False):
        self.pool = pool
        self._cache = PrefixCache(pool) if prefix_cache else None
        self._salts: dict[Thread, str] = {}  # of trunks whose paths are shared
        self._slots: dict[Thread, array[int]] = {}  # arrays, which numpy reads as they are
        self._evicted: set[Thread] = set()
        self._table: PathTable | None = None

    @property
    def table(self) -> PathTable:
        """Where paths lie on the device; kept from when it is first asked for."""
        if self._table is None:
            self._table = PathTable(self._slots, self.pool.storage)
        return self._table

    def cached(self, thread: Thread) -> int:
        """How many of the thread's own tokens have a slot."""
        return len(self._slots.get(thread, ()))

    def path_slots(self, thread: Thread) -> np.ndarray:
        """Slots of everything cached on the path, int64; its length is the path position of the next uncached token."""
        ancestors = thread.ancestors()
        parts = [self._slots.get(ancestor, _NONE)[:stop] for ancestor, stop in ancestors]
        assert all(len(part) == stop for part, (_, stop) in zip(parts, ancestors, strict=True))
        return np.concatenate([np.array(part) for part in (*parts, self._slots.get(thread, _NONE))])

    def missing(self, thread: Thread, stop: int | None = None) -> list[tuple[Thread, int]]:
        """(thread, how far to feed it) down the lineage wherever tokens on the path have no slot."""
        stop = len(thread.tokens) if stop is None else stop
        lineage = [*thread.ancestors(), (thread, stop)]
        return [(member, until) for member, until in lineage if self.cached(member) < until]

    def allocate(self, positions: np.ndarray, owners: Iterable[tuple[Hashable, int]]) -> np.ndarray:
        """As `KVPool.allocate`; what is missing is evicted from the prefix cache."""
        pool, count = self.pool, len(positions)
        if self._cache is not None:
            full = pool.max_slots or int(_FULL * max(pool.capacity, _ROOM))
            for room in (full, pool.capacity):  # beyond both it has to grow, whatever is cached
                if pool.live + count <= room:
                    self._cache.evict(pool.in_use + count - room)
                    break
        return pool.allocate(positions, owners)

    def assign(self, thread: Thread, slots: Sequence[int] | np.ndarray) -> None:
        """The thread's next tokens lie in these slots."""
        booked = self._slots.setdefault(thread, array("q"))
        booked.extend(slots.tolist() if isinstance(slots, np.ndarray) else slots)
        if self._cache is not None:
            self._cache.book(slots)

    def commit(self, drafted: list[int], accepted: Sequence[tuple[Thread, list[int]]], ended: Iterable[Thread]) -> None:
        """Books a segment's accepted draft nodes, frees the rejected ones, and what threads needed that have ended.

        drafted: the slots of all its draft nodes. accepted: threads with the slots of their next tokens, among these.
        """
        rejected = set(drafted)
        for thread, slots in accepted:
            self.assign(thread, slots)
            rejected.difference_update(slots)
        self.pool.release(rejected)
        self.free_unneeded(*ended)

    def free_unneeded(self, *threads: Thread) -> int:
        """Returns what nobody needs any more of these threads and their ancestors. Counts the slots.

        Call it for all threads that have ended at once, together: what one leaves may be another's path.
        """
        for thread in threads:
            if thread.ended:
                self._evicted.discard(thread)
            if not self.claims(thread):
                self.keep(thread)
        return sum(map(self._free, threads))

    def evict(self, thread: Thread) -> int:
        """Takes back all slots that only this live thread needs and counts them."""
        self._evicted.add(thread)
        return self.free_unneeded(thread)

    def resume(self, thread: Thread) -> None:
        self._evicted.discard(thread)

    def claims(self, thread: Thread) -> bool:
        return thread.live and thread not in self._evicted

    # ---- the prefix cache

    def share(self, trunk: Thread, salt: str) -> None:
        """Paths of this trunk's request are found by all that share theirs under the same salt, and the other way."""
        if self._cache is not None:
            self._salts[trunk] = salt

    def leave(self, trunk: Thread) -> None:
        """The trunk's request has ended, and all of its threads."""
        self._salts.pop(trunk, None)
        self.pool.disown(trunk)

    @property
    def shares(self) -> bool:
        """Whether there is a prefix cache."""
        return self._cache is not None

    def salt(self, trunk: Thread) -> str | None:
        """The salt under which the trunk's paths are shared; None: they are not."""
        return self._salts.get(trunk)

    def found(self, thread: Thread, most: int | None = None) -> list[tuple[Thread, np.ndarray]]:
        """What the prefix cache has of tokens on the path that have no slot: (thread or ancestor, slots of its next
        tokens), ancestors first. `assign` books them.

        A live thread's last token is not looked for: it is fed, as the model is asked what follows.

        most: how many of the thread's own tokens may be had so.
        """
        if self._cache is None or (salt := self._salts.get(thread.trunk)) is None:
            return []
        lineage = [*thread.ancestors(), (thread, len(thread.tokens) if most is None else most)]
        tokens: list[int] = []
        stops: list[int] = []
        for member, stop in lineage:
            stops.append(min(stop, len(member.tokens) - member.live))
            tokens += member.tokens[: stops[-1]]
            if stops[-1] < stop:
                break
        members = [member for member, _ in lineage[: len(stops)]]
        if all(self.cached(member) >= stop for member, stop in zip(members, stops, strict=True)):
            return []
        slots = self._cache.find(salt, tokens)
        found: list[tuple[Thread, np.ndarray]] = []
        for member, stop in zip(members, stops, strict=True):
            own, slots = slots[:stop], slots[stop:]
            if len(own) > self.cached(member):
                found.append((member, own[self.cached(member) :]))
            if len(own) < stop:
                break
        return found

    def num_idle(self, found: Iterable[tuple[Thread, np.ndarray]]) -> int:
        """How many of the slots that were `found` no live thread needs so far."""
        return 0 if self._cache is None else sum(self._cache.num_idle(slots) for _, slots in found)

    def num_booked_by(self, threads: Iterable[Thread]) -> int:
        """How many slots nobody would need if none of these threads needed its own."""
        if self._cache is None:
            return sum(map(self.cached, threads))
        slots = [np.array(self._slots[thread]) for thread in threads if thread in self._slots]
        return self._cache.num_idle_without(np.concatenate(slots)) if slots else 0

    def keep(self, thread: Thread) -> None:
        """Puts into the prefix cache what is booked of a thread's path and has been computed."""
        salt = self._salts.get(thread.trunk)
        if self._cache is None or salt is None or not self.cached(thread):
            return
        tokens = thread.ancestor_ids() + thread.tokens[: self.cached(thread)]
        self._cache.keep(salt, tokens, self.path_slots(thread))

    def reset_prefix_cache(self) -> None:
        """Nothing is kept any more; what live threads need stays."""
        if self._cache is not None:
            self._cache.clear()

    def let_go(self) -> None:
        """Gives up what lies in the slots; who has booked them stays known."""
        self._table = None
        self.pool.let_go()

    def stop_sharing(self) -> None:
        """Nothing is kept any more, and nothing will be of those that share their paths now."""
        self._salts.clear()
        self.reset_prefix_cache()

    # ---- what stays

    def _needed(self, thread: Thread) -> int:
        if self.claims(thread):
            return self.cached(thread)
        return max((child.seen for child in thread.children if self._claimed_below(child)), default=0)

    def _claimed_below(self, thread: Thread) -> bool:
        return self.claims(thread) or any(self._claimed_below(child) for child in thread.children)

    def _free(self, thread: Thread) -> int:
        released = 0
        member: Thread | None = thread
        while member is not None:
            released += self._shrink(member, self._needed(member))
            member = member.parent
        return released

    def _shrink(self, thread: Thread, length: int) -> int:
        slots = self._slots.get(thread, _NONE)
        gone = slots[length:]
        del slots[length:]
        if self._table is not None:
            self._table.truncate(thread)
        if self._cache is None:
            self.pool.release(gone)
        elif gone:
            self._cache.unbook(gone)
        if not slots:
            self._slots.pop(thread, None)
        return len(gone)

    def truncate(self, thread: Thread, length: int) -> None:
        """Unbooks what a thread's tokens from `length` on hold: as if they had not been fed."""
        self._shrink(thread, length)

    def check(self) -> None:
        """Asserts that every used slot is booked to a thread some claiming thread needs it of, once where there is no
        prefix cache, or cached: free + live + cached == total."""
        booked = [slot for slots in self._slots.values() for slot in slots]
        if self._cache is None:
            assert len(booked) == len(set(booked)) == self.pool.in_use, "a slot is leaked or booked twice"
        else:
            assert len(set(booked)) == self.pool.live, "a slot is leaked"
            self._cache.check(booked)
        for thread, slots in self._slots.items():
            assert len(slots) <= self._needed(thread), f"{thread} holds slots that no live path needs"
        if self._table is not None:
            self._table.check(self.claims)
