"""Where the tokens of live threads' paths lie, chunk by chunk, in a table that stays on the device.

    table, int32 [chunks, 256]    row 0   p0 .. p255              the trunk's, and every path's that goes through it
                                  row 1   p256 .. p300 a0 a1      thread A; behind its path its draft nodes
                                  row 2   p256 .. p290 b0         thread B, forked at p290: p256 .. p290 were copied

A path is a list of row numbers. A child has those of its parent that are complete before its fork, a copy of the one
that the fork lies in (256 slot numbers; no keys or values), and rows of its own from there on. So a step changes few
entries: those of its own rows, and the copies of its forks. Draft nodes that were rejected are written over.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from medusa_apar.threads.paragraph_tree import Thread
from medusa_apar.triton_kernels.layout import CHUNK, MAX_NODES

from .pool import KVStorage

_FIRST_CHUNKS = 256
_NONE = np.zeros(0, dtype=np.int64)


@dataclass(slots=True, eq=False)
class _Path:
    start: int  # the thread's first column
    chunk_ids: array[int]  # of its chunks, from the trunk's first on
    first_own: int  # place of the first chunk that is its own
    written: int = 0  # of the thread's own tokens, how many have their slot in the table


class Changes(NamedTuple):
    """What the device has not heard of: `table.view(-1)[entries] = slots`. int64 [*] both."""

    entries: np.ndarray
    slots: np.ndarray


class PathTable:
    """The chunks of all paths of one ledger.

    The first thread to use a chunk owns it. The chunk is freed once no thread with it on its path holds a slot there.
    The table follows the ledger: it learns of new slots when a forest asks for paths (`place`), and of lost ones at
    once (`truncate`). `slots` on the host is the truth; `on` is its copy on a device, which lacks the changes that were
    handed out and are not yet committed.
    """

    chunk = CHUNK

    def __init__(self, booked: Mapping[Thread, array[int]], storage: KVStorage) -> None:
        self._booked, self._storage = booked, storage
        self.slots = np.zeros((_FIRST_CHUNKS, self.chunk), dtype=np.int32)
        self._free = list(range(_FIRST_CHUNKS))  # a heap
        self._paths: dict[Thread, _Path] = {}
        # The `place` that runs: which columns (first, last) of which path are written, with what, and rows to copy.
        self._chunk_ids: list[array[int]] = []
        self._spans: list[tuple[int, int]] = []
        self._parts: list[Any] = []  # arrays of 64 bits, of either kind
        self._copies: list[tuple[int, int, int]] = []

    def on(self, device: torch.device) -> torch.Tensor:
        """int32 [capacity, chunk]; where it lies changes only when the table has grown."""
        table = self._storage.chunks
        if table is None or len(table) < len(self.slots) or table.shape[1] != self.chunk or not _on(table, device):
            with torch.inference_mode(False):  # it outlives a caller's inference mode, and is written to outside of it
                table = self._storage.chunks = torch.from_numpy(self.slots.copy()).to(device)
        return table

    def chunk_ids(self, thread: Thread) -> array[int]:
        return self._paths[thread].chunk_ids

    def place(self, threads: Iterable[tuple[Thread, np.ndarray]]) -> Changes:
        """Writes what is booked of each thread, and behind it draft nodes (int64 slots); ancestors go first."""
        for thread, drafted in threads:
            self._write(thread, drafted)
        entries, slots = self._entries(), np.frombuffer(b"".join(self._parts), dtype=np.int64)
        flat = self.slots.reshape(-1)
        flat[entries] = slots
        parts: list[tuple[np.ndarray, np.ndarray]] = [(entries, slots)]
        for source, target, columns in self._copies:  # parents before children
            self.slots[target, :columns] = self.slots[source, :columns]
            copied = target * self.chunk + np.arange(columns)
            parts.append((copied, flat[copied]))
        self._chunk_ids, self._spans, self._parts, self._copies = [], [], [], []
        if len(parts) == 1:
            return Changes(entries, slots)
        return Changes(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    def truncate(self, thread: Thread) -> None:
        """The thread has lost slots, or will not write on."""
        path = self._paths.get(thread)
        if path is None:
            return
        length = len(self._booked[thread])
        path.written = min(path.written, length)
        self._resize(path, min(len(path.chunk_ids), self._chunks(thread.start + length)) if length else path.first_own)
        if not length:
            del self._paths[thread]

    def _write(self, thread: Thread, drafted: np.ndarray = _NONE) -> None:
        path = self._paths.get(thread)
        if path is None:
            path = self._paths[thread] = self._begin(thread)
        booked = self._booked[thread]
        length = len(booked)
        self._spans.append((path.start + path.written, last := path.start + length + len(drafted)))
        self._parts += booked[path.written :], drafted
        self._chunk_ids.append(path.chunk_ids)
        path.written = length
        if not 0 <= len(path.chunk_ids) * self.chunk - last < self.chunk:
            self._resize(path, self._chunks(last))

    def _begin(self, thread: Thread) -> _Path:
        parent = thread.parent
        if parent is None:
            return _Path(0, array("i"), 0)
        above = self._paths.get(parent)
        if above is None or above.written < thread.seen:  # what it accepted last, or all of it
            self._write(parent)
            above = self._paths[parent]
        assert above.written >= thread.seen, f"{thread} has a path that is not cached"
        whole, columns = divmod(thread.start, self.chunk)
        path = _Path(thread.start, above.chunk_ids[:whole], whole)
        if columns:
            self._resize(path, whole + 1)
            self._copies.append((above.chunk_ids[whole], path.chunk_ids[whole], columns))
        return path

    def _entries(self) -> np.ndarray:
        """The place in the flat table of every column to be written, int64 [*]."""
        first, last = np.array(self._spans).T
        chunk_ids = np.frombuffer(b"".join(self._chunk_ids), dtype=np.int32)
        chunks = np.array([len(ids) for ids in self._chunk_ids])
        counts = last - first
        span = np.repeat(np.arange(len(counts)), counts)
        column = np.arange(len(span)) - (np.cumsum(counts) - counts - first)[span]
        chunk, place = np.divmod(column, self.chunk)
        entries: np.ndarray = chunk_ids[(np.cumsum(chunks) - chunks)[span] + chunk] * np.int64(self.chunk) + place
        return entries

    def _chunks(self, columns: int) -> int:
        return -(-columns // self.chunk)

    def _resize(self, path: _Path, chunks: int) -> None:
        """Takes or gives back chunks at the path's end."""
        for number in path.chunk_ids[chunks:]:
            heapq.heappush(self._free, number)
        del path.chunk_ids[chunks:]
        for _ in range(chunks - len(path.chunk_ids)):
            if not self._free:
                self._free = list(range(len(self.slots), 2 * len(self.slots)))
                self.slots = np.concatenate([self.slots, np.zeros_like(self.slots)])
            path.chunk_ids.append(heapq.heappop(self._free))

    def check(self, claims: Callable[[Thread], bool]) -> None:
        """Asserts that every chunk in use is one thread's own, reaches no further than that thread's slots, and that
        what was written is what is booked; `claims` as of the ledger."""
        own = [number for path in self._paths.values() for number in path.chunk_ids[path.first_own :]]
        assert len(own) == len(set(own)) == len(self.slots) - len(self._free), "a chunk is leaked or used twice"
        assert set(own).isdisjoint(self._free)
        for thread, path in self._paths.items():
            booked = self._booked.get(thread, ())
            assert len(booked), f"{thread} holds chunks and no slots"
            spare = MAX_NODES if claims(thread) else 0  # draft nodes that were rejected
            assert len(path.chunk_ids) <= self._chunks(thread.start + len(booked) + spare), (
                f"{thread} holds more chunks"
            )
            lineage = [*thread.ancestors(), (thread, path.written)]
            expected = [slot for member, stop in lineage for slot in self._booked[member][:stop]]
            assert self.slots[path.chunk_ids].reshape(-1)[: len(expected)].tolist() == expected, f"{thread} has moved"


def _on(tensor: torch.Tensor, device: torch.device) -> bool:
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)
