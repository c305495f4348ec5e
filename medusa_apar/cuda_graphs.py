"""Forward passes over small forests as CUDA graphs: one launch instead of some hundred.

A graph reads its inputs where they lay when it was captured. So each has buffers of its own, as large as its size of
forest needs, and a step only copies what the forest is into them. Whatever cannot be captured runs as it did before.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .forest import Forest, LayoutKind
from .kv_pool import KVPool, KVStorage
from .triton_kernels.layout import CHUNK, Sizes, TreeLayout

logger = logging.getLogger(__name__)

MOST_ROWS = 256  # a prompt's rows keep the device busy by themselves
_FIRST_SLOTS = 4096  # what graphs know of the KV pool is its address: it should rarely have to move

# What a forward pass returns, from (forest, pool, taps): see Runtime.forward.
Forward = Callable[["Forest | StaticForest", KVPool, tuple[int, ...]], tuple[Tensor, Tensor]]


class StaticForest:
    """A forest's tensors in buffers that stay where they are, `sizes.queries` rows of them, all verified.

    Attributes as of Forest. Padding repeats the last row but has no slot: nobody sees it, and what comes of it is void.
    """

    def __init__(self, forest: Forest, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self._device = sizes, device
        self._rows = torch.zeros(4, sizes.queries, dtype=torch.int64, device=device)
        self.input_ids, self.position_ids = self._rows[0:1], self._rows[1:2]
        self.slots, self.verified_rows = self._rows[2], self._rows[3]
        self._layouts: dict[LayoutKind, tuple[Tensor, TreeLayout]] = {}
        self.become(forest)

    def become(self, forest: Forest) -> None:
        """Takes a forest's contents over; it must fit the sizes."""
        rows = [forest.input_ids[0], forest.position_ids[0], forest.slots, forest.verified_rows]
        queries = self.sizes.queries
        self._rows.copy_(torch.stack([torch.cat([row, row[-1:].expand(queries - len(row))]) for row in rows]))
        self.slots[len(forest) :] = -1
        self._forest = forest
        for kind, (buffer, _) in self._layouts.items():
            flat = kind.plan(forest).padded(self.sizes).flat()
            buffer.copy_(flat.pin_memory() if buffer.is_cuda else flat, non_blocking=True)

    def layout(self, kind: LayoutKind) -> TreeLayout:
        if kind not in self._layouts:
            padded = kind.plan(self._forest).padded(self.sizes)
            buffer = padded.flat().to(self._device)
            self._layouts[kind] = buffer, padded.over(buffer)
        return self._layouts[kind][1]

    def __len__(self) -> int:
        return self.sizes.queries


@dataclass(slots=True, eq=False)
class _Captured:
    forest: StaticForest
    graph: torch.cuda.CUDAGraph | None
    logits: Tensor
    hidden: Tensor


class GraphedForward:
    """Runs `forward` from captured graphs, a graph a size of forest.

    On a CPU nothing is captured: `forward` runs over the same buffers, which is how this is tested.
    """

    def __init__(self, forward: Forward, device: torch.device) -> None:
        self._forward, self._device = forward, device
        self._storage = KVStorage()
        self._user: weakref.ref[KVPool] | None = None
        self._captured: dict[tuple, _Captured] = {}
        self._addresses: tuple[int, ...] = ()
        self._broken = False

    def pool(self, max_slots: int | None) -> KVPool:
        """A pool where the graphs expect it, or one of its own while another call has that."""
        if self._user is not None and self._user() is not None:
            return KVPool(max_slots)
        pool = KVPool(max_slots, self._storage, first=_FIRST_SLOTS)
        self._user = weakref.ref(pool)
        return pool

    def __call__(self, forest: Forest, pool: KVPool, taps: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
        """What `forward` returns, good until the next call; None where it has to run without a graph."""
        if self._broken or len(forest) > MOST_ROWS or pool.storage is not self._storage or not self._storage.keys:
            return None
        addresses = tuple(store.data_ptr() for store in self._storage.keys.values())
        if addresses != self._addresses:
            self._captured.clear()
            self._addresses = addresses
        sizes = Sizes.of(forest.leaves(), CHUNK, 1 << (len(forest) - 1).bit_length())
        captured = self._captured.get((sizes, taps))
        if captured is None:
            try:
                captured = self._captured[sizes, taps] = self._capture(forest, sizes, pool, taps)
            except (RuntimeError, NotImplementedError) as error:
                logger.info("steps run without CUDA graphs: %s", error)
                self._broken = True
                self._captured.clear()
                return None
        else:
            captured.forest.become(forest)
            if captured.graph is None:
                captured.logits, captured.hidden = self._forward(captured.forest, pool, taps)
        if captured.graph is not None:
            captured.graph.replay()
        verified = len(forest.verified_rows)
        return captured.logits[:verified], captured.hidden[:verified]

    def _capture(self, forest: Forest, sizes: Sizes, pool: KVPool, taps: tuple[int, ...]) -> _Captured:
        static = StaticForest(forest, sizes, self._device)
        if self._device.type != "cuda":
            return _Captured(static, None, *self._forward(static, pool, taps))
        # Before capture everything has to have run once: kernels are compiled then, and libraries find their buffers.
        # It writes the same keys and values to the same slots as the graph will.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._forward(static, pool, taps)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits, hidden = self._forward(static, pool, taps)
        return _Captured(static, graph, logits, hidden)
