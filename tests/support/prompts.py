"""Random prompts."""

from __future__ import annotations

import torch

from tests.support.models import VOCAB


def prompts(rows: int, length: int, seed: int = 0, ragged: bool = False) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, left-padded by 0, 2, 4, ... tokens if ragged."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(input_ids)
    if ragged:
        for row in range(rows):
            mask[row, : 2 * row] = 0
            input_ids[row, : 2 * row] = 0
    return {"input_ids": input_ids, "attention_mask": mask}
