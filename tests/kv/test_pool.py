"""The pool hands out slots in runs, and every one of them, whatever has been given back where."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_apar.kv.pool import KVPool


def runs_of(held, owner) -> int:
    """How many stretches of the pool an owner's slots lie in, no other owner's slot between."""
    holders = {slot: each for each, slots in held.items() for slot in slots}
    return sum(each == owner for each, _ in itertools.groupby(holders[slot] for slot in sorted(holders)))


class Books:
    """What each owner holds of a pool; `check` says that it is what the pool says."""

    def __init__(self, pool):
        self.pool, self.held, self.peak = pool, {}, 0

    def take(self, *wanted):
        positions = np.arange(sum(count for _, count in wanted)) + 7
        slots = self.pool.allocate(positions, wanted)
        assert slots.dtype == np.int64 and np.array_equal(self.pool.positions[slots], positions)
        given, place = slots.tolist(), 0
        for owner, count in wanted:
            self.held.setdefault(owner, []).extend(given[place : place + count])
            place += count
        self.peak = max(self.peak, sum(map(len, self.held.values())))

    def give_back(self, owner, places):
        slots = {self.held[owner][place] for place in places}
        self.held[owner] = [slot for slot in self.held[owner] if slot not in slots]
        self.pool.release(slots)

    def check(self):
        slots = sorted(slot for held in self.held.values() for slot in held)
        assert self.pool.used.tolist() == slots and len(slots) == len(set(slots)) == self.pool.in_use
        assert not slots or (slots[0] >= 0 and slots[-1] < self.pool.capacity)
        if self.pool.max_slots is not None:
            assert self.pool.available == self.pool.max_slots - len(slots)
        assert self.pool.peak == self.peak


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_slot_is_handed_out_once_and_none_beyond_the_limit(data):
    limit = data.draw(st.none() | st.integers(1, 60))
    books = Books(KVPool(limit, first=data.draw(st.integers(1, 40))))
    owners = st.integers(0, 5)
    for _ in range(data.draw(st.integers(1, 25))):
        owner = data.draw(owners)
        if data.draw(st.booleans()) and books.held.get(owner):
            places = st.sets(st.integers(0, len(books.held[owner]) - 1))
            books.give_back(owner, data.draw(places))
            books.check()
            continue
        wanted = data.draw(st.lists(st.tuples(owners, st.integers(0, 30)), min_size=1, max_size=6))
        if limit is not None and sum(count for _, count in wanted) > books.pool.available:
            with pytest.raises(MemoryError, match=f"with {books.pool.available} left"):
                books.take(*wanted)
        else:
            books.take(*wanted)
        books.check()
    if limit is not None and books.pool.available:  # however scattered what is left lies
        books.take((9, books.pool.available))
        books.check()
    for owner in books.held:
        books.give_back(owner, range(len(books.held[owner])))
    assert books.pool.in_use == 0
    if limit is not None:
        books.take(("the next", limit))
        books.check()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_owners_that_write_side_by_side_have_few_runs(data):
    """A step takes a row and draft nodes of every owner, and gives back those that were rejected."""
    owners = range(data.draw(st.integers(1, 24)))
    prompts = [data.draw(st.integers(1, 60)) for _ in owners]
    drafted, together = data.draw(st.integers(0, 8)), data.draw(st.booleans())
    random, steps = np.random.default_rng(data.draw(st.integers(0, 99))), 60
    room = sum(prompts) + len(owners) * steps * (1 + drafted)
    limited = data.draw(st.booleans())
    books = Books(KVPool(2 * room if limited else None))
    groups = [tuple(zip(owners, prompts, strict=True))]
    for group in groups if together else zip(*groups, strict=True):
        books.take(*group)
    sizes = {books.pool.capacity}
    for _ in range(steps):
        books.take(*((owner, 1 + drafted) for owner in owners))
        sizes.add(books.pool.capacity)
        for owner in owners:
            held = len(books.held[owner])
            kept = random.integers(0, drafted + 1)
            books.give_back(owner, held - 1 - random.permutation(drafted)[kept:])
    books.check()
    runs = [runs_of(books.held, owner) for owner in owners]
    if limited:  # to twice of what is ever needed
        assert max(runs) <= 2
    else:  # one for each time that the pool has grown, and as many for being faster than the others
        assert np.mean(runs) <= 2 * len(sizes) + 2


def test_slots_given_back_are_filled_before_the_run_goes_on():
    books = Books(KVPool(max_slots=64))
    books.take(("a", 8), ("b", 8))
    before = list(books.held["a"])
    books.give_back("a", [2, 3, 6])
    books.take(("a", 4))
    assert sorted(books.held["a"]) == [*before, before[-1] + 1]


def test_an_owner_alone_goes_on_where_the_pool_has_grown():
    books = Books(KVPool(first=4))
    for count in (3, 2, 5, 40):
        books.take(("a", count))
        assert books.held["a"] == list(range(books.pool.in_use)) and books.pool.capacity <= 4 * books.pool.in_use


def test_a_pool_that_cannot_grow_is_as_it_was():
    pool = KVPool(first=4)
    pool.allocate(np.arange(3), [("a", 3)])
    pool.keys[0] = torch.zeros(1).expand(4, 1 << 20, 1 << 20)  # twice as many are 2^43 numbers
    before = pool.used.tolist()
    with pytest.raises(RuntimeError):
        pool.allocate(np.arange(2), [("a", 2)])
    assert pool.used.tolist() == before and pool.capacity == 4
    assert pool.allocate(np.arange(1), [("a", 1)]).tolist() == [3]


def test_a_pool_that_cannot_grow_hands_out_what_it_has():
    pool = KVPool(first=32)
    pool.allocate(np.arange(25), [("a", 25)])
    pool.keys[0] = torch.zeros(1).expand(32, 1 << 20, 1 << 20)
    assert sorted(pool.allocate(np.arange(7), [("b", 7)]).tolist()) == list(range(25, 32)) and pool.capacity == 32
    with pytest.raises(RuntimeError):
        pool.allocate(np.arange(1), [("b", 1)])
    assert pool.in_use == 32
