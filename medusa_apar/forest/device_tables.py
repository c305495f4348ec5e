"""A forest on the device as the kernels read it: one buffer a step and one a plan of chunks, the rest made there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from medusa_apar.triton_kernels.layout import (
    INTERPRETED,
    ITEM_FIELDS,
    MAX_WINDOWS,
    NO_WINDOW,
    LayoutKind,
    Plan,
    Sections,
    Sizes,
    TreeLayout,
    aligned,
)
from medusa_apar.triton_kernels.reference import Descriptor, Packed

if TYPE_CHECKING:
    from .forest import Forest


def fill(buffer: Tensor, contents: Tensor) -> None:
    """Copies from the CPU without waiting for the device."""
    buffer.copy_(contents.pin_memory() if buffer.is_cuda else contents, non_blocking=True)


class PackedForest:
    """Buffers for forests of some sizes.

    reusable: they serve every forest of these sizes, and stay where they are; else this one alone. Padding rows have
    slot -1: no query attends to them, and their outputs are ignored.

    Attributes: `descriptor` and `packed`, what the kernel reads and writes; `rows`, int64 [4, queries] of that: input
    ids, position ids, slots, verified rows.
    """

    def __init__(self, sizes: Sizes, device: torch.device, reusable: bool, commits: int) -> None:
        self.sizes, self.device, self._roomy = sizes, device, reusable
        self._width = width = aligned(sizes.queries)
        sections = Sections(
            rows=(4, width),
            words=(2 * width,),
            queries=(sizes.leaves + 2,),  # one leaf more: the rows that only fill up
            leaves=(sizes.leaves + 1, 3),
            commits=(2, aligned(commits)),
            windows=(MAX_WINDOWS,),
        )
        with torch.inference_mode(False):  # buffers outlive a caller's inference mode
            self._buffer = torch.empty(sections.size, dtype=torch.int32, device=device)
            self.descriptor: Descriptor = _descriptor(sections, self._buffer)
            wide = torch.empty(4, width, dtype=torch.int64, device=device)
            per_query = torch.empty(4, width, dtype=torch.int32, device=device)
            words = torch.empty(MAX_WINDOWS, width, dtype=torch.int64, device=device)
            self.packed = Packed(wide, per_query, words)
            self.rows = wide[:, : sizes.queries]
        self._host = np.zeros(sections.size, dtype=np.int32)
        self._contents = _descriptor(sections, self._host)
        self._windows: list[int] = []
        self._plans: dict[LayoutKind, _PlanBuffer] = {}  # of kinds without their windows
        self._layouts: dict[LayoutKind, TreeLayout] = {}
        self._table: Tensor | None = None

    def load(self, forest: Forest) -> None:
        """Takes a forest's contents over; it must fit the sizes. `pack` has to follow."""
        self._table = forest.table
        rows, words, queries, fields, commits, windows = self._contents
        self._host[:] = 0
        for row, array in zip(rows, forest.arrays, strict=True):
            row[: len(array)] = array
        rows[2, len(forest) :] = -1
        words[: len(forest)] = forest.words
        leaves = forest.leaves
        count = len(leaves)
        queries[: count + 1], queries[count + 1 :] = leaves.queries, self._width
        fields[:count], fields[count] = leaves.fields, (len(forest), self._width, 0)
        windows[: len(self._windows)] = self._windows
        entries, slots = forest.changes
        if len(entries) > commits.shape[1]:  # several forks at once, each with a copy of a chunk
            both = torch.empty(2, len(entries), dtype=torch.int64, device=self.device)
            fill(both, torch.from_numpy(np.stack([entries, slots])))
            self._table.view(-1)[both[0]] = both[1].int()
            entries = slots = entries[:0]
        commits[0, : len(entries)], commits[0, len(entries) :] = entries, -1
        commits[1, : len(entries)] = slots
        for kind, buffer in self._plans.items():
            buffer.load(forest.plan(kind))
        self.send()

    def send(self) -> None:
        """Host to device, without waiting."""
        fill(self._buffer, torch.from_numpy(self._host))
        for buffer in self._plans.values():
            buffer.send()

    @property
    def sent(self) -> int:
        """Bytes that a step copies to the device."""
        return self._buffer.nbytes + sum(plan.buffer.nbytes for plan in self._plans.values())

    def pack(self) -> None:
        """One launch: slots into the table, and what else goes by rows and queries."""
        assert self._table is not None, "`load` goes first"
        _packing(self.device)(self.descriptor, self._table, self.packed)

    def layout(self, kind: LayoutKind, forest: Forest | None) -> TreeLayout:
        """What `pack` has written, and the plan of chunks. A kind's first layer must say of which forest: nothing here
        keeps one, and with it the KV pool that its slots are booked in."""
        if kind not in self._layouts:
            assert forest is not None and self._table is not None, "a kind of layers that no forest has met"
            with torch.inference_mode(False):  # as above
                self._layouts[kind] = self._laid(kind, forest, self._table)
        return self._layouts[kind]

    def _laid(self, kind: LayoutKind, forest: Forest, table: Tensor) -> TreeLayout:
        window = kind.window or NO_WINDOW
        if window not in self._windows:
            if len(self._windows) == MAX_WINDOWS:
                raise NotImplementedError(f"its layers have more than {MAX_WINDOWS} different windows")
            self.descriptor.windows[len(self._windows)] = window
            self._windows.append(window)
            self.pack()
        plan = replace(kind, window=None)
        if plan not in self._plans:
            made = forest.plan(plan)
            self._plans[plan] = _PlanBuffer(self.sizes.most(plan) if self._roomy else made.sizes, self.device)
            self._plans[plan].load(made)
            self._plans[plan].send()
        order, positions, lengths, leaves = self.packed.queries[:, : self.sizes.queries]
        return TreeLayout(
            ancestors=self.packed.ancestors[self._windows.index(window), : self.sizes.queries],
            order=order,
            positions=positions,
            lengths=lengths,
            leaves=leaves,
            slots=table.view(-1),
            **self._plans[plan].views,
            chunk=table.shape[1],
            tile=kind.tile,
            walk=kind.walk,
            partial_rows=self._plans[plan].partial_rows,
        )


class _PlanBuffer:
    """The tables of a plan of chunks in one buffer; what it has room for beyond them does nothing."""

    def __init__(self, sizes: dict[str, int], device: torch.device) -> None:
        self.partial_rows = sizes["partial_rows"]
        shapes = {name: (size,) for name, size in sizes.items() if name != "partial_rows"}
        sections = Sections(**shapes | {"items": (sizes["items"], ITEM_FIELDS)})
        self.buffer = torch.empty(sections.size, dtype=torch.int32, device=device)
        self.views = sections.views(self.buffer)
        self._host = np.zeros(sections.size, dtype=np.int32)
        self._contents = sections.views(self._host)

    def load(self, plan: Plan) -> None:
        chunks, items, merges, deltas = (self._contents[name] for name in ("chunks", "items", "merges", "deltas"))
        chunks[: len(plan.chunks)], deltas[: len(plan.deltas)] = plan.chunks, plan.deltas
        items[: len(plan.items)], items[len(plan.items) :] = plan.items, 0
        merges[: len(plan.merges)], merges[len(plan.merges) :] = plan.merges, len(plan.deltas)

    def send(self) -> None:
        fill(self.buffer, torch.from_numpy(self._host))


def _descriptor(sections: Sections, buffer: Any) -> Any:  # of either kind
    views = sections.views(buffer)
    words = views["words"].view(torch.int64 if isinstance(buffer, Tensor) else np.int64)
    return Descriptor(**views | {"words": words})


def _packing(device: torch.device) -> Any:
    if device.type == "cpu" and not INTERPRETED:
        from medusa_apar.triton_kernels.reference import pack as twin

        return twin
    from medusa_apar.triton_kernels.pack import pack

    return pack
