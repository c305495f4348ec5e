"""All draft trees of one step, packed into one row of N tokens: the only place that knows threads and slots both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import numpy as np
import torch

from .draft_tree import TreeShape
from .paragraph_tree import Thread, thread_key
from .proposals import Proposal
from .slot_ledger import SlotLedger
from .triton_kernels.layout import CHUNK, Leaf, Sizes, Tile, TreeLayout, plan

_NO_TREE = TreeShape(np.zeros(0, dtype=np.int64))
_NOTHING = np.zeros(0, dtype=np.int64)


@dataclass(slots=True, eq=False)
class Stem:
    """One thread's rows in a forest: its tokens that have no slot yet, the last of them the root, then draft nodes.

    A prompt, an ordinary step and a resumed thread differ only in how many tokens are pending. An ancestor fed again
    for a descendant's sake (`verified=False`) has neither root nor drafts.
    """

    thread: Thread
    stop: int  # feed the thread's tokens up to here
    verified: bool = True
    draft_tree: TreeShape = _NO_TREE
    draft_tokens: list[int] = field(default_factory=list)  # of the tree's first nodes
    # Node of a drafted `[Fork]` -> node of the `[Child]` below it, verified as the child's root; these are the last.
    forks: dict[int, int] = field(default_factory=dict)
    proposal: Proposal | None = None  # what the tree was cut from
    kept: np.ndarray = field(default_factory=lambda: _NOTHING)  # int64 [nodes], which of its candidates they are
    scored: int = 1  # pending tokens, the last ones, that are verified; more than the root when a text is scored
    # Written by Forest:
    row: int = 0  # first row in the forest
    pending: list[int] = field(default_factory=list)
    path_slots: np.ndarray | None = None  # int64, of the path cached before this step
    slots: np.ndarray | None = None  # int64 [size]
    positions: np.ndarray | None = None  # int64 [size], path positions

    @property
    def size(self) -> int:
        return len(self.pending) + len(self.draft_tokens)

    @property
    def guessed(self) -> int:
        """Draft nodes that can be a token of this thread: all but the `[Child]`s."""
        return len(self.draft_tokens) - len(self.forks)

    def child_key(self, fork: int) -> int:
        """Of the thread that the `[Fork]` at a draft node would spawn."""
        return thread_key(self.thread.key, len(self.thread.tokens) + int(self.draft_tree.depths[fork]))

    def place(self, row: int, ledger: SlotLedger) -> None:
        """Gives every row a slot. Ancestors in the same forest go first, so that this path includes their new slots."""
        self.row = row
        self.pending = self.thread.tokens[ledger.cached(self.thread) : self.stop]
        assert self.pending, f"{self.thread} was planned with nothing to feed"
        self.path_slots = ledger.path_slots(self.thread)
        first = len(self.path_slots)
        root = first + len(self.pending) - 1
        drafted = root + 1 + self.draft_tree.depths[: len(self.draft_tokens)]
        self.positions = np.concatenate([np.arange(first, root + 1), drafted])
        self.slots = ledger.pool.allocate(self.positions)
        ledger.book(self.thread, self.slots[: len(self.pending)])

    def fill_visible(self, visible: np.ndarray) -> None:
        """Sets bool [size, capacity]: the path, pending tokens in their order, each draft node's ancestors."""
        assert self.slots is not None
        pending, drafted = len(self.pending), len(self.draft_tokens)
        visible[:, self.path_slots] = True
        visible[:pending, self.slots[:pending]] = np.tri(pending, dtype=bool)
        visible[pending:, self.slots[:pending]] = True
        visible[pending:, self.slots[pending:]] = self.draft_tree.ancestors[:drafted, :drafted]

    def leaf(self, before: Stem | None, window: int | None) -> Leaf:
        """`before`: the stem whose leaf comes first, of the same request."""
        assert self.path_slots is not None and self.slots is not None and self.positions is not None
        pending, drafted = len(self.pending), len(self.draft_tokens)
        length = len(self.path_slots) + pending
        return Leaf(
            slots=np.concatenate([self.path_slots, self.slots]),
            length=length,
            rows=np.arange(self.row, self.row + self.size),
            positions=self.positions,
            ancestors=np.concatenate([np.zeros(pending, dtype=np.uint64), self.draft_tree.words(window)[:drafted]]),
            shared=0 if before is None else min(_common(before.thread, self.thread), length, before.path_length),
        )

    @property
    def path_length(self) -> int:
        assert self.path_slots is not None
        return len(self.path_slots) + len(self.pending)


@dataclass(slots=True, eq=False)
class Group:
    """One request's share of the forest. No request pays for another's slots."""

    rows: slice
    columns: slice | torch.Tensor  # into the pool's slots
    visible: torch.Tensor  # bool [rows, columns]
    row_positions: torch.Tensor  # int64 [rows, 1]
    column_positions: torch.Tensor  # int64 [1, columns]


@dataclass(slots=True, eq=False)
class ForestMask:
    """What our attention functions receive as `attention_mask`."""

    groups: list[Group]
    masks: list[torch.Tensor]  # bool [rows, columns], one per group
    _biases: dict[tuple[int, int, torch.dtype], torch.Tensor] = field(default_factory=dict)

    def bias(self, group: int, copies: int, dtype: torch.dtype) -> torch.Tensor:
        """A group's mask as scores to add, [copies * rows, columns]; the same for every layer, so made once."""
        key = (group, copies, dtype)
        if key not in self._biases:
            mask = self.masks[group]
            bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
            self._biases[key] = bias.repeat(copies, 1)
        return self._biases[key]


@dataclass(frozen=True, slots=True)
class LayoutKind:
    """What the tables of the tree attention kernels depend on beside the forest."""

    window: int | None
    tile: Tile
    group: int  # query heads of a KV head
    walk: bool
    chunk: int = CHUNK

    def plan(self, forest: Forest) -> TreeLayout:
        """On the CPU."""
        return plan(forest.leaves(self.window), self.tile, self.group, self.chunk, self.walk)

    def padded(self, forest: Forest, sizes: Sizes) -> TreeLayout:
        return self.plan(forest).padded(sizes, self.tile.rows // self.group)


class Forest:
    """N rows ready for one forward pass.

    Attributes: `input_ids` and `position_ids` int64 [1, N]; `slots` int64 [N]; `verified` stems in row order and
    `verified_rows` int64 [M], the rows whose logits they need (root first, then draft nodes); `arrays`, the same four
    on the host, int64 [N] or [M]; `groups`, one a request, for backends that want masks, `paths` for those that want
    lists of slots, and `layout` for the kernels.
    """

    def __init__(self, requests: list[list[Stem]], ledger: SlotLedger, device: torch.device):
        row = 0
        for stem in (stem for stems in requests for stem in stems):
            stem.place(row, ledger)
            row += stem.size
        self.stems = [stem for stems in requests for stem in stems]
        self.verified = [stem for stem in self.stems if stem.verified]
        tokens = [token for stem in self.stems for token in (*stem.pending, *stem.draft_tokens)]
        rows = [np.arange(stem.row + len(stem.pending) - stem.scored, stem.row + stem.size) for stem in self.verified]
        self.arrays = (
            np.array(tokens, dtype=np.int64),
            np.concatenate([cast(np.ndarray, stem.positions) for stem in self.stems]),
            np.concatenate([cast(np.ndarray, stem.slots) for stem in self.stems]),
            np.concatenate(rows),
        )
        self._requests, self._ledger, self._device = requests, ledger, device
        self._layouts: dict[LayoutKind, TreeLayout] = {}
        self._leaves: dict[int | None, list[Leaf]] = {}

    @cached_property
    def _tensors(self) -> tuple[torch.Tensor, ...]:
        """`arrays` on the device, in one copy; made only where somebody asks."""
        flat = torch.from_numpy(np.concatenate(self.arrays))
        if self._device.type == "cuda":
            flat = flat.pin_memory()
        return flat.to(self._device, non_blocking=True).split([len(array) for array in self.arrays])

    @cached_property
    def input_ids(self) -> torch.Tensor:
        return self._tensors[0][None]

    @cached_property
    def position_ids(self) -> torch.Tensor:
        return self._tensors[1][None]

    @cached_property
    def slots(self) -> torch.Tensor:
        return self._tensors[2]

    @cached_property
    def verified_rows(self) -> torch.Tensor:
        return self._tensors[3]

    @cached_property
    def groups(self) -> list[Group]:
        return [_group(stems, self._ledger, self._device) for stems in self._requests]

    def paths(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Every row's path as slots, in path order: int32 lists, int32 [N, 3, 2], and the length of the longest path.

        A row's path is three runs (start, length) of the lists: what its stem had cached before, the stem's pending
        tokens, a draft node's ancestors. Rows of a stem share the first two.
        """
        lists: list[np.ndarray] = []
        runs = np.zeros((len(self), 3, 2), dtype=np.int32)
        start = 0
        for stem in self.stems:
            assert stem.path_slots is not None and stem.slots is not None
            cached, pending, drafted = len(stem.path_slots), len(stem.pending), len(stem.draft_tokens)
            lineages, parts = stem.draft_tree.lineages(drafted)
            rows = runs[stem.row : stem.row + stem.size]
            rows[:, :2] = (start, cached), (start + cached, pending)
            if pending > 1:
                rows[:pending, 1, 1] = np.arange(1, pending + 1)
            rows[pending:, 2] = parts + (start + cached + pending, 0)
            lists += [stem.path_slots, stem.slots[:pending], stem.slots[pending:][lineages]]
            start += cached + pending + len(lineages)
        return np.concatenate(lists, dtype=np.int32, casting="same_kind"), runs, int(runs[:, :, 1].sum(axis=1).max())

    def leaves(self, window: int | None = None) -> list[Leaf]:
        """The stems as the tree attention kernels see them, threads that share a beginning side by side.

        window: path positions that a row sees; draft nodes beyond it are not among a node's ancestors.
        """
        if window in self._leaves:
            return self._leaves[window]
        leaves = self._leaves[window] = []
        for stems in self._requests:
            before: Stem | None = None
            for stem in _forks_first(stems):
                leaves.append(stem.leaf(before, window))
                before = stem
        return leaves

    def layout(self, kind: LayoutKind) -> TreeLayout:
        """The tables of one kind of layers, made for the first of them."""
        if kind not in self._layouts:
            self._layouts[kind] = kind.plan(self).to(self._device)
        return self._layouts[kind]

    def __len__(self) -> int:
        return len(self.arrays[0])

    def mask(self, mask_function: Callable) -> ForestMask:
        """The path mask, narrowed by a layer's own pattern (a sliding window, say) taken at path positions."""
        return ForestMask(
            self.groups,
            [g.visible & mask_function(0, 0, g.row_positions, g.column_positions) for g in self.groups],
        )


def _group(stems: list[Stem], ledger: SlotLedger, device: torch.device) -> Group:
    first, size = stems[0].row, sum(stem.size for stem in stems)
    visible = np.zeros((size, ledger.pool.capacity), dtype=bool)
    for stem in stems:
        stem.fill_visible(visible[stem.row - first : stem.row - first + stem.size])
    used = np.flatnonzero(visible.any(axis=0))
    span = np.arange(used[0], used[-1] + 1)
    # A strided view beats a gathered copy until most of what it spans belongs to others.
    contiguous = 2 * len(used) >= len(span)
    columns = span if contiguous else used
    positions = np.concatenate([stem.positions for stem in stems])
    return Group(
        rows=slice(first, first + size),
        columns=slice(int(span[0]), int(span[-1]) + 1) if contiguous else torch.from_numpy(used).to(device),
        visible=torch.from_numpy(visible[:, columns]).to(device),
        row_positions=torch.from_numpy(positions[:, None]).to(device),
        column_positions=torch.from_numpy(ledger.pool.positions[columns][None]).to(device),
    )


def _forks_first(stems: list[Stem]) -> Iterator[Stem]:
    """A request's stems, each thread's children in the order of their forks and before itself."""
    of_thread = {stem.thread: stem for stem in stems}

    def visit(thread: Thread) -> Iterator[Stem]:
        for child in thread.children:
            yield from visit(child)
        if thread in of_thread:
            yield of_thread[thread]

    trunk = stems[0].thread
    while trunk.parent is not None:
        trunk = trunk.parent
    return visit(trunk)


def _common(thread: Thread, other: Thread) -> int:
    """Path positions up to which two threads of a request are the same."""
    lineage = [*(member for member, _ in thread.ancestors()), thread]
    others = [*(member for member, _ in other.ancestors()), other]
    depth = next((d for d, (a, b) in enumerate(zip(lineage, others, strict=False)) if a is not b), None)
    if depth is None:  # one descends from the other
        depth = min(len(lineage), len(others))
    return min([members[depth].start for members in (lineage, others) if depth < len(members)], default=thread.end)
