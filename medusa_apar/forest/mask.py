"""The dense mask of a forest, one block a request: which slots each row may attend to."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(slots=True, eq=False)
class Group:
    """One request's share of the forest. No request pays for another's slots."""

    rows: slice
    columns: slice | torch.Tensor  # into the pool's slots
    visible: torch.Tensor  # bool [rows, columns]
    row_positions: torch.Tensor  # int64 [rows, 1]
    column_positions: torch.Tensor  # int64 [1, columns]


@dataclass(slots=True, eq=False)
class ForestMask:
    """What our attention functions receive as `attention_mask`."""

    groups: list[Group]
    masks: list[torch.Tensor]  # bool [rows, columns], one per group
    _biases: dict[tuple[int, int, torch.dtype], torch.Tensor] = field(default_factory=dict)

    def bias(self, group: int, copies: int, dtype: torch.dtype) -> torch.Tensor:
        """A group's mask as scores to add, [copies * rows, columns]; the same for every layer, so made once."""
        key = (group, copies, dtype)
        if key not in self._biases:
            mask = self.masks[group]
            bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
            self._biases[key] = bias.repeat(copies, 1)
        return self._biases[key]
