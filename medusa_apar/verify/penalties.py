"""Presence and frequency penalties as a logits processor of transformers, which has none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from transformers import LogitsProcessor

Counts = TypeVar("Counts", np.ndarray, torch.Tensor)


def costs(counts: Counts, presence_penalty: float, frequency_penalty: float) -> Counts:
    """What tokens lose that stand somewhere so often, float64; to be rounded to a score's type once."""
    frequency, presence = (float(np.float32(penalty)) for penalty in (frequency_penalty, presence_penalty))
    return frequency * counts + presence * (counts > 0)


class PresenceFrequencyLogitsProcessor(LogitsProcessor):
    """Takes from a token's score what it has cost to write it before, as OpenAI's API defines it.

    A token that stands `count` times behind the prompt loses `frequency_penalty * count`, and `presence_penalty` if it
    stands there at all; negative penalties add. The prompt never counts. For plain `generate` too, in
    `logits_processor=[...]`.

    Args:
        prompt_length: tokens of the prompt, a batch's padding included.
        free_ids: tokens that cost nothing: `[Fork]` and `[Child]` are no text, and a list has one for each item.
    """

    def __init__(
        self,
        prompt_length: int,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        free_ids: Sequence[int] = (),
    ) -> None:
        for name, value in (("presence_penalty", presence_penalty), ("frequency_penalty", frequency_penalty)):
            if not abs(value) <= float(np.finfo(np.float32).max):
                raise ValueError(f"{name}={value!r} is no number that float32 holds.")
        if prompt_length < 0:
            raise ValueError(f"prompt_length={prompt_length!r} must be 0 or more.")
        self.prompt_length = prompt_length
        self.presence_penalty, self.frequency_penalty = presence_penalty, frequency_penalty
        self.free_ids = tuple(free_ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`input_ids` long [rows, length], `scores` [rows, vocab]; returns new scores."""
        vocab = scores.shape[-1]
        written = input_ids[:, self.prompt_length :].clamp(max=vocab)  # an embedding may have more tokens than that
        # float64, and rounded once: compiled code gets the same bits.
        counts = torch.zeros(len(scores), vocab + 1, dtype=torch.float64, device=scores.device)
        counts = counts.scatter_add_(1, written, torch.ones_like(written, dtype=torch.float64))[:, :vocab]
        counts[:, [token for token in self.free_ids if token < vocab]] = 0
        return scores - costs(counts, self.presence_penalty, self.frequency_penalty).to(scores.dtype)
