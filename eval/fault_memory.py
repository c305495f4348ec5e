"""Whether a process's memory grows with what happens to it, once it has what it needs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

BOUND = 32 << 20  # bytes that it may grow by: allocators keep some
_WARM_UP = 4  # one in so many looks, and one at least, is of a process that still takes what it will keep
_MIDDLE = 3  # looks at either end, whose median counts


@dataclass(frozen=True, slots=True)
class Growth:
    """Bytes when the warm-up was over, at the end, and by which they rose with a thousand faults (least squares)."""

    warm: int
    end: int
    per_thousand_faults: float

    @property
    def too_much(self) -> bool:
        return self.end - self.warm > BOUND

    def __str__(self) -> str:
        return (
            f"memory has grown from {self.warm} bytes behind the warm-up to {self.end} at the end, "
            f"{self.per_thousand_faults:.0f} with a thousand faults; {BOUND} more are taken"
        )


def growth(memory: Sequence[int], faults: Sequence[int]) -> Growth | None:
    """memory: bytes, look by look. faults: so far at each look. None where there are fewer than two behind the
    warm-up."""
    warm_up = max(len(memory) // _WARM_UP, 1)
    looks, counted = memory[warm_up:], faults[warm_up:]
    if len(looks) < 2:
        return None
    few = min(_MIDDLE, len(looks) // 2)
    slope = statistics.linear_regression(counted, looks).slope if len(set(counted)) > 1 else 0.0
    warm, end = (int(statistics.median(part)) for part in (looks[:few], looks[-few:]))
    return Growth(warm, end, 1000 * slope)
