"""What verification says of a thread."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from medusa_apar.threads.request import TokenLogprobs


@dataclass(slots=True)
class VerifyResult:
    """What a segment's verification brought: `tokens` chosen in order, the last of them, the bonus token, not yet run.

    `nodes[i]` is the draft node that guessed `tokens[i]`; `row` the verified row whose logits chose the bonus token.
    """

    tokens: list[int]
    nodes: list[int]
    row: int
    scores: list[torch.Tensor] = field(default_factory=list)  # processed, float32 [vocab], if kept
    logits: list[torch.Tensor] = field(default_factory=list)  # raw, float32 [vocab], if kept
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # if kept
    # Of each drafted `[Fork]`'s node that was accepted, or all of them: what the child chose at its `[Child]`.
    children: dict[int, VerifyResult] = field(default_factory=dict)
    # What the heads drafted from `row`: token ids and log-probabilities [n], where they drafted on the device.
    drafted: tuple[np.ndarray, np.ndarray] | None = None
