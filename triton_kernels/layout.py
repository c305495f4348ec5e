"""Where the queries of a forest find their keys: the tables that the attention kernels read.

A *leaf* is the queries of one thread. Its columns are its path in path order, then its draft nodes, and they are cut
into chunks of one fixed size, counted from the path's first token. Leaves that have all columns of a chunk in common
are side by side and read it together; a chunk in which they part is read by each alone. So what a query sums up, and
in which order, is settled by its own path: not by who else is in the forest, nor by where a fork is.

A chunk has a number: its row of the table of slots. Leaves that have the same number at the same place share it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch

MAX_NODES = 64  # of a leaf: the bits of an ancestor word
ITEM_FIELDS = 7
# Columns of a chunk. Partial results weigh 2 * rows / chunk of the keys and values that were read for them.
CHUNK = 256
MAX_WINDOWS = 8  # that layers of one model may have
NO_WINDOW = 1 << 30
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read by triton when it is imported, too


@dataclass(frozen=True, slots=True)
class Tile:
    """`rows` of queries times query heads, `columns` of keys."""

    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class LayoutKind:
    """What the tables depend on beside the forest: the same for all layers of a kind."""

    window: int | None
    tile: Tile
    group: int  # query heads of a KV head; so many rows of a tile are one query
    walk: bool

    @property
    def block(self) -> int:
        """Queries of a tile."""
        return self.tile.rows // self.group


@dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """Queries of one thread: first those on the path, in its order, then its draft nodes.

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


class Leaves:
    """A forest's S leaves in order, as far as `tables` must know them.

    numbers: int [S, J], each leaf's chunks; -1 behind its last.
    fields: int64 [S, 3], of each leaf the first of its rows, which are side by side, its queries that are on the path,
        and the length of the path.
    drafted: int64 [S], draft nodes, whose queries come behind those.
    """

    def __init__(self, numbers: np.ndarray, fields: np.ndarray, drafted: np.ndarray) -> None:
        self.numbers, self.fields = numbers, fields
        _, self.pending, self.lengths = fields.T
        self.columns = self.lengths + drafted
        self.queries = _starts(self.pending + drafted)  # [S + 1], where each leaf's begin
        self.there = numbers >= 0  # [S, J]
        # [S, J]: a chunk that the leaf before does not have at this place.
        self.fresh = self.there.copy()
        self.fresh[1:] &= numbers[1:] != numbers[:-1]

    def __len__(self) -> int:
        return len(self.fields)


class Plan(NamedTuple):
    """The tables of TreeLayout that go by chunks; numpy, any integers."""

    chunks: np.ndarray
    items: np.ndarray
    merges: np.ndarray
    deltas: np.ndarray
    partial_rows: int

    @property
    def sizes(self) -> dict[str, int]:
        """As of Sizes.most."""
        return {name: part if isinstance(part, int) else len(part) for name, part in self._asdict().items()}


@dataclass(slots=True, eq=False)
class TreeLayout:
    """Tables of one step, the same for all layers of a kind. int32 unless said; N queries, S leaves, I items.

    order [N]: rows in the order of leaves. The next four go by that order:
    positions, lengths, leaves [N]: path position, columns that are path, leaf of each query.
    ancestors int64 [N]: draft nodes that a query sees, bit by bit.
    slots [*]: of chunks' columns.
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

    def to(self, device: torch.device) -> TreeLayout:
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: part.to(device) for name, part in parts.items() if isinstance(part, torch.Tensor)}
        return TreeLayout(**parts | moved)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large a forest may be: queries, leaves, chunks in all, and the chunks of its longest path."""

    queries: int
    leaves: int
    chunks: int
    path_chunks: int

    @classmethod
    def of(cls, leaves: Leaves) -> Sizes:
        chunks = int(np.count_nonzero(leaves.fresh))
        return cls(int(leaves.queries[-1]), len(leaves), chunks, leaves.numbers.shape[1])

    def rounded(self) -> Sizes:
        """Up to powers of two, so that few sizes serve all forests."""
        sizes = self.queries, self.leaves, self.chunks, self.path_chunks
        return Sizes(*map(power_of_two, sizes))

    def most(self, kind: LayoutKind) -> dict[str, int]:
        """Entries of the tables of any forest of these sizes."""
        queries, leaf_chunks = self.queries, self.leaves * self.path_chunks
        merges = self.leaves + 2  # one more: the queries that only fill the tables up have a leaf too
        if kind.walk:
            items = min(queries, self.leaves + queries // kind.block)
            return {"chunks": leaf_chunks, "items": items, "merges": merges, "deltas": 0, "partial_rows": 0}
        partial_rows = queries * self.path_chunks
        items = self.chunks + partial_rows // kind.block  # every chunk has its blocks, full but for the last
        sizes = {"chunks": self.chunks, "items": items, "merges": merges, "deltas": leaf_chunks}
        return sizes | {"partial_rows": partial_rows}


def power_of_two(number: int) -> int:
    """The least that is no less."""
    return 1 << (number - 1).bit_length()


class Sections:
    """Tables one after the other in one buffer of int32, each from an address that is a multiple of 16 bytes: Triton
    compiles a kernel anew for pointers that are not."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        self._places: dict[str, tuple[int, int, tuple[int, ...]]] = {}
        self.size = 0
        for name, shape in shapes.items():
            length = int(np.prod(shape))
            self._places[name] = self.size, self.size + length, shape
            self.size += aligned(length)

    def views(self, flat: Any) -> dict[str, Any]:
        """Each field's view of a flat numpy array or tensor."""
        return {name: flat[start:stop].reshape(shape) for name, (start, stop, shape) in self._places.items()}


def aligned(length: int) -> int:
    return -(-length // 4) * 4


def tables(leaves: Leaves, block: int, chunk: int, walk: bool) -> Plan:
    """The tables of chunks, `block` queries an item. What it costs goes by leaves times chunks, not by columns.

    walk: every leaf's queries go over their whole path in one program, which leaves no partial results to merge; for
        forests whose queries fill the device by themselves. The results are the same bits.
    """
    return _walks(leaves, block, chunk) if walk else _splits(leaves, block, chunk)


def _walks(leaves: Leaves, block: int, chunk: int) -> Plan:
    entries = _starts(np.count_nonzero(leaves.there, axis=1))
    counts = np.diff(leaves.queries)
    leaf, first = _blocks(counts, block)
    stop = np.minimum(first + block, counts[leaf])
    # A prompt's queries do not see what comes behind them.
    pending = leaves.pending[leaf]
    columns = np.where(stop > pending, leaves.columns[leaf], leaves.lengths[leaf] - pending + stop)
    runs = -(-columns // chunk)
    items = _items(entries[leaf], runs, 0, columns, leaves.queries[leaf] + first, stop - first, -1)
    merges = np.zeros(len(leaves) + 1, dtype=np.int64)
    return Plan(leaves.numbers[leaves.there] * chunk, items, merges, merges[:0], 0)


def _splits(leaves: Leaves, block: int, chunk: int) -> Plan:
    there, fresh = leaves.there, leaves.fresh
    first, place = fresh.nonzero()  # of each distinct chunk: the first leaf that has it, and where on the path
    # Which of them a leaf has at a place: the last that began there, in this leaf or one before.
    numbered = np.zeros(fresh.shape, dtype=np.int64)
    numbered[fresh] = np.arange(len(first))
    np.maximum.accumulate(numbered, axis=0, out=numbered)
    last = first + np.bincount(numbered[there])
    start = leaves.queries.take(first)
    counts = leaves.queries.take(last) - start
    # The result is whole where no leaf that has the chunk has another.
    merged = place > 0
    merged[numbered[np.count_nonzero(there, axis=1) > 1, 0]] = True
    partial = counts * merged
    delta = _starts(partial)[:-1] - start  # from a query to its partial row

    number, offset = _blocks(counts, block)
    query = start.take(number) + offset
    columns = np.minimum(leaves.columns.take(first) - place * chunk, chunk).take(number)
    rows = np.where(merged.take(number), query + delta.take(number), -1)
    rest = np.minimum(counts.take(number) - offset, block)
    items = _items(number, 1, place.take(number), columns, query, rest, rows)
    merges = there & merged.take(numbered[:, :1])
    deltas = delta.take(numbered[merges])
    starts = _starts(np.count_nonzero(merges, axis=1))
    return Plan(leaves.numbers[fresh] * chunk, items, starts, deltas, int(partial.sum()))


def _items(entries: np.ndarray, *others: np.ndarray | int) -> np.ndarray:
    items = np.empty((ITEM_FIELDS, len(entries)), dtype=np.int32)
    for field, values in zip(items, (entries, *others), strict=True):
        field[:] = values
    return items.T


def _starts(counts: np.ndarray) -> np.ndarray:
    """Where each run begins, and where the last ends."""
    starts = np.zeros(len(counts) + 1, dtype=np.int64)
    counts.cumsum(out=starts[1:])
    return starts


def _blocks(counts: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Runs cut into blocks: the run that each is of, and where in it it begins."""
    blocks = -(-counts // block)
    run = np.arange(len(counts)).repeat(blocks)
    return run, (np.arange(len(run)) - _starts(blocks).take(run)) * block


def plan(leaves: Sequence[Leaf], tile: Tile, group: int, chunk: int = CHUNK, walk: bool = False) -> TreeLayout:
    """Tables for leaves that say all their slots, on the CPU: what kernels are tested and timed with.

    The decoder's forests find their chunks on the device (`path_table.py`, `pack.py`).
    chunk: columns of a chunk, a multiple of the tile's.
    ValueError for a leaf of more than 64 draft nodes, or one that shares columns it does not have.
    """
    _check(leaves)
    block = tile.rows // group
    assert block and chunk % tile.columns == 0
    numbers = np.full((len(leaves), max(-(-len(leaf.slots) // chunk) for leaf in leaves)), -1)
    slots: list[np.ndarray] = []
    for index, leaf in enumerate(leaves):
        whole, count = leaf.shared // chunk if index else 0, -(-len(leaf.slots) // chunk)
        numbers[index, :whole] = numbers[index - 1, :whole]
        numbers[index, whole:count] = len(slots) + np.arange(count - whole)
        own = np.zeros((count - whole) * chunk, dtype=np.int64)
        own[: len(leaf.slots) - whole * chunk] = leaf.slots[whole * chunk :]
        slots.extend(own.reshape(-1, chunk))
    counts = np.array([len(leaf.rows) for leaf in leaves])
    lengths = np.array([leaf.length for leaf in leaves])
    drafted = np.array([len(leaf.slots) for leaf in leaves]) - lengths
    fields = np.stack([np.zeros_like(counts), counts - drafted, lengths], axis=1)
    made = tables(Leaves(numbers, fields, drafted), block, chunk, walk)
    return TreeLayout(
        ancestors=torch.from_numpy(np.concatenate([leaf.ancestors.astype(np.int64) for leaf in leaves])),
        order=_tensor(np.concatenate([leaf.rows for leaf in leaves])),
        positions=_tensor(np.concatenate([leaf.positions for leaf in leaves])),
        lengths=_tensor(np.repeat(lengths, counts)),
        leaves=_tensor(np.repeat(np.arange(len(leaves)), counts)),
        slots=_tensor(np.concatenate(slots)),
        **{name: _tensor(table) for name, table in made._asdict().items() if name != "partial_rows"},
        chunk=chunk,
        tile=tile,
        walk=walk,
        partial_rows=made.partial_rows,
    )


def _check(leaves: Sequence[Leaf]) -> None:
    for before, leaf in zip([None, *leaves], leaves, strict=False):
        nodes = len(leaf.slots) - leaf.length
        if nodes > MAX_NODES:
            raise ValueError(f"a thread has {nodes} draft nodes; the kernels take at most {MAX_NODES}.")
        if not len(leaf.rows) or leaf.length < 1 or nodes < 0:
            raise ValueError("a leaf needs a query and a path of at least one token.")
        if before is not None and leaf.shared > min(before.length, leaf.length):
            raise ValueError(f"two paths of {before.length} and {leaf.length} tokens cannot share {leaf.shared}.")


def _tensor(table: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(table, dtype=np.int32))
