"""Steps over small forests as CUDA graphs: forward pass, verification and drafting are one launch instead of hundreds.

A graph reads its inputs where they lay when it was captured. So each has buffers of its own, as large as its size of
forest needs, and a step only copies what the forest is into them. Whatever cannot be captured runs as it did before.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from medusa_apar.forest.device_tables import PackedForest, fill
from medusa_apar.forest.forest import Forest
from medusa_apar.kv.pool import KVPool, KVStorage
from medusa_apar.triton_kernels.layout import CHUNK, LayoutKind, Sizes, TreeLayout, power_of_two
from medusa_apar.verify.device_verify import DeviceVerify
from medusa_apar.verify.tail import StepOutput

from .capture import Kept

logger = logging.getLogger(__name__)

MAX_ROWS = 256  # a prompt's rows keep the device busy by themselves
MAX_GRAPHS = 64  # kept at once, those used last
_FIRST_SLOTS = 4096  # what graphs know of the KV pool is its address: it should rarely have to move

# Logits, hidden states and, where there are boundaries, states: see StepOutput.
Forward = Callable[["Forest | StaticForest", KVPool, Kept], tuple[Tensor, Tensor, Tensor | None]]


class StaticForest:
    """A forest's tensors in buffers that stay where they are, `sizes.queries` rows of them, all verified.

    Attributes as of Forest. `pack` fills them from what `load` has sent, so it is part of what a graph does.
    """

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        # Of a step's forks one can hand over a chunk of slots; more go another way.
        self._packed = PackedForest(sizes, device, reusable=True, commits=sizes.queries + CHUNK)
        self._forest: Forest | None = None  # while layers may still ask for a kind of layout for the first time
        rows = self._packed.rows
        self.input_ids, self.position_ids, self.slots, self.verified_rows = rows[0:1], rows[1:2], rows[2], rows[3]

    def load(self, forest: Forest) -> None:
        """Takes a forest's contents over; it must fit the sizes."""
        self._packed.load(forest)
        self._forest = forest

    def pack(self) -> None:
        self._packed.pack()

    def forget(self) -> None:
        """Lets go of the forest, and with it of the KV pool that its slots are booked in."""
        self._forest = None

    def layout(self, kind: LayoutKind) -> TreeLayout:
        return self._packed.layout(kind, self._forest)

    def __len__(self) -> int:
        return self.sizes.queries


class _Step:
    """One size and kind of step in buffers of its own; `outputs` are logits, hidden states and what was chosen."""

    def __init__(self, forward: Forward, sizes: Sizes, device: torch.device, kept: Kept) -> None:
        self._forward, self._kept = forward, kept
        self._forest = StaticForest(sizes, device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self._device_verify: DeviceVerify | None = None
        self._inputs: Tensor | None = None
        self.outputs: StepOutput

    def load(self, forest: Forest, device_verify: DeviceVerify | None) -> None:
        self._forest.load(forest)
        if device_verify is None:
            return
        inputs = device_verify.inputs(self._forest.sizes.queries, power_of_two(device_verify.num_threads))
        if self._inputs is None:
            # Segments would keep the KV pool, and with it the next call from using the graphs.
            self._device_verify = replace(device_verify, segments=[])
            self._inputs = inputs.to(self._forest.device)
        else:
            fill(self._inputs, inputs)

    def run(self, pool: KVPool) -> None:
        self._forest.pack()
        logits, hidden, states = self._forward(self._forest, pool, self._kept)
        chosen = None
        if self._device_verify is not None and self._inputs is not None:
            chosen = self._device_verify.run(
                logits, hidden, self._inputs, power_of_two(self._device_verify.num_threads)
            )
        self.outputs = StepOutput(logits, hidden, chosen, states)

    def replay(self, pool: KVPool) -> None:
        try:
            if self.graph is None:
                self.run(pool)
            else:
                self.graph.replay()
        finally:
            self._forest.forget()


class GraphedSteps:
    """Runs `forward`, and what is chosen from it, from captured graphs: one for each size of forest.

    On a CPU nothing is captured: the same runs over the same buffers, which is how this is tested.
    """

    def __init__(self, forward: Forward, device: torch.device) -> None:
        self._forward, self._device = forward, device
        self._storage = KVStorage()
        self._user: weakref.ref[KVPool] | None = None
        self._steps: OrderedDict[tuple, _Step] = OrderedDict()
        self._weights: Hashable = None
        self._broken = False
        self._lock = threading.Lock()
        self._memory: Any = None  # of all graphs, which never run at the same time
        self._stream: torch.cuda.Stream | None = None

    def pool(self, max_slots: int | None, weights: Hashable) -> KVPool:
        """A pool where the graphs expect it, or one of its own while another call has that.

        weights: tells apart where the model's weights lie; graphs and storage made over others are dropped.
        """
        with self._lock:
            if self._user is not None and self._user() is not None:
                return KVPool(max_slots)
            if weights != self._weights:
                self._steps.clear()
                self._storage, self._weights = KVStorage(), weights
            pool = KVPool(max_slots, self._storage, first=_FIRST_SLOTS)
            self._user = weakref.ref(pool)
            return pool

    def __call__(
        self, forest: Forest, pool: KVPool, kept: Kept, device_verify: DeviceVerify | None
    ) -> StepOutput | None:
        """As Runtime.step, good until the next call; None where it has to run without a graph."""
        if self._broken or len(forest) > MAX_ROWS or pool.storage is not self._storage or not self._storage.keys:
            return None
        stores, drafter = (self._storage.keys, self._storage.values), self._storage.first_draft_layer
        base = (tensor for store in stores for layer, tensor in store.items() if drafter is None or layer < drafter)
        slots = (forest.table.data_ptr(), *(tensor.data_ptr() for tensor in base))
        sizes = Sizes.of(forest.leaves).rounded()
        key = (
            sizes,
            kept,
            device_verify and (device_verify.operations, power_of_two(device_verify.num_threads)),
            slots,
        )
        step = self._steps.get(key)
        if step is None:
            step = self._made(forest, sizes, pool, kept, device_verify)
            if step is None:
                return None
            self._steps[key] = step
            if len(self._steps) > MAX_GRAPHS:
                self._steps.popitem(last=False)
        else:
            step.load(forest, device_verify)
        self._steps.move_to_end(key)
        step.replay(pool)
        logits, hidden, chosen, states = step.outputs
        verified = len(forest.arrays[3])
        return StepOutput(
            logits[:verified], hidden[:verified], chosen, None if states is None else states[: len(forest)]
        )

    def _made(
        self,
        forest: Forest,
        sizes: Sizes,
        pool: KVPool,
        kept: Kept,
        device_verify: DeviceVerify | None,
    ) -> _Step | None:
        before = torch.cuda.current_stream() if self._device.type == "cuda" else None
        try:
            # Buffers outlive a caller's inference mode, outside of which such tensors could not be filled again.
            with self._lock, torch.inference_mode(False), torch.no_grad():
                step = _Step(self._forward, sizes, self._device, kept)
                step.load(forest, device_verify)
                if before is not None:
                    self._capture(step, pool)
                return step
        except torch.cuda.OutOfMemoryError:
            self._steps.clear()
            logger.info("a step runs without its CUDA graph: no memory for it")
        except (RuntimeError, NotImplementedError) as error:
            logger.info("steps run without CUDA graphs: %s", error)
            self._broken = True
            self._steps.clear()
        finally:
            if before is not None:  # a capture that failed leaves its own stream behind
                torch.cuda.set_stream(before)
        return None

    def _capture(self, step: _Step, pool: KVPool) -> None:
        """Before capture everything has to have run: kernels are compiled then, and libraries find their buffers. What
        waits for the device is found out there too, where that harms nothing. Each run writes the same keys and values
        to the same slots."""
        if self._stream is None:
            self._stream, self._memory = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            step.run(pool)
            mode = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                step.run(pool)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"):
            step.run(pool)
        step.graph = graph
