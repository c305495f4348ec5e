"""Paths that are kept when no live thread needs them any more, so that a later one finds what it begins with.

    (salt, p0) p0 .. p41 ┬ a0 .. a90      a chat's first answer, the prompt of its second turn in front
                         └ q0 .. q17      another chat with the same beginning

A radix tree over tokens: a slot holds a single token, so any common beginning is shared to the token. The keys and
values of a token depend on its path's tokens alone, which are its place in the tree. So whoever has the same path may
read them. Where a row's bits depend on nothing but the row (the CPU runtime), what it then computes is to the bit what
it would have been; elsewhere a prompt in other pieces is rounded otherwise.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from .pool import KVPool

_AT_ONCE = 64  # slots that are evicted together: side by side, a request can go on in them
_NONE = np.zeros(0, dtype=np.int64)


@dataclass(slots=True, eq=False)
class _Node:
    """Tokens behind those of its parent, and their slots; int64 [*] both. Of a leaf as many as were not evicted."""

    key: Hashable  # under which its parent has it
    tokens: np.ndarray
    slots: np.ndarray
    parent: _Node | None  # None: the root, or it is gone
    used: int = 0  # when it was last
    children: dict[Hashable, _Node] = field(default_factory=dict)  # by first token; below the root by salt, too


class PrefixCache:
    """Which slots of a pool are kept for which paths, and how many live threads have booked each slot.

    A slot is held by those who have booked it and by the tree; the pool has it back when nobody does. The tree gives up
    what nobody has booked when slots are needed (`evict`): ends of paths, the least recently used first.
    """

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self._root = _Node(None, _NONE, _NONE, None)
        self._leaves: list[tuple[int, int, _Node]] = []  # a heap: when used, number; some are leaves no more
        self._times, self._numbers = itertools.count(1), itertools.count()
        self._num_nodes = 0
        self._bookings = np.zeros(0, dtype=np.int32)  # [capacity] by how many threads
        self._kept = np.zeros(0, dtype=bool)  # [capacity] whether the tree holds it

    # ---- slots

    def book(self, slots: Sequence[int] | np.ndarray) -> None:
        """One more thread has booked these."""
        new = self._pool.capacity - len(self._kept)
        if new:
            self._bookings = np.concatenate([self._bookings, np.zeros(new, dtype=np.int32)])
            self._kept = np.concatenate([self._kept, np.zeros(new, dtype=bool)])
        taken = np.asarray(slots, dtype=np.int64)
        self._pool.cached -= int(np.count_nonzero(self._kept[taken] & (self._bookings[taken] == 0)))
        self._bookings[taken] += 1

    def unbook(self, slots: Sequence[int] | np.ndarray) -> None:
        """One thread less needs these."""
        left = np.asarray(slots, dtype=np.int64)
        self._bookings[left] -= 1
        loose = left[self._bookings[left] == 0]
        kept = self._kept[loose]
        self._pool.cached += int(np.count_nonzero(kept))
        self._pool.release(loose[~kept].tolist())

    def num_idle(self, slots: np.ndarray) -> int:
        """How many of these no thread has booked."""
        return int(np.count_nonzero(self._bookings[slots] == 0))

    def num_idle_without(self, bookings: np.ndarray) -> int:
        """How many slots no thread would have booked without these bookings, int64 [*], a slot once for each."""
        slots, counts = np.unique(bookings, return_counts=True)
        return int(np.count_nonzero(self._bookings[slots] == counts))

    # ---- paths

    def find(self, salt: str, tokens: Sequence[int]) -> np.ndarray:
        """Slots of as much of a path's beginning as is kept, int64."""
        wanted = np.array(tokens, dtype=np.int64)
        node, place, found = self._root, 0, [_NONE]
        while place < len(wanted):
            child = node.children.get(self._key(node, salt, wanted[place]))
            if child is None:
                break
            same = _common_length(child.tokens, wanted[place:])
            found.append(child.slots[:same])
            place += same
            if same < len(child.tokens):
                break
            node = child
        return np.concatenate(found)

    def keep(self, salt: str, tokens: Sequence[int], slots: np.ndarray) -> None:
        """Holds a path's slots, as far as it does not have others for these tokens, and notes that it was used now."""
        path, node, place, now = np.array(tokens, dtype=np.int64), self._root, 0, next(self._times)
        while place < len(path):
            key = self._key(node, salt, path[place])
            child = node.children.get(key)
            if child is None:
                node = self._go_on(node, key, path[place:].copy(), slots[place:])
                node.used = now
                break
            same = _common_length(child.tokens, path[place:])
            node = child if same == len(child.tokens) else self._split(child, same)
            node.used = now
            place += same
        if node is not self._root and not node.children:
            self._note_leaf(node)

    def evict(self, count: int) -> None:
        """Gives the pool at least so many slots that no thread has booked, as far as there are any."""
        need = min(count, self._pool.cached)
        if need <= 0:
            return
        aim, freed = min(max(need, _AT_ONCE), self._pool.cached), 0
        busy: list[_Node] = []  # leaves whose last token is booked
        while freed < aim:
            leaf = self._least_recent()
            if leaf is not None:
                idle = self._bookings[leaf.slots] == 0
                last = len(idle) if idle.all() else int(idle[::-1].argmin())
                if last:
                    freed += self._cut(leaf, min(last, aim - freed))
                else:
                    busy.append(leaf)
            elif freed >= need:
                break
            else:  # a live path that was computed twice, below one that nobody has booked: it is kept no longer
                leaf = busy.pop(0)
                freed += self._cut(leaf, len(leaf.slots))
        for leaf in busy:
            self._note_leaf(leaf)

    def clear(self) -> None:
        """Keeps nothing any more; booked slots stay booked."""
        for node in list(self._nodes()):
            self._drop(node.slots)
            node.parent = None
        self._root.children.clear()
        self._leaves.clear()
        self._num_nodes = 0

    def check(self, booked: Iterable[int]) -> None:
        """Asserts that it knows what threads have booked, slot by slot, and that no slot is kept twice or too long."""
        nodes = list(self._nodes())
        kept = [slot for node in nodes for slot in node.slots.tolist()]
        assert sorted(kept) == np.flatnonzero(self._kept).tolist(), "a slot is kept twice, or of no path"
        counts = Counter(booked)
        assert {slot: int(self._bookings[slot]) for slot in np.flatnonzero(self._bookings).tolist()} == counts
        assert self._pool.cached == len(set(kept) - counts.keys()), "the count of cached slots is wrong"
        free = self._pool.capacity - len(self._pool.used)
        assert free + len(counts) + self._pool.cached == self._pool.capacity, "a slot is leaked"
        assert len(nodes) == self._num_nodes
        noted = {node for used, _, node in self._leaves if node.used == used}
        for node in nodes:
            assert len(node.tokens) == len(node.slots) > 0 and node.parent is not None
            assert node.parent.children[node.key] is node
            assert node.parent is self._root or node.parent.used >= node.used
            assert node.children or node in noted, "a leaf that cannot be evicted"

    # ---- the tree

    def _key(self, node: _Node, salt: str, token: np.int64) -> Hashable:
        return (salt, int(token)) if node is self._root else int(token)

    def _go_on(self, node: _Node, key: Hashable, tokens: np.ndarray, slots: np.ndarray) -> _Node:
        """The path's end: the leaf itself, longer now, or a new one."""
        idle = self.num_idle(slots)
        self._kept[slots] = True
        self._pool.cached += idle
        if node.children or node is self._root:
            node.children[key] = leaf = _Node(key, tokens, slots.copy(), node)
            self._num_nodes += 1
            return leaf
        node.tokens, node.slots = np.concatenate([node.tokens, tokens]), np.concatenate([node.slots, slots])
        return node

    def _split(self, node: _Node, length: int) -> _Node:
        """A node of its own for its first tokens; the rest stays as little used as it was."""
        assert node.parent is not None
        head = _Node(node.key, node.tokens[:length], node.slots[:length], node.parent, node.used)
        node.parent.children[node.key] = head
        node.key, node.parent = int(node.tokens[length]), head
        node.tokens, node.slots = node.tokens[length:], node.slots[length:]
        head.children[node.key] = node
        self._num_nodes += 1
        return head

    def _cut(self, leaf: _Node, count: int) -> int:
        """Drops a leaf's last tokens; how many slots that frees."""
        length, parent = len(leaf.slots) - count, leaf.parent
        freed = self._drop(leaf.slots[length:])
        leaf.tokens, leaf.slots = leaf.tokens[:length], leaf.slots[:length]
        if length:
            self._note_leaf(leaf)
        elif parent is not None:
            leaf.parent = None
            del parent.children[leaf.key]
            self._num_nodes -= 1
            if not parent.children and parent is not self._root:
                self._note_leaf(parent)
        return freed

    def _drop(self, slots: np.ndarray) -> int:
        self._kept[slots] = False
        idle = slots[self._bookings[slots] == 0]
        self._pool.cached -= len(idle)
        self._pool.release(idle.tolist())
        return len(idle)

    def _note_leaf(self, leaf: _Node) -> None:
        if len(self._leaves) > 64 + 2 * self._num_nodes:  # most of them are out of date
            self._leaves = [(node.used, next(self._numbers), node) for node in self._nodes() if not node.children]
            heapq.heapify(self._leaves)
        heapq.heappush(self._leaves, (leaf.used, next(self._numbers), leaf))

    def _least_recent(self) -> _Node | None:
        """Takes out the leaf that was used least recently; None where there is none."""
        while self._leaves:
            used, _, node = heapq.heappop(self._leaves)
            if used == node.used and node.parent is not None and not node.children:
                return node
        return None

    def _nodes(self) -> Iterator[_Node]:
        waiting = list(self._root.children.values())
        while waiting:
            node = waiting.pop()
            waiting += node.children.values()
            yield node


def _common_length(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens from the first on are the same."""
    length = min(len(first), len(second))
    different = first[:length] != second[:length]
    return int(different.argmax()) if different.any() else length
