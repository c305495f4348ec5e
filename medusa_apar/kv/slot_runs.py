"""Which free slots an owner is given: those behind its own, so that its slots lie in few runs.

A request's slots are read in every layer of every step. In one run they are a view of the pool; scattered among those
of other requests they have to be gathered.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

import numpy as np

_SHORT = 16  # a pool that may grow does so before it begins runs in gaps that are all shorter


@dataclass(slots=True, eq=False)
class _Owner:
    key: Hashable
    number: int  # what its slots have in `SlotRuns._holders`
    held: int = 0
    # The run that it writes; it has none before its first slot.
    first: int = 0
    place: int | None = None  # its lowest slot that may be free


@dataclass(slots=True, eq=False)
class Want:
    """Slots that an owner is to have, and those that it has been given."""

    owner: _Owner
    count: int
    slots: list[int]

    @property
    def missing(self) -> int:
        return self.count - len(self.slots)


@dataclass(slots=True, eq=False)
class _Gap:
    """Free slots side by side, and the runs that begin there."""

    start: int
    spare: int  # slots that nobody takes now
    grown_into: bool  # whether the owner of the slot before goes on here
    parts: list[tuple[Want, int, bool]] = field(default_factory=list)  # how many slots, and whether those are the last

    @property
    def room(self) -> float:
        """What one more owner could go on in, as far as the others."""
        return self.spare / (1 + len(self.parts) + self.grown_into)


class SlotRuns:
    """The holder of every slot.

    An owner goes on behind its own slots while those are free, filling first what it has given back. Where another
    owner's slots begin, it starts a run in the widest gap, at a distance from whoever goes on into that gap. Nothing is
    kept for anybody: every free slot can be had by every owner.
    """

    def __init__(self) -> None:
        self.held = 0
        self._holders = array("i")  # of each slot its owner's number, 0: free
        self._owners: dict[Hashable, _Owner] = {}
        self._numbered: dict[int, _Owner] = {}
        self._next_number = 1

    @property
    def slots(self) -> np.ndarray:
        """The slots that are held, int64, ascending."""
        return np.flatnonzero(np.frombuffer(self._holders, dtype=np.int32))

    def grow(self, capacity: int) -> None:
        self._holders.extend([0] * (capacity - len(self._holders)))

    def wants(self, owners: Iterable[tuple[Hashable, int]]) -> list[Want]:
        """What owners are to have: so many slots each. `go_on`, and then `begin`, give them."""
        return [Want(self._owner(key), count, []) for key, count in owners]

    def go_on(self, wants: Iterable[Want]) -> list[Want]:
        """Gives each owner what it can have where it writes; returns those of which something is missing still."""
        short = []
        for want in wants:
            self._go_on(want)
            if want.missing:
                short.append(want)
        return short

    def crowded(self, missing: int) -> bool:
        """Whether so many slots are not free, or little is free and all of it in short gaps."""
        capacity = len(self._holders)
        if missing > capacity - self.held:
            return True
        return 4 * (self.held + missing) > 3 * capacity and int(self._gaps()[1].max()) < _SHORT

    def begin(self, wants: list[Want]) -> None:
        """Gives what is still missing, in new runs; so many slots have to be free."""
        missing = sum(want.missing for want in wants)
        starts, lengths = self._gaps()
        if len(lengths) > missing:  # each gap that is used gives a slot or more
            widest = np.argpartition(lengths, -missing)[-missing:]
            starts, lengths = starts[widest], lengths[widest]
        gaps = [_Gap(*each, self._goes_on_to(each[0])) for each in zip(starts.tolist(), lengths.tolist(), strict=True)]
        heap = [(-gap.room, gap.start, gap) for gap in gaps]
        heapq.heapify(heap)
        for want in wants:
            missing = want.missing
            while missing:
                gap = heapq.heappop(heap)[2]
                count = min(missing, gap.spare)
                gap.spare -= count
                missing -= count
                gap.parts.append((want, count, not missing))
                if gap.spare:
                    heapq.heappush(heap, (-gap.room, gap.start, gap))
        for gap in gaps:
            self._lay_out(gap)

    def release(self, slots: Iterable[int]) -> None:
        holders = self._holders
        for slot in slots:
            number = holders[slot]
            if not number:
                raise KeyError(slot)
            owner = self._numbered[number]
            holders[slot] = 0
            self.held -= 1
            owner.held -= 1
            if owner.place is not None and owner.first <= slot < owner.place:
                owner.place = slot
            if not owner.held:
                del self._numbered[number]
                if self._owners.get(owner.key) is owner:
                    del self._owners[owner.key]

    def disown(self, key: Hashable) -> None:
        """The owner will not go on: what it still holds is nobody's, until it is released."""
        owner = self._owners.pop(key, None)
        if owner is not None:
            owner.key, owner.first, owner.place = None, len(self._holders), None

    def _owner(self, key: Hashable) -> _Owner:
        owner = self._owners.get(key)
        if owner is None:
            owner = self._owners[key] = self._numbered[self._next_number] = _Owner(key, self._next_number)
            self._next_number += 1
        return owner

    def _go_on(self, want: Want) -> None:
        owner, slots, place, missing = want.owner, want.slots, want.owner.place, want.missing
        if place is None:
            return
        holders, number, end, before = self._holders, owner.number, len(self._holders), len(slots)
        while missing and place < end:
            if not holders[place]:
                holders[place] = number
                slots.append(place)
                missing -= 1
            elif holders[place] != number:
                break
            place += 1
        owner.place = place
        owner.held += len(slots) - before
        self.held += len(slots) - before

    def _gaps(self) -> tuple[np.ndarray, np.ndarray]:
        """Where free slots side by side begin, and how many they are."""
        free = np.frombuffer(self._holders, dtype=np.int32) == 0
        edges = np.flatnonzero(np.diff(free, prepend=False, append=False))
        return edges[::2], edges[1::2] - edges[::2]

    def _goes_on_to(self, slot: int) -> bool:
        """Whether whoever holds the slot before writes the run that it lies in."""
        return slot > 0 and self._numbered[self._holders[slot - 1]].first < slot

    def _lay_out(self, gap: _Gap) -> None:
        """The runs that begin in a gap lie equally far from each other."""
        if not gap.parts:
            return
        between = gap.spare // (len(gap.parts) + gap.grown_into)
        place = gap.start + between * gap.grown_into
        for want, count, last in gap.parts:
            owner, end = want.owner, place + count
            self._holders[place:end] = array("i", [owner.number]) * count
            want.slots += range(place, end)
            owner.held += count
            self.held += count
            if last:
                owner.first, owner.place = place, end
            place = end + between
