"""Drafting for all threads: residual blocks, and the likeliest tokens of an unembedding without writing its logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .residual_blocks import residual_blocks
from .top_logits import likeliest_of


def medusa_draft(
    hidden_states: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    unembedding: torch.Tensor,
    bias: torch.Tensor | None = None,
    token_map: torch.Tensor | None = None,
    k: int = 1,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What K Medusa heads propose after T states [T, H]: token ids int32 and log-probabilities float32, both [T, K, k].

    weights, biases: as in `residual_blocks`; none are needed where the heads own their unembedding.
    unembedding, bias, k, scale, softcap: as in `top_logits`; [vocab, H] serves all heads, [K, vocab, H] is their own.
    token_map: long [vocab], the ids of a draft vocabulary.

    Log-probabilities are over the draft vocabulary. Equals `MedusaHeads.top(heads.logits(...))` where that is float32;
    below it, nothing is rounded here before it is compared.
    """
    threads, hidden = hidden_states.shape
    own = unembedding.dim() == 3
    states = residual_blocks(hidden_states, weights, biases) if weights else hidden_states[None]
    heads = len(unembedding) if own else len(states)
    if own:
        assert len(states) in (1, heads), (len(states), heads)
        states = states.expand(heads, -1, -1)
    else:
        states, unembedding = states.view(1, heads * threads, hidden), unembedding[None]
    log_probs, tokens, _ = likeliest_of(states, unembedding, bias, k, scale, softcap, threads, token_map)
    return tokens, log_probs
