"""Where the queries of a forest find their keys: the tables that the attention kernels read.

A *leaf* is the queries of one thread. Its columns are its path in path order, then its draft nodes, and they are cut
into chunks of one fixed size, counted from the path's first token. Leaves that have all columns of a chunk in common
are side by side and read it together; a chunk in which they part is read by each alone. So what a query sums up, and
in which order, is settled by its own path: not by who else is in the forest, nor by where a fork is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

MAX_NODES = 64  # of a leaf: the bits of an ancestor word
ITEM_FIELDS = 7
# Columns of a chunk. Partial results weigh 2 * rows / chunk of the keys and values that were read for them.
CHUNK = 256


@dataclass(frozen=True, slots=True)
class Tile:
    """`rows` of queries times query heads, `columns` of keys."""

    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """Queries of one thread.

    slots: int [length + nodes], where the path's tokens lie, then the draft nodes.
    length: tokens of the path, those whose queries these are included.
    rows: int [r], the queries' rows.
    positions: int [r], their path positions; a query sees the path's columns up to its own.
    ancestors: int64 or uint64 [r], bit j set where draft node j is seen.
    shared: columns in common with the leaf before, at most the shorter path. Leaves are ordered so that those that
        share a beginning are side by side, however long it is: a thread's children in the order of their forks, then
        itself.
    """

    slots: np.ndarray
    length: int
    rows: np.ndarray
    positions: np.ndarray
    ancestors: np.ndarray
    shared: int = 0


@dataclass(slots=True, eq=False)
class TreeLayout:
    """Tables of one step, the same for all layers. int32 unless said; N queries, S leaves, I items, P partial rows.

    order [N]: rows in the order of leaves. The next four go by that order:
    positions, lengths, leaves [N]: path position, columns that are path, leaf of each query.
    ancestors int64 [N]: draft nodes that a query sees, bit by bit.
    slots [*]: chunks' columns, one after the other.
    chunks [*]: where in `slots` a chunk begins; a run of chunks is side by side.
    items [I, 7]: a run of chunks for up to `tile.rows // group` queries: first entry of `chunks`, how many, the number
        of the first on the path, columns, first query in `order`, queries, first partial row (-1: the result is whole).
    merges [S + 1] and deltas [*]: partial row of query i in the j-th chunk of leaf s: i + deltas[merges[s] + j].
    """

    ancestors: torch.Tensor
    order: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    leaves: torch.Tensor
    slots: torch.Tensor
    chunks: torch.Tensor
    items: torch.Tensor
    merges: torch.Tensor
    deltas: torch.Tensor
    chunk: int
    tile: Tile
    walk: bool
    partial_rows: int

    def flat(self) -> torch.Tensor:
        """All tables one after the other, int32, each from an address that is a multiple of 16 bytes: Triton compiles a
        kernel anew for pointers that are not."""
        tables = [table.view(torch.int32).reshape(-1) for table in self._tables()]
        flat = torch.zeros(sum(_aligned(len(table)) for table in tables), dtype=torch.int32)
        for part, table in zip(flat.split([_aligned(len(table)) for table in tables]), tables, strict=True):
            part[: len(table)] = table
        return flat

    def over(self, flat: torch.Tensor) -> TreeLayout:
        """The same tables as views of what `flat` returned, on whatever device it is now."""
        tables = [table.view(torch.int32) for table in self._tables()]
        parts = flat.split([_aligned(table.numel()) for table in tables])
        views = {
            name: part[: table.numel()].view(table.shape)
            for name, part, table in zip(_TABLES, parts, tables, strict=True)
        }
        return replace(self, **views | {"ancestors": views["ancestors"].view(torch.int64)})

    def to(self, device: torch.device) -> TreeLayout:
        """One copy for all tables."""
        if device.type == "cpu":
            return self
        return self.over(self.flat().pin_memory().to(device, non_blocking=True))

    def padded(self, sizes: Sizes, block: int) -> TreeLayout:
        """Tables as large as any forest of these sizes needs, `block` queries an item; what is added does nothing."""
        queries, partial_rows = sizes.queries, sizes.queries * sizes.path_chunks
        spans = partial_rows if self.walk else sizes.chunks
        # A walk has an item for each block of a leaf, of which there are at most as many as queries; else every chunk
        # has its blocks, full but for the last.
        items = queries if self.walk else sizes.chunks + partial_rows // block

        def grown(table: torch.Tensor, length: int, fill: int = 0) -> torch.Tensor:
            return torch.cat([table, table.new_full((length - len(table), *table.shape[1:]), fill)])

        return replace(
            self,
            ancestors=grown(self.ancestors, queries),
            order=grown(self.order, queries),
            positions=grown(self.positions, queries),
            lengths=grown(self.lengths, queries),
            leaves=grown(self.leaves, queries, len(self.merges) - 1),  # behind the last leaf: nothing to merge
            slots=grown(self.slots, sizes.chunks * self.chunk),
            chunks=grown(self.chunks, spans),
            items=grown(self.items, items),
            merges=grown(self.merges, queries + 1, len(self.deltas)),
            deltas=grown(self.deltas, partial_rows),
            partial_rows=0 if self.walk else partial_rows,
        )

    def _tables(self) -> list[torch.Tensor]:
        return [getattr(self, name) for name in _TABLES]


# ancestors first: 64 bits want to lie on an even place of a buffer of 32.
_TABLES = (
    *("ancestors", "order", "positions", "lengths", "leaves"),
    *("slots", "chunks", "items", "merges", "deltas"),
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large a forest may be: its queries, its chunks in all, and the chunks of its longest path."""

    queries: int
    chunks: int
    path_chunks: int

    @classmethod
    def of(cls, leaves: Sequence[Leaf], chunk: int, queries: int) -> Sizes:
        """Rounded up to powers of two, so that few sizes serve all forests."""
        runs = [-(-len(leaf.slots) // chunk) for leaf in leaves]
        shared = sum(leaf.shared // chunk for leaf in leaves[1:])
        return cls(queries, power_of_two(sum(runs) - shared), power_of_two(max(runs)))


def _aligned(length: int) -> int:
    return -(-length // 4) * 4


def power_of_two(number: int) -> int:
    """The least that is no less."""
    return 1 << (number - 1).bit_length()


def plan(leaves: Sequence[Leaf], tile: Tile, group: int, chunk: int = CHUNK, walk: bool = False) -> TreeLayout:
    """Tables for a forest's leaves, on the CPU.

    group: query heads of a KV head; so many rows of a tile are one query.
    chunk: columns of a chunk, a multiple of the tile's.
    walk: every leaf's queries go over their whole path in one program, which leaves no partial results to merge; for
        forests whose queries fill the device by themselves. The results are the same bits.

    ValueError for a leaf of more than 64 draft nodes, or one that shares columns it does not have.
    """
    _check(leaves)
    block = tile.rows // group
    assert block and chunk % tile.columns == 0
    chunks = _Chunks(leaves, chunk)
    queries = np.cumsum([0, *(len(leaf.rows) for leaf in leaves)])
    items, partial_rows, merges, deltas = (_walks if walk else _splits)(leaves, chunks, queries, block)
    counts = np.diff(queries)
    runs = chunks.of_leaf if walk else [list(range(len(chunks.begins)))]
    return TreeLayout(
        ancestors=_tensor([leaf.ancestors.astype(np.int64) for leaf in leaves], np.int64),
        order=_tensor([leaf.rows for leaf in leaves]),
        positions=_tensor([leaf.positions for leaf in leaves]),
        lengths=_tensor([np.repeat([leaf.length for leaf in leaves], counts)]),
        leaves=_tensor([np.repeat(np.arange(len(leaves)), counts)]),
        slots=_tensor(chunks.slots),
        chunks=_tensor([[chunks.begins[number] for number in run] for run in runs]),
        items=_tensor(items).view(-1, ITEM_FIELDS),
        merges=_tensor([merges]),
        deltas=_tensor([deltas]),
        chunk=chunk,
        tile=tile,
        walk=walk,
        partial_rows=partial_rows,
    )


class _Chunks:
    """The chunks of a forest, numbered: those of a leaf that the leaf before has too keep their numbers."""

    def __init__(self, leaves: Sequence[Leaf], size: int) -> None:
        self.size = size
        self.slots: list[np.ndarray] = []
        self.begins: list[int] = []  # of each, in the joined `slots`
        self.columns: list[int] = []
        self.leaves: list[list[int]] = []  # first and last of those that have it
        self.of_leaf: list[list[int]] = []
        end = 0
        for index, leaf in enumerate(leaves):
            common = leaf.shared // size if index else 0
            mine = self.of_leaf[-1][:common] if index else []
            for number in mine:
                self.leaves[number][1] = index
            own = leaf.slots[common * size :]
            for start in range(0, len(own), size):
                mine.append(len(self.begins))
                self.begins.append(end + start)
                self.columns.append(min(size, len(own) - start))
                self.leaves.append([index, index])
            self.slots.append(own)
            self.of_leaf.append(mine)
            end += len(own)


def _walks(leaves: Sequence[Leaf], chunks: _Chunks, queries: np.ndarray, block: int) -> tuple:
    items, entry = [], 0
    for leaf, mine, first in zip(leaves, chunks.of_leaf, queries.tolist(), strict=False):
        for start in range(0, len(leaf.rows), block):
            positions, ancestors = leaf.positions[start : start + block], leaf.ancestors[start : start + block]
            # A prompt's queries do not see what comes behind them.
            columns = len(leaf.slots) if ancestors.any() else int(positions.max()) + 1
            run = -(-columns // chunks.size)
            items.append((entry, run, 0, columns, first + start, len(positions), -1))
        entry += len(mine)
    return items, 0, [0] * (len(leaves) + 1), []


def _splits(leaves: Sequence[Leaf], chunks: _Chunks, queries: np.ndarray, block: int) -> tuple:
    items, partial = [], 0
    merged = {mine[0] for mine in chunks.of_leaf if len(mine) > 1}
    place = {number: index for mine in chunks.of_leaf for index, number in enumerate(mine)}
    delta = []  # of each chunk: from a query to its partial row
    for number, (first, last) in enumerate(chunks.leaves):
        start, stop = int(queries[first]), int(queries[last + 1])
        whole = place[number] == 0 and number not in merged
        delta.append(partial - start)
        for query in range(start, stop, block):
            row = -1 if whole else query + delta[number]
            items.append((number, 1, place[number], chunks.columns[number], query, min(block, stop - query), row))
        partial += 0 if whole else stop - start
    merges, deltas = [0], []
    for mine in chunks.of_leaf:
        if len(mine) > 1 or mine[0] in merged:
            deltas += [delta[number] for number in mine]
        merges.append(len(deltas))
    return items, partial, merges, deltas


def _check(leaves: Sequence[Leaf]) -> None:
    for before, leaf in zip([None, *leaves], leaves, strict=False):
        nodes = len(leaf.slots) - leaf.length
        if nodes > MAX_NODES:
            raise ValueError(f"a thread has {nodes} draft nodes; the kernels take at most {MAX_NODES}.")
        if not len(leaf.rows) or leaf.length < 1 or nodes < 0:
            raise ValueError("a leaf needs a query and a path of at least one token.")
        if before is not None and leaf.shared > min(before.length, leaf.length):
            raise ValueError(f"two paths of {before.length} and {leaf.length} tokens cannot share {leaf.shared}.")


def _tensor(parts: Sequence, dtype: type = np.int32) -> torch.Tensor:
    flat = np.concatenate([np.asarray(part).reshape(-1) for part in parts]) if len(parts) else np.zeros(0)
    return torch.from_numpy(np.ascontiguousarray(flat, dtype=dtype))
