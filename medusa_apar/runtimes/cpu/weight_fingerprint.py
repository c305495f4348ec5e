"""Whether tensors still hold what was copied from them.

torch counts what is written to a tensor, but not what is written through `.data`, as merging an adapter, averaging
weights and most weight surgery do. So the bits are summed up too. That runs at memory speed, yet the 540 MB of the 135M
model take 65 ms (one core, 8 GB/s), too much for a short call. Each call therefore reads one sixteenth of large weights
(7 ms), another one every time. All is read when that takes less than a fiftieth of the time since it was last done,
which is every few seconds. Without a compiler torch does the same at 1 GB/s. Weights that are mapped from a file and
were never written to are not read at all (`mapped_weights.py`); the first call that finds one written reads all of it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import library
from .mapped_weights import MappedWeights

TURNS, _LINE = 16, 8  # int64 words of a line, as in `weight_fingerprint.h`
_SQUARE = TURNS * TURNS * _LINE  # words of TURNS stretches, behind which a turn has the same lines again
_PLACES = 0x9E3779B97F4A7C15
_ALWAYS = 1 << 23  # bytes: half a millisecond
_SHARE = 0.02  # of the time that passes
# Words that the twin in torch has at hand at once: few enough for a core's cache, where torch takes one thread.
_PIECE, _PIECE_ON_GPU = 1 << 14, 1 << 22


class WeightFingerprint:
    """What tensors hold, in sums of their bits.

    A turn reads a sixteenth of them, some of every column and of every row that is a kilobyte long. So a change of a
    whole matrix, row or column shows in any turn; a change of a single value shows when its turn comes.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._places = places(tensors)
        self._mapped = MappedWeights(tensors)
        self._unwritten = self._mapped.unchanged()  # when last looked at; what leaves it is read entirely, once
        started = time.perf_counter()
        self._sums = sums(tensors)
        self._read = time.perf_counter()  # when all was read, but for what is certainly unchanged
        self._seconds = self._read - started  # that took
        self._turn = 0

    def matches(self, tensors: Sequence[Tensor], entirely: bool = False) -> bool:
        """Whether these are the tensors, with what they held. entirely: all of them is read, whatever it costs."""
        if places(tensors) != self._places:
            return False
        unwritten = self._mapped.unchanged()
        rows = [row for row in range(len(tensors)) if row not in unwritten]
        left, kept = [tensors[row] for row in rows], self._sums[rows]
        started = time.perf_counter()
        everything = (
            entirely
            or not self._unwritten <= unwritten
            or self._seconds <= _SHARE * (started - self._read)
            or sum(tensor.nbytes for tensor in left) <= _ALWAYS
        )
        if everything:
            same = torch.equal(sums(left), kept)
            self._read = time.perf_counter()
            self._seconds = self._read - started  # the first time may have waited for a disk
        else:
            turn = self._turn = (self._turn + 1) % TURNS
            same = torch.equal(sums(left, turn)[:, turn], kept[:, turn])
        if same:  # else the next call reads all of what was written, too
            self._unwritten = unwritten
        return same

    @property
    def name(self) -> str:
        """The same for tensors that hold the same, wherever they lie; else another, as 16 sums of 64 bits each tell."""
        shapes = [(dtype, tuple(shape)) for *_, dtype, _, shape, _ in self._places]
        return hashlib.sha256(repr((shapes, self._sums.tolist())).encode()).hexdigest()

    def release(self) -> None:
        """Drops pages of weights that are mapped from a file: `MappedWeights.release` says when that may be."""
        self._mapped.release()


def plain(tensor: Any) -> bool:
    """Whether there are numbers that can be read: neither a quantiser's subclass nor offloaded."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type != "meta"


def places(tensors: Sequence[Tensor]) -> list[tuple]:
    """Where tensors lie, in which shape, and how many writes torch has counted."""
    return [
        (t.data_ptr(), None if t.is_inference() else t._version, t.dtype, t.device, t.shape, t.stride())
        for t in tensors
    ]


def sums(tensors: Sequence[Tensor], turn: int | None = None) -> Tensor:
    """int64 [tensors, TURNS] on the CPU; with `turn` only this turn's lines are read, and the other columns are zero.

    In compiled code where that is to be had, else by its twin in torch.
    """
    found = torch.zeros(len(tensors), TURNS, dtype=torch.int64, device="cpu")
    if not tensors:
        return found
    kept = [_bytes(tensor) for tensor in tensors]
    if not isinstance(library.outcome(), str) and all(tensor.device.type == "cpu" for tensor in tensors):
        spans = (library.Span * len(kept))(
            *(library.Span(library.address(each, torch.uint8, each.numel()), each.numel()) for each in kept)
        )
        target = library.address(found, torch.int64, len(kept) * TURNS)
        library.library().mapar_sums(spans, len(kept), -1 if turn is None else turn, target, torch.get_num_threads())
        return found
    for device in {tensor.device for tensor in tensors}:  # read back once each
        rows = [row for row, tensor in enumerate(tensors) if tensor.device == device]
        found[rows] = torch.stack([_sums_in_torch(kept[row], turn) for row in rows]).cpu()
    return found


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _sums_in_torch(data: Tensor, turn: int | None = None) -> Tensor:
    """A row of `sums`, where the data is. Shifts of an int64 bring in its sign, which the code in C++ does not have."""
    if data.storage_offset() % 8:  # cannot be seen as words
        data = data.clone()
    length = _PIECE if data.device.type == "cpu" else _PIECE_ON_GPU
    length = min(length * (1 if turn is None else TURNS), -(-len(data) // (8 * _SQUARE)) * _SQUARE)  # words
    squares = torch.arange(length // _SQUARE, dtype=torch.int64, device=data.device)[:, None, None] * _SQUARE
    square = torch.arange(_SQUARE, dtype=torch.int64, device=data.device)
    places = squares + _of_turn(square, turn) if turn is not None else (squares + square).view(-1)
    spread = places * _signed(_PLACES)
    total = torch.zeros_like(places)
    whole = len(data) // (8 * _SQUARE) * _SQUARE
    pieces = [(first, min(first + length, whole)) for first in range(0, whole, max(length, 1))]
    for first, end in [*pieces, (whole, -(-len(data) // 8))]:
        piece, left = data[8 * first : 8 * end], -len(data[8 * first : 8 * end]) % (8 * _SQUARE)
        if left:
            piece = F.pad(piece, (0, left))
        words = _of_turn(piece.view(torch.int64), turn)
        words = words + spread[: len(words)]
        words += _signed(first * _PLACES)
        words ^= words >> 32 & 0xFFFFFFFF
        words *= _signed(0x2545F4914F6CDD1D)
        words ^= words >> 29 & 0x7FFFFFFFF
        if left:
            words.masked_fill_(places[: len(words)] >= -(-(end - first) // _LINE) * _LINE, 0)
        total[: len(words)] += words
    if turn is not None:
        return F.pad(total.sum()[None], (turn, TURNS - 1 - turn))
    by_line = total.view(-1, TURNS, TURNS, _LINE).sum((0, 3))  # [stretch, line]
    return torch.stack([by_line.roll(-each, 1).diagonal().sum() for each in range(TURNS)])


def _of_turn(words: Tensor, turn: int | None) -> Tensor:
    """What a turn has of words in whole squares, [squares, word of a line, stretch]; None: everything, as it is."""
    if turn is None:
        return words
    squares = words.view(-1, TURNS, TURNS, _LINE)  # stretch, line
    return torch.cat([squares.diagonal(turn, 1, 2), squares.diagonal(turn - TURNS, 1, 2)], dim=2)


def _signed(word: int) -> int:
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word
