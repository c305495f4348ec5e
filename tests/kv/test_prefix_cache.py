"""Paths that stay in the pool: what is found is what was left, to the token, and no slot is lost or given twice."""

import os
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from medusa_apar.kv import prefix_cache, slot_ledger
from medusa_apar.kv.pool import KVPool
from medusa_apar.kv.prefix_cache import PrefixCache
from medusa_apar.kv.slot_ledger import SlotLedger
from medusa_apar.threads.paragraph_tree import ParagraphTree
from tests.support.random_requests import Evicting

SALTS = st.sampled_from(["", "a"])
PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=9)  # of so few tokens that many begin alike


def common(first, second) -> int:
    return len(os.path.commonprefix([list(first), list(second)]))


class Paths(RuleBasedStateMachine):
    """Owners take what is found of their path, write the rest, leave it to the cache at any time, and go."""

    @initialize(limit=st.none() | st.integers(12, 40), at_once=st.sampled_from([1, 64]))
    def begin(self, limit, at_once):
        self.patch = patch.object(prefix_cache, "_AT_ONCE", at_once)
        self.patch.start()
        self.pool = KVPool(limit, first=16)
        self.cache = PrefixCache(self.pool)
        self.written = {}  # slot -> salt and path up to its token
        self.booked = []  # salt, tokens, slots of each owner
        self.left = set()  # salt and path that must be found, as nothing was evicted since

    def teardown(self):
        if hasattr(self, "patch"):
            self.patch.stop()
            for *_, slots in self.booked:
                self.cache.unbook(slots)
            self.cache.clear()
            assert self.pool.in_use == self.pool.cached == 0

    @rule(salt=SALTS, tokens=PATHS, most=st.integers(0, 9))
    def join(self, salt, tokens, most):
        """most: how much of what is found is taken, as one would do who needs the rows behind."""
        found = self.cache.find(salt, tokens)[:most]
        idle, available = self.cache.num_idle(found), self.pool.available
        count = len(tokens) - len(found)
        if available is not None and count + idle > available:
            return
        self.cache.book(found)
        assert available is None or self.pool.available == available - idle
        if self.pool.max_slots is not None and (missing := self.pool.in_use + count - self.pool.max_slots) > 0:
            before = self.pool.in_use
            self.cache.evict(missing)
            assert before - self.pool.in_use >= missing
            self.left.clear()
        slots = self.pool.allocate(np.arange(len(found), len(tokens)), [(len(self.booked), count)])
        self.cache.book(slots)
        for place, slot in enumerate(slots.tolist(), len(found)):
            self.written[slot] = salt, tokens[: place + 1]
        self.booked.append((salt, tokens, np.concatenate([found, slots])))

    @rule(data=st.data())
    def keep(self, data):
        if self.booked:
            salt, tokens, slots = data.draw(st.sampled_from(self.booked))
            length = data.draw(st.integers(1, len(tokens)))
            self.cache.keep(salt, tokens[:length], slots[:length])
            self.left.add((salt, tuple(tokens[:length])))

    @rule(data=st.data())
    def leave(self, data):
        if self.booked:
            *_, slots = self.booked.pop(data.draw(st.integers(0, len(self.booked) - 1)))
            self.cache.unbook(slots)

    @rule(count=st.integers(0, 12))
    def evict(self, count):
        before, cached = self.pool.in_use, self.pool.cached
        self.cache.evict(count)
        assert before - self.pool.in_use >= min(count, cached)
        self.left.clear()

    @rule()
    def clear(self):
        self.cache.clear()
        assert self.pool.cached == 0
        self.left.clear()

    @rule(salt=SALTS, tokens=PATHS)
    def found(self, salt, tokens):
        slots = self.cache.find(salt, tokens).tolist()
        assert [self.written[slot] for slot in slots] == [(salt, tokens[: n + 1]) for n in range(len(slots))]
        longest = max((common(tokens, path) for its, path in self.left if its == salt), default=0)
        assert len(slots) >= longest

    @invariant()
    def adds_up(self):
        if hasattr(self, "cache"):
            self.cache.check([slot for *_, slots in self.booked for slot in slots.tolist()])


Paths.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPaths = Paths.TestCase


def kept(*paths, limit=100):
    """A cache with these paths, none of which anybody needs."""
    cache = PrefixCache(KVPool(limit))
    for path in paths:
        found = cache.find("", path)
        new = cache._pool.allocate(np.arange(len(found), len(path)))
        for slots in (found, new):
            cache.book(slots)
        cache.keep("", path, np.concatenate([found, new]))
        cache.unbook(np.concatenate([found, new]))
        cache._pool.disown(None)
    return cache


@pytest.fixture
def one_by_one(monkeypatch):
    monkeypatch.setattr(prefix_cache, "_AT_ONCE", 1)


def test_the_least_recently_used_end_of_a_path_goes_first(one_by_one):
    cache = kept([1, 2, 3, 4], [1, 2, 7, 8], [5, 6])
    cache.keep("", [1, 2, 3], cache.find("", [1, 2, 3]))  # now the last that was used; what follows it was not
    for count, lengths in ((1, (3, 4, 2)), (2, (3, 2, 2)), (2, (3, 2, 0)), (1, (2, 2, 0)), (2, (0, 0, 0))):
        cache.evict(count)
        assert tuple(len(cache.find("", path)) for path in ([1, 2, 3, 4], [1, 2, 7, 8], [5, 6])) == lengths
        cache.check([])


def test_a_path_in_use_stays_and_gives_way_only_where_it_was_computed_twice(one_by_one):
    cache = kept([1, 2, 3], [4, 5])
    live = cache.find("", [1, 2])
    cache.book(live)
    cache.evict(3)
    assert cache.find("", [1, 2, 3]).tolist() == live.tolist() and not len(cache.find("", [4]))
    # The same beginning once more, in slots of its own, and what follows it: nobody has booked the kept beginning.
    again = cache._pool.allocate(np.arange(4))
    cache.book(again)
    cache.keep("", [1, 2, 8, 9], again)
    cache.unbook(live)
    assert cache._pool.cached == 2 and len(cache.find("", [1, 2, 8, 9])) == 4
    cache.evict(2)
    assert cache._pool.cached == 0 and cache._pool.in_use == 4
    cache.check(again.tolist())
    cache.keep("", [1, 2, 8, 9], again)
    cache.unbook(again)
    assert cache._pool.cached == 4


def test_what_is_evicted_together_lies_together():
    cache = kept(list(range(200)), limit=200)
    cache.evict(1)
    pool = cache._pool
    free = sorted(set(range(200)) - set(pool.used.tolist()))
    assert free == list(range(free[0], free[0] + 64))
    assert pool.allocate(np.arange(9), [("a", 9)]).tolist() == free[:9]


def test_salts_share_nothing_and_leave_nothing_behind():
    cache = PrefixCache(KVPool(1000))
    for n in range(100):
        slots = cache._pool.allocate(np.arange(5))
        cache.book(slots)
        cache.keep(str(n), [1, 2, 3, 4, 5], slots)
        cache.unbook(slots)
        assert cache.find(str(n), [1, 2, 3, 9]).tolist() == slots[:3].tolist() and not len(cache.find("x", [1, 2, 3]))
    cache.evict(500)
    assert not cache._root.children and not cache._num_nodes and cache._pool.in_use == 0


def test_a_slot_that_several_have_booked_is_given_up_by_none_of_them_alone():
    ledger = SlotLedger(KVPool(64), prefix_cache=True)
    first, second = (ParagraphTree([*range(10), *tail]).trunk for tail in ([20, 21, 22], [30, 31, 32, 33]))
    for trunk in (first, second):
        ledger.share(trunk, "")
        for member, slots in ledger.found(trunk):
            ledger.assign(member, slots)
        left = len(trunk.tokens) - ledger.cached(trunk)
        ledger.assign(trunk, ledger.allocate(np.arange(left), [(trunk, left)]))
        ledger.keep(trunk)
    assert [ledger.num_booked_by(its) for its in ([first], [second], [first, second], [])] == [3, 4, 17, 0]


def test_a_pool_that_may_grow_does_so_for_what_is_cached_to_a_fair_size(monkeypatch):
    ledger = SlotLedger(KVPool(first=64), prefix_cache=True)
    for n in range(50):
        trunk = ParagraphTree([n] * 30).trunk
        ledger.share(trunk, "")
        ledger.assign(trunk, ledger.allocate(np.arange(30), [(trunk, 30)]))
        trunk.finish_reason = "stop"
        ledger.free_unneeded(trunk)
        ledger.leave(trunk)
        ledger.check()
        assert ledger.pool.cached >= 30
        if n == 20:
            assert ledger.pool.cached == 21 * 30
            monkeypatch.setattr(slot_ledger, "_ROOM", size := ledger.pool.capacity)
    assert ledger.pool.capacity == size and size // 2 < ledger.pool.cached <= 0.75 * size and ledger.pool.peak == 30
    large = ParagraphTree([7] * 2 * size).trunk
    ledger.assign(large, ledger.allocate(np.arange(2 * size), [(large, 2 * size)]))
    assert ledger.pool.capacity >= 2 * size


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_threads_find_their_own_paths_again_through_any_history(data):
    """Whatever is evicted: a slot on a path holds the token that stands there, written behind the very same path."""
    written = {}
    script = Evicting(data, SlotLedger(KVPool(), prefix_cache=True), steps=7)

    def path_of(thread):
        return thread.ancestor_ids() + thread.tokens

    def after_step(forest, trees):
        with patch.object(prefix_cache, "_AT_ONCE", 1):
            script.ledger._cache.evict(data.draw(st.integers(0, 6)))
        for segment in forest.segments:
            path, extend = path_of(segment.thread), segment.slots[: len(segment.extend_tokens)].tolist()
            written.update((slot, path[: place + 1]) for place, slot in enumerate(extend, segment.cached))
            for slot in segment.drafted_slots.tolist():  # known once it is accepted
                written.pop(slot, None)
        for segment in forest.segments:
            path = path_of(segment.thread)
            for place, slot in enumerate(segment.path_slots.tolist()):
                assert written.setdefault(slot, path[: place + 1]) == path[: place + 1]

    trees = script.run(after_step)
    for tree in trees:
        for thread in tree.threads:
            thread.finish_reason = thread.finish_reason or "cancelled"
        script.ledger.free_unneeded(*tree.threads)
        script.ledger.leave(tree.trunk)
        script.ledger.check()
    assert script.ledger.pool.live == 0 and not script.ledger._salts
    script.ledger.reset_prefix_cache()
    assert script.ledger.pool.in_use == 0
