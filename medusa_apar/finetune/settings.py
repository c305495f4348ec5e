"""What a run of `medusa-apar finetune` is, and how its learning rate goes."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True)
class Settings:
    """What a run is; a checkpoint is only taken up by a run with the same."""

    rank: int = 16
    lr: float = 5e-4
    row_lr: float = 2e-3
    warmup: int = 5
    epochs: float = 1.0
    row_tokens: int = 512
    update_tokens: int = 4096
    plain_share: float = 0.5
    in_line: float = 0.25
    mixed: float = 0.25
    unlikelihood: float = 1.0
    distil: float = 0.0
    total_tokens: int | None = None
    max_minutes: float | None = None
    dtype: str = "float32"
    seed: int = 0


class Schedule:
    """Warm-up, then a cosine to zero over the updates, or over the time where that ends first."""

    def __init__(self, total_updates: int, budget_s: float | None, warmup: int) -> None:
        self.total_updates, self.budget_s, self.warmup = total_updates, budget_s, warmup

    def progress(self, update: int, elapsed_s: float) -> float:
        """0 at the start, 1 when the last update or the last second is used."""
        by_time = elapsed_s / self.budget_s if self.budget_s else 0.0
        return min(1.0, max(update / self.total_updates, by_time))

    def factor(self, update: int, elapsed_s: float) -> float:
        """What the peak learning rate is multiplied with."""
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress(update, elapsed_s)))
        return min(1.0, (update + 1) / self.warmup) * cosine
