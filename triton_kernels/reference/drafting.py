"""What draft heads propose."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .noise import possible


def residual_blocks(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> torch.Tensor:
    """K heads' residual blocks, x + SiLU(W x + b), one after the other: [T, H] -> [K, T, H].

    weights, biases: per block [K, H, H] and [K, H]. Each block is computed in float32 and rounded to x's dtype.
    """
    y = x.expand(len(weights[0]), -1, -1)
    for weight, bias in zip(weights, biases, strict=True):
        wide = y.float()
        y = (wide + F.silu(torch.baddbmm(bias.float()[:, None], wide, weight.float().mT))).to(x.dtype)
    return y


def top_logits(
    states: torch.Tensor,
    unembedding: torch.Tensor,
    bias: torch.Tensor | None = None,
    k: int = 1,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k greatest logits of each row, of equals the lowest index first, and the log of the sum of exponentials; NaN
    counts as -inf.

    states [R, H] and unembedding [vocab, H], bias [vocab] or None; or all of them with a batch dimension in front.
    scale, softcap: logits are multiplied, then capped: softcap * tanh(logits / softcap).
    Returns: values float32 [..., R, k], indices int32 [..., R, k], log of the sum float32 [..., R].
    """
    logits = states.float() @ unembedding.float().mT
    if bias is not None:
        logits = logits + bias.float()[..., None, :]
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = possible(logits)
    values, indices = logits.sort(dim=-1, descending=True, stable=True)  # topk leaves the order of equals open
    return values[..., :k], indices[..., :k].int(), logits.logsumexp(-1)


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

    weights, biases as in `residual_blocks`, none where there are no blocks; the rest as in `top_logits`. unembedding
    [vocab, H] serves all heads, [K, vocab, H] is their own; token_map long [vocab] are the ids of a draft vocabulary.
    """
    states = residual_blocks(hidden_states, weights, biases) if weights else hidden_states[None]
    if unembedding.dim() == 3:
        states = states.expand(len(unembedding), -1, -1)
    values, indices, sums = top_logits(states, unembedding, bias, k, scale, softcap)
    tokens = indices if token_map is None else token_map[indices.long()].int()
    return tokens.transpose(0, 1), (values - sums[..., None]).transpose(0, 1)
