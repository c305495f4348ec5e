"""Which slot holds which token, and for how long: a slot returns as soon as no live thread's path needs it."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from medusa_apar.threads.paragraph_tree import Thread

from .path_table import PathTable
from .pool import KVPool

_NONE = array("q")


class SlotLedger:
    """Books the pool's slots to threads.

    A thread owns slots for a prefix of its tokens. A live thread needs its own slots and, of every ancestor, those up
    to its fork; nobody else needs anything. A fork therefore books nothing and an accept only moves entries here.

    An evicted thread has lent its claim back under memory pressure: it is live but needs nothing until it resumes,
    when whatever is gone is fed again.
    """

    def __init__(self, pool: KVPool):
        self.pool = pool
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

    def assign(self, thread: Thread, slots: np.ndarray | list[int]) -> None:
        """The thread's next tokens lie in these slots."""
        booked = self._slots.setdefault(thread, array("q"))
        booked.extend(slots.tolist() if isinstance(slots, np.ndarray) else slots)

    def commit(self, drafted: list[int], accepted: Sequence[tuple[Thread, list[int]]], ended: Iterable[Thread]) -> None:
        """Books a segment's accepted draft nodes, frees the rejected ones, and what threads needed that have ended.

        drafted: the slots of all its draft nodes. accepted: threads with the slots of their next tokens, among these.
        """
        rejected = set(drafted)
        for thread, slots in accepted:
            self.assign(thread, slots)
            rejected.difference_update(slots)
        self.pool.release(rejected)
        for thread in ended:
            self.free_unneeded(thread)

    def free_unneeded(self, thread: Thread) -> int:
        """Returns what nobody needs any more of the thread and its ancestors; call when it ended. Counts the slots."""
        released = 0
        if thread.ended:
            self._evicted.discard(thread)
        member: Thread | None = thread
        while member is not None:
            released += self._shrink(member, self._needed(member))
            member = member.parent
        return released

    def evict(self, thread: Thread) -> int:
        """Takes back all slots that only this live thread needs and counts them."""
        self._evicted.add(thread)
        return self.free_unneeded(thread)

    def resume(self, thread: Thread) -> None:
        self._evicted.discard(thread)

    def claims(self, thread: Thread) -> bool:
        return thread.live and thread not in self._evicted

    def _needed(self, thread: Thread) -> int:
        if self.claims(thread):
            return self.cached(thread)
        return max((child.seen for child in thread.children if self._claimed_below(child)), default=0)

    def _claimed_below(self, thread: Thread) -> bool:
        return self.claims(thread) or any(self._claimed_below(child) for child in thread.children)

    def _shrink(self, thread: Thread, length: int) -> int:
        slots = self._slots.get(thread, _NONE)
        gone = slots[length:]
        del slots[length:]
        if self._table is not None:
            self._table.truncate(thread)
        self.pool.release(gone)
        if not slots:
            self._slots.pop(thread, None)
        return len(gone)

    def truncate(self, thread: Thread, length: int) -> None:
        """Unbooks what a thread's tokens from `length` on hold: as if they had not been fed."""
        self._shrink(thread, length)

    def check(self) -> None:
        """Asserts that every used slot is booked exactly once, to a thread some claiming thread needs it of."""
        booked = [slot for slots in self._slots.values() for slot in slots]
        assert len(booked) == len(set(booked)) == self.pool.in_use, "a slot is leaked or booked twice"
        for thread, slots in self._slots.items():
            assert len(slots) <= self._needed(thread), f"{thread} holds slots that no live path needs"
        if self._table is not None:
            self._table.check(self.claims)
