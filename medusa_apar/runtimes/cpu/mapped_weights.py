"""Weights that lie in a file mapped into memory, as transformers reads safetensors: unwritten, they are what it holds.

The kernel keeps such a mapping private: a page that is written to is copied first, and counts from then on as the
process's own. It tells which pages are (`/proc/self/pagemap`), so two gigabytes are known to be unchanged in
milliseconds and without one of their pages in memory, and pages that are not needed for now can be dropped. Only Linux
tells; elsewhere nothing counts as mapped.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import mmap
import os
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .library import address

_PRESENT, _SWAPPED, _OF_FILE = (1 << bit for bit in (63, 62, 61))  # of an entry of pagemap
_DONTNEED = 4  # of madvise(2)
_ENTRIES = 1 << 17  # of pagemap that are read at once: a megabyte


class MappedWeights:
    """Tensors that lie in private mappings of files, as long as no page that they touch has been written to."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._files: dict[_MappedFile, list[int]] = {}  # and which tensors lie there
        found: dict[_Mapping, list[int]] = {}
        mappings = _mappings() if _kernel_tells() else []
        for index, tensor in enumerate(tensors):
            mapping = _mapping_of(tensor, mappings)
            if mapping is not None:
                found.setdefault(mapping, []).append(index)
        for mapping, indices in found.items():
            file = _MappedFile(mapping, [tensors[index] for index in indices])
            if file.is_unwritten():
                self._files[file] = indices

    def unchanged(self) -> set[int]:
        """Indices of tensors that certainly hold what they held when this was made; of a file all or none."""
        return {index for file, indices in self._files.items() if file.is_unwritten() for index in indices}

    def release(self) -> None:
        """Drops the pages of unchanged tensors from this process's memory; whoever reads them has them back.

        What another Python thread writes to them at this very moment may be lost: for a model that nobody else holds.
        """
        for file in self._files:
            if file.is_unwritten():
                file.release()


class _Mapping(NamedTuple):
    start: int
    end: int
    path: str


class _MappedFile:
    def __init__(self, mapping: _Mapping, tensors: Sequence[Tensor]) -> None:
        self._path = mapping.path
        self._state = _state(mapping.path)
        starts = [tensor.data_ptr() for tensor in tensors]
        ends = [start + tensor.nbytes for start, tensor in zip(starts, tensors, strict=True)]
        size = mmap.PAGESIZE
        self._start, self._end = min(starts) // size * size, min(-(-max(ends) // size) * size, mapping.end)
        # While it is held, nothing else can come to lie at these addresses.
        self._storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}

    def is_unwritten(self) -> bool:
        return self._state is not None and _state(self._path) == self._state and _is_unwritten(self._start, self._end)

    def release(self) -> None:
        for storage in self._storages.values():
            whole = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
            first = address(whole, torch.uint8, whole.numel())
            start, end = max(first, self._start), min(first + whole.numel(), self._end)
            start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
            if start < end:
                ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)


def _state(path: str) -> tuple[int, ...] | None:
    """What changes when somebody writes to a file or puts another in its place."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _mappings() -> list[_Mapping]:
    """This process's private mappings of files, by address."""
    found = []
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields = line.rstrip("\n").split(None, 5)
            if len(fields) == 6 and fields[1].endswith("p") and fields[5].startswith("/"):
                start, end = (int(word, 16) for word in fields[0].split("-"))
                found.append(_Mapping(start, end, fields[5]))
    return found


def _mapping_of(tensor: Tensor, mappings: Sequence[_Mapping]) -> _Mapping | None:
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    start = tensor.data_ptr()
    place = bisect.bisect_right(mappings, start, key=lambda mapping: mapping.start) - 1
    if place < 0 or not tensor.nbytes or start + tensor.nbytes > mappings[place].end:
        return None
    return mappings[place]


def _is_unwritten(start: int, end: int) -> bool:
    """Whether none of these pages is the process's own."""
    first, count = start // mmap.PAGESIZE, (end - start) // mmap.PAGESIZE
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(8 * first)
            while count:
                entries = np.frombuffer(file.read(8 * min(count, _ENTRIES)), dtype=np.uint64)
                own = (entries & (_PRESENT | _SWAPPED) != 0) & (entries & _OF_FILE == 0)
                if not len(entries) or own.any():
                    return False
                count -= len(entries)
    except (OSError, ValueError):
        return False
    return True


@functools.cache
def _kernel_tells() -> bool:
    """Tried on a file of two pages: a sandbox may have a /proc that says other things, or nothing."""
    try:
        with tempfile.TemporaryFile() as file:
            file.write(bytes(2 * mmap.PAGESIZE))
            file.flush()
            tried = mmap.mmap(file.fileno(), 2 * mmap.PAGESIZE, access=mmap.ACCESS_COPY)
        read = torch.from_numpy(np.frombuffer(tried, dtype=np.uint8))
        first, size = address(read, torch.uint8, len(tried)), mmap.PAGESIZE
        before = int(read.sum()), _is_unwritten(first, first + 2 * size)
        read[size] = 1
        return before == (0, True) and _is_unwritten(first, first + size) and not _is_unwritten(first, first + 2 * size)
    except (OSError, ValueError, AttributeError):
        return False
