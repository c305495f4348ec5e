"""A forest on the device as the kernels read it: one buffer a step and one a plan of chunks, the rest made there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .triton_kernels.layout import (
    INTERPRETED,
    ITEM_FIELDS,
    MOST_WINDOWS,
    NO_WINDOW,
    LayoutKind,
    Plan,
    Sections,
    Sizes,
    TreeLayout,
    aligned,
)
from .triton_kernels.reference import Descriptor, Packed

if TYPE_CHECKING:
    from .forest import Forest


def fill(buffer: Tensor, contents: Tensor) -> None:
    """Copies from the CPU without waiting for the device."""
    buffer.copy_(contents.pin_memory() if buffer.is_cuda else contents, non_blocking=True)


class PackedForest:
    """Buffers for forests of some sizes.

    roomy: they serve every forest of these sizes, and stay where they are; else this one alone. What rows there are
    beyond a forest's repeat the last, but have no slot: nobody sees them, and what comes of them is void.

    Attributes: `rows` int64 [4, queries]: input ids, position ids, slots, verified rows.
    """

    def __init__(self, sizes: Sizes, device: torch.device, roomy: bool, commits: int) -> None:
        self.sizes, self.device, self._roomy = sizes, device, roomy
        self._width = width = aligned(sizes.queries)
        self._sections = Sections(
            rows=(4, width),
            words=(2 * width,),
            queries=(sizes.leaves + 2,),  # one leaf more: the rows that only fill up
            leaves=(sizes.leaves + 1, 3),
            commits=(2, aligned(commits)),
            windows=(MOST_WINDOWS,),
        )
        with torch.inference_mode(False):  # buffers outlive a caller's inference mode
            self._buffer = torch.empty(self._sections.size, dtype=torch.int32, device=device)
            self._descriptor = _descriptor(self._sections, self._buffer)
            wide = torch.empty(4, width, dtype=torch.int64, device=device)
            per_query = torch.empty(4, width, dtype=torch.int32, device=device)
            words = torch.empty(MOST_WINDOWS, width, dtype=torch.int64, device=device)
            self._packed = Packed(wide, per_query, words)
            self.rows = wide[:, : sizes.queries]
        self._windows: list[int] = []
        self._plans: dict[LayoutKind, tuple[Sections, Tensor]] = {}  # of kinds without their windows
        self._layouts: dict[LayoutKind, TreeLayout] = {}
        self._table: Tensor | None = None
        self._forest: Forest | None = None  # while layers may still ask for a kind of layout for the first time

    def become(self, forest: Forest) -> None:
        """Takes a forest's contents over; it must fit the sizes. `pack` has to follow."""
        self._table = forest.table
        host = np.zeros(self._sections.size, dtype=np.int32)
        rows, words, queries, fields, commits, windows = _descriptor(self._sections, host)
        for row, array in zip(rows, forest.arrays, strict=True):
            row[: len(array)], row[len(array) :] = array, array[-1]
        rows[2, len(forest) :] = -1
        words[: len(forest)] = forest.words
        leaves = forest.leaves
        count = len(leaves.rows)
        queries[: count + 1], queries[count + 1 :] = leaves.queries, self._width
        fields[:count].T[:] = leaves.rows, leaves.pending, leaves.lengths
        fields[count, :2] = len(forest), self._width
        entries, slots = forest.changes
        commits[0] = -1
        if len(entries) <= commits.shape[1]:
            commits[:, : len(entries)] = entries, slots
        else:  # several forks at once, each with a copy of a chunk
            both = torch.from_numpy(np.stack([entries, slots])).to(self.device)
            self._table.view(-1)[both[0]] = both[1].int()
        windows[: len(self._windows)] = self._windows
        fill(self._buffer, torch.from_numpy(host))
        for kind, (sections, buffer) in self._plans.items():
            fill(buffer, self._plan(forest, kind, sections))
        self._forest = forest

    @property
    def sent(self) -> int:
        """Bytes that a step copies to the device."""
        return self._buffer.nbytes + sum(buffer.nbytes for _, buffer in self._plans.values())

    def forget(self) -> None:
        """Lets go of the forest, and with it of the KV pool that its slots are booked in."""
        self._forest = None

    def pack(self) -> None:
        """One launch: slots into the table, and what else goes by rows and queries."""
        assert self._table is not None, "`become` goes first"
        _packing(self.device)(self._descriptor, self._table, self._packed)

    def layout(self, kind: LayoutKind) -> TreeLayout:
        """What `pack` has written, and the plan of chunks, made for the first layer of the kind."""
        if kind not in self._layouts:
            assert self._forest is not None and self._table is not None, "a kind of layers that no forest has met"
            with torch.inference_mode(False):  # as above
                self._layouts[kind] = self._laid(kind, self._forest, self._table)
        return self._layouts[kind]

    def _laid(self, kind: LayoutKind, forest: Forest, table: Tensor) -> TreeLayout:
        window = kind.window or NO_WINDOW
        if window not in self._windows:
            if len(self._windows) == MOST_WINDOWS:
                raise NotImplementedError(f"its layers have more than {MOST_WINDOWS} different windows")
            self._descriptor.windows[len(self._windows)] = window
            self._windows.append(window)
            self.pack()
        plan = replace(kind, window=None)
        if plan not in self._plans:
            made = forest.plan(plan)
            sizes = self.sizes.most(plan) if self._roomy else {n: len(t) for n, t in _tables(made).items()}
            sections = Sections(**{n: (sizes[n], ITEM_FIELDS) if n == "items" else (sizes[n],) for n in _tables(made)})
            self._plans[plan] = sections, torch.empty(sections.size, dtype=torch.int32, device=self.device)
            fill(self._plans[plan][1], self._plan(forest, plan, sections))
        sections, buffer = self._plans[plan]
        order, positions, lengths, leaves = self._packed.queries[:, : self.sizes.queries]
        partial_rows = self.sizes.most(plan)["partial_rows"] if self._roomy else forest.plan(plan).partial_rows
        return TreeLayout(
            ancestors=self._packed.ancestors[self._windows.index(window), : self.sizes.queries],
            order=order,
            positions=positions,
            lengths=lengths,
            leaves=leaves,
            slots=table.view(-1),
            **sections.views(buffer),
            chunk=table.shape[1],
            tile=kind.tile,
            walk=kind.walk,
            partial_rows=partial_rows,
        )

    def _plan(self, forest: Forest, kind: LayoutKind, sections: Sections) -> Tensor:
        """A plan's tables in one buffer; what is added to them does nothing."""
        made = forest.plan(kind)
        host = np.zeros(sections.size, dtype=np.int32)
        views = sections.views(host)
        for name, table in _tables(made).items():
            views[name][: len(table)] = table
        views["merges"][len(made.merges) :] = len(made.deltas)
        return torch.from_numpy(host)


def _descriptor(sections: Sections, buffer: Any) -> Descriptor:
    views = sections.views(buffer)
    words = views["words"].view(torch.int64 if isinstance(buffer, Tensor) else np.int64)
    return Descriptor(**views | {"words": words})


def _tables(plan: Plan) -> dict[str, np.ndarray]:
    return {"chunks": plan.chunks, "items": plan.items, "merges": plan.merges, "deltas": plan.deltas}


def _packing(device: torch.device) -> Any:
    if device.type == "cpu" and not INTERPRETED:
        from .triton_kernels.reference import pack as twin

        return twin
    from .triton_kernels.pack import pack

    return pack
