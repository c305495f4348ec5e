"""All draft trees of one step, packed into one row of N tokens: the only place that knows threads and slots both."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from medusa_apar.drafting.candidates import Proposal
from medusa_apar.drafting.draft_tree import TreeShape
from medusa_apar.kv.path_table import Changes
from medusa_apar.kv.slot_ledger import SlotLedger
from medusa_apar.threads.paragraph_tree import Thread, thread_key
from medusa_apar.triton_kernels.layout import LayoutKind, Leaves, Plan, Sizes, TreeLayout, tables

from .device_tables import PackedForest
from .mask import ForestMask, Group

_NO_TREE = TreeShape(np.zeros(0, dtype=np.int64))
_NOTHING = np.zeros(0, dtype=np.int64)


@dataclass(slots=True, eq=False)
class Segment:
    """One thread's rows in a forest: its tokens that have no slot yet, the last of them the root, then draft nodes.

    A prompt, an ordinary step and a resumed thread differ only in how many are extend tokens. An ancestor fed again
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
    scored: int = 1  # extend tokens, the last ones, that are verified; more than the root when a text is scored
    request: Any = None  # threads.request.Request that the thread belongs to; None where a runtime is only measured
    # Written by Forest:
    row: int = 0  # first row in the forest
    extend_tokens: list[int] = field(default_factory=list)
    cached: int = 0  # length of the path cached before this step
    slots: np.ndarray | None = None  # int64 [size]
    positions: np.ndarray | None = None  # int64 [size], path positions
    _ledger: SlotLedger | None = None

    @property
    def size(self) -> int:
        return len(self.extend_tokens) + len(self.draft_tokens)

    @property
    def num_candidates(self) -> int:
        """Draft nodes that can be a token of this thread: all but the `[Child]`s."""
        return len(self.draft_tokens) - len(self.forks)

    def last_two(self) -> tuple[np.ndarray, np.ndarray]:
        """The last two tokens of the paths down to the root and to each draft node, int64 [1 + drafted] both; -1 where
        there is only one."""
        before, root = self.thread.last_two
        tokens = np.array([root, *self.draft_tokens], dtype=np.int64)
        above = tokens[1 + self.draft_tree.parents[: len(self.draft_tokens)]]
        return np.concatenate([[before], above]), tokens

    def child_key(self, fork: int) -> int:
        """Key of the thread that the `[Fork]` at a draft node would spawn."""
        return thread_key(self.thread.key, len(self.thread.tokens) + int(self.draft_tree.depths[fork]))

    @property
    def length(self) -> int:
        """Length of the path, extend tokens included."""
        return self.cached + len(self.extend_tokens)

    @property
    def path_slots(self) -> np.ndarray:
        """Slots of the path cached before this step, int64."""
        assert self._ledger is not None
        return self._ledger.path_slots(self.thread)[: self.cached]

    @property
    def drafted_slots(self) -> np.ndarray:
        assert self.slots is not None
        return self.slots[len(self.extend_tokens) :]

    def start(self, row: int, ledger: SlotLedger) -> None:
        self.row, self._ledger = row, ledger
        cached = ledger.cached(self.thread)
        self.cached = self.thread.start + cached
        self.extend_tokens = self.thread.tokens[cached : self.stop]
        assert self.extend_tokens, f"{self.thread} was planned with nothing to feed"

    def place(self, slots: np.ndarray, positions: np.ndarray) -> None:
        """A slot and a position for every row."""
        assert self._ledger is not None
        self.slots, self.positions = slots, positions
        self._ledger.assign(self.thread, slots[: len(self.extend_tokens)])

    def fill_visible(self, visible: np.ndarray) -> None:
        """Sets bool [size, capacity]: the path, extend tokens in their order, each draft node's ancestors."""
        assert self.slots is not None
        extend, drafted = len(self.extend_tokens), len(self.draft_tokens)
        visible[:, self.path_slots] = True
        visible[:extend, self.slots[:extend]] = np.tri(extend, dtype=bool)
        visible[extend:, self.slots[:extend]] = True
        visible[extend:, self.slots[extend:]] = self.draft_tree.ancestors[:drafted, :drafted]


class Forest:
    """N rows ready for one forward pass.

    Attributes: `input_ids` and `position_ids` int64 [1, N]; `slots` int64 [N]; `verified` segments in row order and
    `verified_rows` int64 [M], the rows whose logits they need (root first, then draft nodes); `arrays`, the same four
    on the host, int64 [N] or [M]; `groups`, one a request, for backends that want masks, `paths` for those that want
    lists of slots, and `layout` for the kernels.
    """

    def __init__(self, requests: list[list[Segment]], ledger: SlotLedger, device: torch.device):
        self.segments = [segment for segments in requests for segment in segments]
        row = 0
        tokens: list[int] = []
        for segment in self.segments:
            segment.start(row, ledger)
            tokens += segment.extend_tokens
            tokens += segment.draft_tokens
            row = len(tokens)
        self.verified = [segment for segment in self.segments if segment.verified]
        self._drafting = [segment for segment in self.segments if segment.draft_tokens]
        sizes = (segment.scored + len(segment.draft_tokens) for segment in self.verified)
        self.first_rows = [0, *itertools.accumulate(sizes)][:-1]  # of each verified segment among the M verified rows
        fields = [
            (segment.row, len(segment.extend_tokens), segment.length, len(segment.draft_tokens))
            for segment in self.segments
        ]
        self._fields = np.array(fields)
        positions, self._draft_rows = _positions(self._fields, self._drafting)
        # A request is one owner, whatever threads they are of: it attends over all of its slots.
        slots = ledger.allocate(
            positions, [(segments[0].thread.trunk, sum(segment.size for segment in segments)) for segments in requests]
        )
        for segment in self.segments:
            rows = slice(segment.row, segment.row + segment.size)
            segment.place(slots[rows], positions[rows])
        verified = [
            np.arange(segment.row + len(segment.extend_tokens) - segment.scored, segment.row + segment.size)
            for segment in self.verified
        ]
        if not verified:  # every pass has logits, and nobody looks at these
            verified = [np.array([len(tokens) - 1])]
        self.arrays = np.array(tokens, dtype=np.int64), positions, slots, np.concatenate(verified)
        self._requests, self._ledger, self._device = requests, ledger, device
        self._plans: dict[LayoutKind, Plan] = {}
        self._packed: PackedForest | None = None

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Gives back what was booked for the forest where the block, its forward pass, fails."""
        try:
            yield
        except BaseException:
            for segment in self.segments:
                self._ledger.pool.release(segment.drafted_slots.tolist())
                self._ledger.truncate(segment.thread, segment.cached - segment.thread.start)
            raise

    @cached_property
    def _tensors(self) -> tuple[torch.Tensor, ...]:
        """`arrays` on the device, in one copy; made only where somebody asks."""
        sizes = [len(array) for array in self.arrays]
        tensors: tuple[torch.Tensor, ...] = self._sent(np.concatenate(self.arrays)).split(sizes)
        return tensors

    def _sent(self, array: np.ndarray) -> torch.Tensor:
        """On the device, without waiting for what that is doing."""
        found = torch.from_numpy(array)
        if self._device.type == "cuda":
            found = found.pin_memory()
        return found.to(self._device, non_blocking=True)

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
    def parent_slots(self) -> torch.Tensor:
        """int64 [N], the slot of the token before each row's on its path; -1 where a path begins."""
        parents = np.empty(len(self), dtype=np.int64)
        for segment in self.segments:
            assert segment.slots is not None
            rows = parents[segment.row : segment.row + segment.size]
            extend, drafted = len(segment.extend_tokens), len(segment.draft_tokens)
            rows[0] = segment.path_slots[-1] if segment.cached else -1
            rows[1:extend] = segment.slots[: extend - 1]
            # A node below the root, whose parent is -1, hangs from the last extend token, which comes before the first.
            rows[extend:] = segment.slots[extend + segment.draft_tree.parents[:drafted]]
        return self._sent(parents)

    @cached_property
    def groups(self) -> list[Group]:
        return [_group(segments, self._ledger, self._device) for segments in self._requests]

    def paths(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Every row's path as slots, in path order: int32 lists, int32 [N, 3, 2], and the length of the longest path.

        A row's path is three runs (start, length) of the lists: what its segment had cached before, the segment's
        extend tokens, a draft node's ancestors. Rows of a segment share the first two.
        """
        lists: list[np.ndarray] = []
        runs = np.zeros((len(self), 3, 2), dtype=np.int32)
        start = 0
        for segment in self.segments:
            assert segment.slots is not None
            path, extend, drafted = segment.path_slots, len(segment.extend_tokens), len(segment.draft_tokens)
            cached = len(path)
            lineages, parts = segment.draft_tree.lineages(drafted)
            rows = runs[segment.row : segment.row + segment.size]
            rows[:, :2] = (start, cached), (start + cached, extend)
            if extend > 1:
                rows[:extend, 1, 1] = np.arange(1, extend + 1)
            rows[extend:, 2] = parts + (start + cached + extend, 0)
            lists += [path, segment.slots[:extend], segment.slots[extend:][lineages]]
            start += cached + extend + len(lineages)
        return np.concatenate(lists, dtype=np.int32, casting="same_kind"), runs, int(runs[:, :, 1].sum(axis=1).max())

    @cached_property
    def changes(self) -> Changes:
        """What this step adds to the table of paths; asked for, the forest has to run over it."""
        return self._ledger.table.place((segment.thread, segment.drafted_slots) for segment in self.segments)

    @property
    def table(self) -> torch.Tensor:
        """Where paths lie on the device, int32 [chunks, columns], once `changes` are committed."""
        assert self.changes
        return self._ledger.table.on(self._device)

    @cached_property
    def leaves(self) -> Leaves:
        """The segments as the tree attention kernels see them, threads that share a beginning side by side."""
        assert self.changes
        order: list[int] = []
        for segments in self._requests:
            order += _forks_first(segments, len(order))
        numbers = self._ledger.table.chunk_ids
        paths = [numbers(self.segments[index].thread) for index in order]
        counts = np.array([len(path) for path in paths])
        chunks = np.full((len(paths), counts.max()), -1, dtype=np.int32)
        chunks[np.arange(chunks.shape[1]) < counts[:, None]] = np.frombuffer(b"".join(paths), dtype=np.int32)
        fields = self._fields[order]
        return Leaves(chunks, fields[:, :3], fields[:, 3])

    @cached_property
    def words(self) -> np.ndarray:
        """The draft nodes that each row sees, one bit each, int64 [N]."""
        words = np.zeros(len(self), dtype=np.uint64)
        if self._drafting:
            drafted = [segment.draft_tree.words()[: len(segment.draft_tokens)] for segment in self._drafting]
            words[self._draft_rows] = np.concatenate(drafted)
        return words.view(np.int64)

    def plan(self, kind: LayoutKind) -> Plan:
        """The chunks of one kind of layers, whatever their window."""
        if kind not in self._plans:
            self._plans[kind] = tables(self.leaves, kind.block, self._ledger.table.chunk, kind.walk)
        return self._plans[kind]

    def layout(self, kind: LayoutKind) -> TreeLayout:
        """The tables of one kind of layers, made for the first of them."""
        if self._packed is None:
            sizes = Sizes.of(self.leaves)
            self._packed = PackedForest(sizes, self._device, reusable=False, commits=len(self.changes.entries))
            self._packed.load(self)
        return self._packed.layout(kind, self)

    def __len__(self) -> int:
        return len(self.arrays[0])

    def mask(self, mask_function: Callable) -> ForestMask:
        """The path mask, narrowed by a layer's own pattern (a sliding window, say) taken at path positions."""
        return ForestMask(
            self.groups,
            [g.visible & mask_function(0, 0, g.row_positions, g.column_positions) for g in self.groups],
        )


def _group(segments: list[Segment], ledger: SlotLedger, device: torch.device) -> Group:
    first, size = segments[0].row, sum(segment.size for segment in segments)
    visible = np.zeros((size, ledger.pool.capacity), dtype=bool)
    for segment in segments:
        segment.fill_visible(visible[segment.row - first : segment.row - first + segment.size])
    used = np.flatnonzero(visible.any(axis=0))
    span = np.arange(used[0], used[-1] + 1)
    # A strided view beats a gathered copy until most of what it spans belongs to others.
    contiguous = 2 * len(used) >= len(span)
    columns = span if contiguous else used
    positions = np.concatenate([segment.positions for segment in segments])
    return Group(
        rows=slice(first, first + size),
        columns=slice(int(span[0]), int(span[-1]) + 1) if contiguous else torch.from_numpy(used).to(device),
        visible=torch.from_numpy(visible[:, columns]).to(device),
        row_positions=torch.from_numpy(positions[:, None]).to(device),
        column_positions=torch.from_numpy(ledger.pool.positions[columns][None]).to(device),
    )


def _positions(fields: np.ndarray, drafting: list[Segment]) -> tuple[np.ndarray, np.ndarray]:
    """Path positions, int64 [rows]: extend tokens behind what is cached, each draft node by its depth; and which rows
    are draft nodes'."""
    first, extend, lengths, drafted = fields.T
    sizes = extend + drafted
    behind = lengths.repeat(sizes)
    positions = (lengths - extend - first).repeat(sizes)
    positions += np.arange(len(positions))
    draft_rows = (positions >= behind).nonzero()[0]
    if drafting:
        depths = [segment.draft_tree.depths[: len(segment.draft_tokens)] for segment in drafting]
        positions[draft_rows] = behind.take(draft_rows) + np.concatenate(depths)
    return positions, draft_rows


def _forks_first(segments: list[Segment], first: int) -> Iterator[int]:
    """The places from `first` of a request's segments, parents first, as each thread's children in the order of their
    forks and before itself."""
    waiting: list[tuple[Thread, int]] = []
    for place, segment in enumerate(segments, first):
        while waiting and not _descends(segment.thread, waiting[-1][0]):
            yield waiting.pop()[1]
        waiting.append((segment.thread, place))
    yield from (place for _, place in reversed(waiting))


def _descends(thread: Thread, ancestor: Thread) -> bool:
    while thread.depth > ancestor.depth and thread.parent is not None:
        thread = thread.parent
    return thread is ancestor
