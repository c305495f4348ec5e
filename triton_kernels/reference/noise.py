"""Counter-based noise, and what a row chooses with it and without: samples depend on no schedule."""

from __future__ import annotations

import torch

_PHILOX_KEY = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUND = (0xD2511F53, 0xCD9E8D57)
_LOW = 0xFFFFFFFF


def philox(seed: int, thread: int, position: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """`count` random 32-bit words, int64 [count], a pure function of the first three arguments.

    Philox4x32-10 (Salmon et al., SC 2011) keyed with the 64-bit `seed`; the counter is (word // 4, position, thread),
    so every (seed, thread, position) has a stream of its own and any word can be computed alone, as a kernel would.
    """
    block = torch.arange((count + 3) // 4, device=device, dtype=torch.int64)
    c0, c1 = block, torch.full_like(block, position & _LOW)
    c2, c3 = torch.full_like(block, thread & _LOW), torch.full_like(block, (thread >> 32) & _LOW)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # int64 products wrap, but their bits are those of the unsigned product.
        p0, p1 = c0 * _PHILOX_ROUND[0], c2 * _PHILOX_ROUND[1]
        c0, c1, c2, c3 = (p1 >> 32 & _LOW) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32 & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _PHILOX_KEY[0]) & _LOW, (k1 + _PHILOX_KEY[1]) & _LOW
    return torch.stack([c0, c1, c2, c3], dim=1).reshape(-1)[:count]


def gumbel_noise(
    seed: int, thread: int, position: int, vocab_size: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Standard Gumbel noise for one token, float64 [vocab_size]: argmax(log-probs + noise) is an exact sample."""
    uniform = (philox(seed, thread, position, vocab_size, device).double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log(uniform))


def sample(scores: torch.Tensor, seed: int, thread: int, position: int) -> int:
    """The token that this (seed, thread, position) draws from softmax(scores), `scores` float [vocab_size]; as of
    `likeliest`, NaN is drawn by nobody and -1 stands where nothing can be."""
    return likeliest(noisy(scores, seed, thread, position))


def likeliest(scores: torch.Tensor) -> int:
    """Where the greatest of `scores` [vocab_size] is, of equals the first. NaN is as impossible as -inf, and where
    nothing is possible it is -1."""
    token = int(scores.argmax())
    if scores[token] > -torch.inf:  # NaN, which argmax takes first, is not
        return token
    scores = possible(scores)
    token = int(scores.argmax())
    return token if scores[token] > -torch.inf else -1


def possible(scores: torch.Tensor) -> torch.Tensor:
    """A copy with -inf for NaN."""
    return scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def noisy(scores: torch.Tensor, seed: int, thread: int, position: int) -> torch.Tensor:
    """What `sample` takes the argmax of, float32 [vocab_size].

    Noise and sum are float64: float32 has too few values near 0 and 1 for the tails. The rounded sum is what counts,
    of equals the lowest, so that a kernel can compare 32-bit scores and any split of the vocabulary agrees.
    """
    return (scores.double() + gumbel_noise(seed, thread, position, len(scores), scores.device)).float()
