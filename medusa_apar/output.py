"""What `generate` returns beside the tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from .paragraph_tree import ParagraphTree


@dataclass(slots=True)
class Stats:
    """Counts of one generate call, over all its rows."""

    steps: int = 0  # forward passes, prefill included
    generated_tokens: int = 0  # visible tokens in the answers
    forward_tokens: int = 0  # rows of all forests, prompts included
    accepted_lengths: Counter[int] = field(default_factory=Counter)  # tokens gained by a thread in a step -> how often
    # Draft nodes, and those that were right, by who proposed them: "heads", "siblings" (what had been written before),
    # "forks" (a `[Child]` below a drafted `[Fork]`).
    drafted: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    undrafted_steps: int = 0  # in which the heads were not asked, since of late they did not pay
    forks: int = 0
    peak_threads: int = 0  # most threads in one forest
    peak_slots: int = 0  # most KV slots in use at once, draft nodes included
    final_slots: int = 0  # slots in use after the call: 0, or something leaked
    prefill_seconds: float = 0.0  # steps that fed a prompt
    decode_seconds: float = 0.0  # all other steps
    # What the steps' time went into: plan, forest, forward, verify, commit, draft, count.
    phase_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_step(self) -> float:
        return self.generated_tokens / max(self.steps, 1)


@dataclass
class MedusaAparOutput(GenerateDecoderOnlyOutput):
    """transformers' own output with `stats` and one `paragraph_tree` per row."""

    sequences: torch.Tensor  # type: ignore[assignment]
    scores: tuple[torch.Tensor, ...] | None = None  # type: ignore[assignment]
    logits: tuple[torch.Tensor, ...] | None = None  # type: ignore[assignment]
    stats: Stats | None = None
    paragraph_tree: list[ParagraphTree] | None = None
