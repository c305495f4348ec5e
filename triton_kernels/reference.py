"""Plain-torch twins of the kernels: their specification, the CPU path, and the oracle of their tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .layout import TreeLayout

_PHILOX_KEY = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUND = (0xD2511F53, 0xCD9E8D57)
_LOW = 0xFFFFFFFF


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one request's forest rows over the slots they may see.

    Args:
        query: [heads, rows, head_dim].
        key, value: [kv_heads, slots, head_dim]; any strides with the last dimension dense.
        bias: [heads // kv_heads * rows, slots] in the query's dtype, 0 for what a row sees and -inf for the rest, the
            same rows once for each query head of a KV head: built once a step, not once a layer.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv 2408.00118, section 2).
        sinks: [heads], a learned score per head that takes part in the softmax and carries no value.

    Returns: [rows, heads, value_head_dim].
    """
    heads, rows, dim = query.shape
    kv_heads = key.shape[0]
    # The query heads that share a KV head become rows, so that K and V are read once for all of them.
    packed = query.reshape(1, kv_heads, -1, dim)
    key, value = key[None], value[None]
    if softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(packed, key, value, attn_mask=bias, scale=scale)
    else:
        scores = packed @ key.transpose(-1, -2) * (dim**-0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = (scores + bias).float()
        if sinks is not None:
            column = sinks.float().reshape(1, kv_heads, -1, 1).repeat_interleave(rows, dim=2)
            scores = torch.cat([scores, column], dim=-1)
        weights = scores.softmax(dim=-1)[..., : key.shape[-2]]
        out = weights.to(value.dtype) @ value
    return out.reshape(heads, rows, -1).transpose(0, 1)


def tree_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: TreeLayout,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the kernel of this name computes, query by query and in float64."""
    rows, heads, dim = query.shape
    group = heads // keys.shape[1]
    out = query.new_zeros(rows, heads, values.shape[2])
    seen = seen_slots(layout, window)
    for index, row in enumerate(layout.order.tolist()):
        key, value = (pool[seen[index]].double().repeat_interleave(group, dim=1) for pool in (keys, values))
        scores = torch.einsum("hd,shd->hs", query[row].double(), key) * (dim**-0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None]], dim=1)
        weights = scores.softmax(dim=1)[:, : len(key)]
        out[row] = torch.einsum("hs,shd->hd", weights, value).to(out.dtype)
    return out


def seen_slots(layout: TreeLayout, window: int | None = None) -> list[list[int]]:
    """Per query in `layout.order`, the slots it sees, in the order of its leaf's columns."""
    seen: list[dict[int, int]] = [{} for _ in layout.order]
    for entry, run, number, columns, first, count, _ in layout.items.tolist():
        for column in range(columns):
            begin = int(layout.chunks[entry + column // layout.chunk])
            slot = int(layout.slots[begin + column % layout.chunk])
            at = number * layout.chunk + column
            for query in range(first, first + count):
                position, length = int(layout.positions[query]), int(layout.lengths[query])
                if at < length:
                    visible = at <= position and (window is None or at > position - window)
                else:
                    visible = bool(int(layout.ancestors[query]) >> (at - length) & 1)
                if visible:
                    assert at not in seen[query], "two items hold the same column of a query"
                    seen[query][at] = slot
        assert run == -(-columns // layout.chunk)
    return [[slots[at] for at in sorted(slots)] for slots in seen]


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
    """The token that this (seed, thread, position) draws from softmax(scores), `scores` float [vocab_size]."""
    noise = gumbel_noise(seed, thread, position, len(scores), scores.device)
    return int(torch.argmax(scores.double() + noise))
