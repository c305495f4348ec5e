"""Whether tensors still hold what was copied from them.

torch counts what is written to a tensor, but not what goes through `.data`, as merging an adapter, averaging weights
and most weight surgery do. So the bits are summed up too, at memory speed: 540 MB of the 135M model, 65 ms for one core
at 8 GB/s, which a short call would feel. Of so much a sixteenth is read (7 ms), by turns, and all of it as soon as that
costs no more than a fiftieth of the time since it was last done: every few seconds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import library

TURNS, _LINE = 16, 8  # int64 words of a line, as in `contents.h`
_ALWAYS = 1 << 23  # bytes: half a millisecond
_SHARE = 0.02  # of the time that passes
_PIECE = 1 << 16  # lines that the twin in torch has at hand at once


class Contents:
    """What tensors hold, in sums of their bits.

    A sixteenth has something of every row of a kilobyte and of every column, so what changes whole matrices, rows or
    columns shows in any turn, single values when theirs comes.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        started = time.perf_counter()
        self._places = _places(tensors)
        self._sums = sums(tensors)
        self._bytes = sum(tensor.nbytes for tensor in tensors)
        self._read = time.perf_counter()  # when all was read
        self._seconds = self._read - started
        self._turn = 0

    def same(self, tensors: Sequence[Tensor], entirely: bool = False) -> bool:
        """Whether these are the tensors, with what they held. entirely: all of them is read, whatever it costs."""
        if _places(tensors) != self._places:
            return False
        now = time.perf_counter()
        if entirely or self._bytes <= _ALWAYS or self._seconds <= _SHARE * (now - self._read):
            self._read = now
            return torch.equal(sums(tensors), self._sums)
        turn = self._turn = (self._turn + 1) % TURNS
        return torch.equal(sums(tensors, turn)[:, turn], self._sums[:, turn])


def plain(tensor: Any) -> bool:
    """Whether there are numbers that can be read: neither a quantiser's subclass nor offloaded."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type != "meta"


def _places(tensors: Sequence[Tensor]) -> list[tuple]:
    return [
        (t.data_ptr(), None if t.is_inference() else t._version, t.dtype, t.device, t.shape, t.stride())
        for t in tensors
    ]


def sums(tensors: Sequence[Tensor], turn: int | None = None) -> Tensor:
    """int64 [tensors, TURNS] on the CPU, of one turn or of all; what is not asked for is zero, or is not.

    In compiled code where that is to be had, else by its twin in torch.
    """
    found = torch.zeros(len(tensors), TURNS, dtype=torch.int64, device="cpu")
    if not tensors:
        return found
    if not isinstance(library.outcome(), str) and all(tensor.device.type == "cpu" for tensor in tensors):
        kept = [_bytes(tensor) for tensor in tensors]
        spans = (library.Span * len(kept))(
            *(library.Span(library.address(each, torch.uint8, each.numel()), each.numel()) for each in kept)
        )
        target = library.address(found, torch.int64, len(kept) * TURNS)
        library.library().mapar_sums(spans, len(kept), -1 if turn is None else turn, target, torch.get_num_threads())
    else:
        for row, tensor in enumerate(tensors):
            found[row] = _sums_in_torch(_bytes(tensor))
    return found


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _sums_in_torch(data: Tensor) -> Tensor:
    """As `contents.h` has it, int64 [TURNS]; products and sums wrap in either."""
    total = torch.zeros(TURNS, dtype=torch.int64, device=data.device)
    for first in range(0, len(data), 8 * _LINE * _PIECE):
        piece = data[first : first + 8 * _LINE * _PIECE]
        words = torch.zeros(-(-len(piece) // (8 * _LINE)), _LINE, dtype=torch.int64, device=data.device)
        words.view(-1).view(torch.uint8)[: len(piece)] = piece
        lines = torch.arange(len(words), dtype=torch.int64, device=data.device) + first // (8 * _LINE)
        places = lines[:, None] * 8 + torch.arange(_LINE, dtype=torch.int64, device=data.device)
        words += places * _signed(0x9E3779B97F4A7C15)
        words ^= words >> 32 & 0xFFFFFFFF
        words *= _signed(0x2545F4914F6CDD1D)
        words ^= words >> 29 & 0x7FFFFFFFF
        total.index_add_(0, (lines - lines // TURNS) % TURNS, words.sum(1))
    return total.cpu()


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
