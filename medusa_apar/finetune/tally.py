"""What is told of losses: their means by what was to be predicted, over all rows and processes."""

from __future__ import annotations

from collections import defaultdict

import torch
from accelerate import Accelerator

from .adapter import Losses

PARTS = ("trunk", "fork", "thread")
BESIDE = ("fork_recall", "fork_precision", "avoided", "from_base")  # means that are no part of the loss


class Tally:
    """Mean losses by what the label is: fork decisions, other trunk tokens, thread tokens.

    "avoided" is the mean probability of the tokens that are to become unlikely, "from_base" the mean divergence.
    """

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, float] = defaultdict(float)

    def add(self, losses: Losses) -> None:
        parts = {
            "trunk": losses.in_trunk & ~losses.is_fork,
            "fork": losses.is_fork,
            "thread": ~losses.in_trunk & ~losses.is_fork,
        }
        for name, chosen in parts.items():
            self.sums[name] += float(losses.values[chosen].sum())
            self.counts[name] += int(chosen.sum())
        right = int((losses.says_fork & losses.is_fork).sum())
        for name, of in (("fork_recall", losses.is_fork), ("fork_precision", losses.says_fork)):
            self.sums[name] += right
            self.counts[name] += int(of.sum())
        self.sums["avoided"] += float(-torch.expm1(-losses.against).sum())
        self.counts["avoided"] += len(losses.against)
        self.sums["from_base"] += float(losses.from_base.sum())
        self.counts["from_base"] += len(losses.from_base)

    def gather(self, accelerator: Accelerator) -> Tally:
        """The sums over all processes."""
        names = [*PARTS, *BESIDE]
        local = torch.tensor([[t[name] for name in names] for t in (self.sums, self.counts)], dtype=torch.float64)
        if accelerator.device.type == "mps":
            local = local.float()
        whole = accelerator.reduce(local.to(accelerator.device), "sum").tolist()
        gathered = Tally()
        gathered.sums.update(zip(names, whole[0], strict=True))
        gathered.counts.update(zip(names, whole[1], strict=True))
        return gathered

    def means(self) -> dict[str, float | None]:
        names = [*PARTS, *BESIDE]
        means = {name: round(self.sums[name] / self.counts[name], 4) if self.counts[name] else None for name in names}
        labels = sum(self.counts[name] for name in PARTS)
        loss = round(sum(self.sums[name] for name in PARTS) / labels, 4) if labels else None
        return {"loss": loss, **means}
