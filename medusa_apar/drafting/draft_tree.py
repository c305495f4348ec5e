"""Static sparse draft trees: which (head, rank) guesses are worth a node (Medusa, arXiv 2401.10774, section 2.1.2)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

# Chance that the true token is a head's guess of this rank, for heads as we ship them; only the order matters here.
# Calibrated heads carry their own table.
DEFAULT_ACCEPTANCE = ((0.55, 0.13, 0.06, 0.04, 0.03), (0.36, 0.11, 0.06, 0.04), (0.27, 0.09, 0.05), (0.21, 0.07))


@dataclass(frozen=True, slots=True, eq=False)
class Level:
    """The m nodes of one depth of a draft tree, for heads that go down it level by level."""

    nodes: np.ndarray  # int [m], in the tree
    parents: np.ndarray  # int [m], the parent's place among the inner nodes of the level above; 0, the root, at the top
    ranks: np.ndarray  # int [m]
    inner: np.ndarray  # int [p], places in `nodes` of those that have children

    @property
    def top_k(self) -> int:
        return int(self.ranks.max()) + 1


class TreeShape:
    """Nodes below a root, parents before children, so that the first n nodes are a tree for every n.

    Attributes (numpy, n nodes):
        parents: int [n], index of the parent node, -1 for a child of the root.
        depths: int [n], 0 for a child of the root.
        ancestors: bool [n, n], row i true at node i and the nodes above it.
    """

    def __init__(self, parents: np.ndarray):
        self.parents = parents
        self.depths = np.zeros(len(parents), dtype=np.int64)
        self.ancestors = np.eye(len(parents), dtype=bool)
        self._words: dict[int | None, np.ndarray] = {}
        for node, parent in enumerate(parents.tolist()):
            if parent >= 0:
                self.depths[node] = self.depths[parent] + 1
                self.ancestors[node] |= self.ancestors[parent]

    @staticmethod
    def of(parents: np.ndarray) -> TreeShape:
        """Small trees come again and again: made once for each."""
        return _shape(parents.astype(np.int64).tobytes())

    def __len__(self) -> int:
        return len(self.parents)

    @property
    def height(self) -> int:
        return int(self.depths.max()) + 1 if len(self) else 0

    def lineages(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The ancestors of the first `size` nodes: each one's from the top, itself last, all in one list (int), and
        each node's part of that list, start and length (int32 [size, 2])."""
        nodes, runs = self._lineages
        return nodes[: runs[size - 1].sum() if size else 0], runs[:size]

    @cached_property
    def _lineages(self) -> tuple[np.ndarray, np.ndarray]:
        nodes = np.nonzero(self.ancestors)[1]  # row by row in ascending order, and a parent's number is the lower
        lengths = self.depths + 1
        return nodes, np.stack([np.cumsum(lengths) - lengths, lengths], axis=1).astype(np.int32)

    def words(self, window: int | None = None) -> np.ndarray:
        """`ancestors` as bits, uint64 [n], of at most 64 nodes; with a window, only those less than so far above."""
        if len(self) > 64:
            raise ValueError(f"a draft tree of {len(self)} nodes does not fit into words of 64 bits.")
        if window not in self._words:
            seen = self.ancestors
            if window is not None:
                seen = seen & (self.depths[:, None] - self.depths[None, :] < window)
            bits = np.uint64(1) << np.arange(len(self), dtype=np.uint64)
            self._words[window] = (seen * bits).sum(axis=1, dtype=np.uint64)
        return self._words[window]


@lru_cache(maxsize=1 << 10)
def _shape(parents: bytes) -> TreeShape:
    return TreeShape(np.frombuffer(parents, dtype=np.int64))


class DraftTree(TreeShape):
    """A tree of the heads' guesses: a node's depth is the head that guesses its token.

    Attributes beside the shape's (numpy, n nodes):
        ranks: int [n], which of that head's guesses, 0 the likeliest.
        chances: float [n], a node's chance of being accepted, or None where nobody said.
    """

    chances: np.ndarray | None = None

    def __init__(self, choices: Sequence[Sequence[int]]):
        """`choices`: one tuple of ranks per node, root to node, as Medusa writes its trees: `[(0,), (1,), (0, 0)]`."""
        index: dict[tuple[int, ...], int] = {(): -1}
        for number, choice in enumerate(map(tuple, choices)):
            if not choice or min(choice) < 0:
                raise ValueError(f"A draft tree's node is a non-empty tuple of ranks from 0, got {choice}.")
            if choice in index or choice[:-1] not in index:
                raise ValueError(f"Draft tree node {choice} is given twice or before its parent {choice[:-1]}.")
            index[choice] = number
        self.choices = [tuple(choice) for choice in choices]
        super().__init__(np.array([index[choice[:-1]] for choice in self.choices], dtype=np.int64))
        self.ranks = np.array([choice[-1] for choice in self.choices], dtype=np.int64)
        self._prefixes: dict[int, DraftTree] = {}

    @classmethod
    def likeliest(cls, size: int, acceptance: Sequence[Sequence[float]] = DEFAULT_ACCEPTANCE) -> DraftTree:
        """The `size` nodes with the greatest chance of being accepted, likeliest first.

        `acceptance[head][rank]` is the chance that head's guess of that rank is right, taken as independent of the
        rest, as Medusa's offline search does. Choosing greedily is optimal: a node is never likelier than its parent.
        """
        frontier: list[tuple[float, tuple[int, ...]]] = [(-acceptance[0][0], (0,))] if acceptance else []
        choices: list[tuple[int, ...]] = []
        chances: list[float] = []
        while frontier and len(choices) < size:
            chance, choice = heapq.heappop(frontier)
            choices.append(choice)
            chances.append(-chance)
            head, rank = len(choice) - 1, choice[-1]
            if rank + 1 < len(acceptance[head]):
                sibling = chance / acceptance[head][rank] * acceptance[head][rank + 1]
                heapq.heappush(frontier, (sibling, (*choice[:-1], rank + 1)))
            if head + 1 < len(acceptance):
                heapq.heappush(frontier, (chance * acceptance[head + 1][0], (*choice, 0)))
        tree = cls(choices)
        tree.chances = np.array(chances)
        return tree

    @property
    def num_heads(self) -> int:
        return self.height

    @property
    def top_k(self) -> int:
        return int(self.ranks.max()) + 1 if len(self) else 0

    @cached_property
    def levels(self) -> list[Level]:
        """One per depth, from the top."""
        levels: list[Level] = []
        place = np.full(len(self) + 1, 0)  # of an inner node among its level's; the last entry is the root's
        for depth in range(self.num_heads):
            nodes = np.flatnonzero(self.depths == depth)
            inner = np.flatnonzero(np.isin(nodes, self.parents))
            levels.append(Level(nodes, place[self.parents[nodes]], self.ranks[nodes], inner))
            place[nodes[inner]] = np.arange(len(inner))
        return levels

    @cached_property
    def children(self) -> list[list[int]]:
        """The children of each node; those of the root at index -1."""
        found: list[list[int]] = [[] for _ in range(len(self) + 1)]
        for node, parent in enumerate(self.parents.tolist()):
            found[parent].append(node)
        return found

    def first(self, size: int) -> DraftTree:
        """The tree of the first `size` nodes; made once for each size."""
        if size >= len(self):
            return self
        if size not in self._prefixes:
            self._prefixes[size] = DraftTree(self.choices[:size])
        return self._prefixes[size]
