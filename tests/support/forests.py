"""Random forests as the attention kernels see them, and what every query of them sees, said without their tables."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st

from medusa_apar.triton_kernels.layout import Leaf


@dataclass
class Drawn:
    """`seen[row]`: (slot, path position) of what a row sees without a window; `positions[row]` its own."""

    leaves: list[Leaf] = field(default_factory=list)
    seen: list[list[tuple[int, int]]] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    capacity: int = 0

    @property
    def rows(self) -> int:
        return len(self.positions)


@st.composite
def forests(draw, requests: int = 2, longest: int = 40, nodes: int = 6, forks: int = 3) -> Drawn:
    """Requests whose threads fork anywhere, each with some pending tokens and a draft tree; slots in random order."""
    drawn = Drawn()
    seed = draw(st.integers(0, 2**32 - 1))
    slots = iter(np.random.default_rng(seed).permutation(4096).tolist())
    for _ in range(draw(st.integers(1, requests))):
        _thread(draw, drawn, slots, [], longest, nodes, draw(st.integers(0, forks)), 2, new_request=True)
    # Rows lie in another order than leaves: the kernels are told which is which.
    order = draw(st.permutations(range(drawn.rows)))
    leaves = [
        Leaf(leaf.slots, leaf.length, np.array(order)[leaf.rows], leaf.positions, leaf.ancestors, leaf.shared)
        for leaf in drawn.leaves
    ]
    back = np.argsort(order)
    return Drawn(leaves, [drawn.seen[row] for row in back], [drawn.positions[row] for row in back], capacity=4096)


def _thread(draw, drawn, slots, path, longest, nodes, forks, depth, new_request=False) -> None:
    own = [next(slots) for _ in range(draw(st.integers(1, longest)))]
    whole = path + own
    places = sorted(draw(st.lists(st.integers(1, len(own)), max_size=forks, unique=True))) if depth else []
    first = True
    for place in places:
        before = len(drawn.leaves)
        _thread(draw, drawn, slots, path + own[:place], longest, nodes, forks, depth - 1, new_request and first)
        first = first and len(drawn.leaves) == before
    _leaf(draw, drawn, slots, whole, nodes, new_request and first)


def _leaf(draw, drawn, slots, path, nodes, new_request) -> None:
    count = draw(st.integers(0, nodes))
    pending = draw(st.integers(1, min(len(path), 3)))
    parents = [draw(st.integers(-1, node - 1)) for node in range(count)]
    depths, words = [], []
    for node, parent in enumerate(parents):
        depths.append(0 if parent < 0 else depths[parent] + 1)
        words.append((words[parent] if parent >= 0 else 0) | 1 << node)
    drafted = [next(slots) for _ in range(count)]
    length = len(path)
    positions = [*range(length - pending, length), *(length + depth for depth in depths)]
    rows = range(drawn.rows, drawn.rows + pending + count)
    for position in positions[:pending]:
        drawn.seen.append([(path[at], at) for at in range(position + 1)])
    for word in words:
        ancestry = [(drafted[node], length + depths[node]) for node in range(count) if word >> node & 1]
        drawn.seen.append([*((slot, at) for at, slot in enumerate(path)), *ancestry])
    shared = 0
    if not new_request and drawn.leaves:
        before = drawn.leaves[-1]
        limit = min(before.length, length)
        differs = np.flatnonzero(before.slots[:limit] != np.array(path[:limit]))
        shared = int(differs[0]) if len(differs) else limit
    drawn.leaves.append(
        Leaf(
            np.array(path + drafted),
            length,
            np.array(rows),
            np.array(positions),
            np.array([0] * pending + words, dtype=np.uint64),
            shared,
        )
    )
    drawn.positions += positions
