"""Steps over small forests as CUDA graphs: forward pass, verification and drafting are one launch instead of hundreds.

A graph reads its inputs where they lay when it was captured. So each has buffers of its own, as large as its size of
forest needs, and a step only copies what the forest is into them. Whatever cannot be captured runs as it did before.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .choice import Choice
from .forest import Forest, LayoutKind
from .kv_pool import KVPool, KVStorage
from .triton_kernels.layout import CHUNK, Sizes, TreeLayout, power_of_two

logger = logging.getLogger(__name__)

MOST_ROWS = 256  # a prompt's rows keep the device busy by themselves
_FIRST_SLOTS = 4096  # what graphs know of the KV pool is its address: it should rarely have to move

# What a forward pass returns, from (forest, pool, taps): see Runtime.forward.
Forward = Callable[["Forest | StaticForest", KVPool, tuple[int, ...]], tuple[Tensor, Tensor]]


def fill(buffer: Tensor, contents: Tensor) -> None:
    """Copies from the CPU without waiting for the device."""
    buffer.copy_(contents.pin_memory() if buffer.is_cuda else contents, non_blocking=True)


class StaticForest:
    """A forest's tensors in buffers that stay where they are, `sizes.queries` rows of them, all verified.

    Attributes as of Forest. Padding repeats the last row but has no slot: nobody sees it, and what comes of it is void.
    """

    def __init__(self, forest: Forest, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self._rows = torch.zeros(4, sizes.queries, dtype=torch.int64, device=device)
        self.input_ids, self.position_ids = self._rows[0:1], self._rows[1:2]
        self.slots, self.verified_rows = self._rows[2], self._rows[3]
        self._layouts: dict[LayoutKind, tuple[Tensor, TreeLayout]] = {}
        self.become(forest)

    def become(self, forest: Forest) -> None:
        """Takes a forest's contents over; it must fit the sizes."""
        rows = np.zeros((4, self.sizes.queries), dtype=np.int64)
        for row, array in zip(rows, forest.arrays, strict=True):
            row[: len(array)], row[len(array) :] = array, array[-1]
        rows[2, len(forest) :] = -1
        fill(self._rows, torch.from_numpy(rows))
        self._forest = forest
        for kind, (buffer, _) in self._layouts.items():
            fill(buffer, kind.plan(forest).padded(self.sizes).flat())

    def layout(self, kind: LayoutKind) -> TreeLayout:
        if kind not in self._layouts:
            padded = kind.plan(self._forest).padded(self.sizes)
            buffer = padded.flat().to(self.device)
            self._layouts[kind] = buffer, padded.over(buffer)
        return self._layouts[kind][1]

    def __len__(self) -> int:
        return self.sizes.queries


class _Captured:
    """One step of one size and kind; `outputs` are logits, hidden states and what was chosen."""

    def __init__(self, forward: Forward, static: StaticForest, taps: tuple[int, ...], choice: Choice | None) -> None:
        self.static, self._forward, self._taps, self._choice = static, forward, taps, choice
        self.graph: torch.cuda.CUDAGraph | None = None
        self._threads = 0 if choice is None else power_of_two(choice.threads)
        self._inputs = None
        if choice is not None:
            self._inputs = choice.inputs(static.sizes.queries, self._threads).to(static.device)

    def become(self, forest: Forest, choice: Choice | None) -> None:
        self.static.become(forest)
        if choice is not None and self._inputs is not None:
            fill(self._inputs, choice.inputs(self.static.sizes.queries, self._threads))

    def run(self, pool: KVPool) -> None:
        logits, hidden = self._forward(self.static, pool, self._taps)
        chosen = None
        if self._choice is not None and self._inputs is not None:
            chosen = self._choice.run(logits, hidden, self._inputs, self._threads)
        self.outputs = logits, hidden, chosen


class GraphedSteps:
    """Runs `forward`, and what is chosen from it, from captured graphs: one for each size of forest.

    On a CPU nothing is captured: the same runs over the same buffers, which is how this is tested.
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

    def __call__(
        self, forest: Forest, pool: KVPool, taps: tuple[int, ...], choice: Choice | None
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """As Runtime.step, good until the next call; None where it has to run without a graph."""
        if self._broken or len(forest) > MOST_ROWS or pool.storage is not self._storage or not self._storage.keys:
            return None
        addresses = tuple(store.data_ptr() for store in self._storage.keys.values())
        if addresses != self._addresses:
            self._captured.clear()
            self._addresses = addresses
        sizes = Sizes.of(forest.leaves(), CHUNK, power_of_two(len(forest)))
        key = (sizes, taps, choice and (choice.operations, power_of_two(choice.threads)))
        captured = self._captured.get(key)
        if captured is None:
            try:
                captured = self._captured[key] = self._capture(forest, sizes, pool, taps, choice)
            except (RuntimeError, NotImplementedError) as error:
                logger.info("steps run without CUDA graphs: %s", error)
                self._broken = True
                self._captured.clear()
                return None
        else:
            captured.become(forest, choice)
        if captured.graph is not None:
            captured.graph.replay()
        else:
            captured.run(pool)
        logits, hidden, chosen = captured.outputs
        verified = len(forest.arrays[3])
        return logits[:verified], hidden[:verified], chosen

    def _capture(
        self, forest: Forest, sizes: Sizes, pool: KVPool, taps: tuple[int, ...], choice: Choice | None
    ) -> _Captured:
        captured = _Captured(self._forward, StaticForest(forest, sizes, self._device), taps, choice)
        if self._device.type != "cuda":
            return captured
        # Before capture everything has to have run once: kernels are compiled then, and libraries find their buffers.
        # It writes the same keys and values to the same slots as the graph will.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                captured.run(pool)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.run(pool)
        captured.graph = graph
        return captured
