"""What the base puts out along the rows that a drafter is trained on: computed once, and kept while there is room."""

from __future__ import annotations

import threading

import psutil
from torch import Tensor

from medusa_apar.finetune.packing import PackedRow

from .heads import Eagle3Heads
from .losses import base_states

# States may fill this share of the free memory: 8 GB hold 1.7 million tokens of a base that is 576 wide.
MEMORY_SHARE = 1 / 3


class StateCache:
    """The base's states along rows. In memory and not on the disk: a run that goes on makes them anew, all the same.

    processes: that share the memory. room: bytes; None: their part of what is free. A GPU keeps none: its memory is
    dear, and the base's pass is quick there.
    """

    def __init__(self, heads: Eagle3Heads, processes: int = 1, room: int | None = None) -> None:
        self._heads = heads
        if room is None:
            room = int(MEMORY_SHARE * psutil.virtual_memory().available / processes)
        self._left = room if heads.base.device.type == "cpu" else 0
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # by the row's identity
        self._rows: list[PackedRow] = []  # of these, which must stay for that
        self._lock = threading.Lock()

    def of(self, row: PackedRow) -> tuple[Tensor, Tensor]:
        """[N, boundaries * H], and [N, H] before the unembedding, on the base's device."""
        with self._lock:
            kept = self._kept.get(id(row))
        if kept is not None:
            return kept
        found = base_states(self._heads, row.to(self._heads.base.device))
        size = sum(each.nbytes for each in found)
        with self._lock:
            if size <= self._left:
                self._left -= size
                self._kept[id(row)] = found
                self._rows.append(row)
        return found
