"""Attention of a forest over its paths: what the CPU path and masks compute, and the oracle of the kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..layout import TreeLayout


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
    # Lists: reading a tensor of another device value by value would take minutes.
    chunks, all_slots, positions, lengths, ancestors = (
        table.tolist() for table in (layout.chunks, layout.slots, layout.positions, layout.lengths, layout.ancestors)
    )
    for entry, run, number, columns, first, count, _ in layout.items.tolist():
        for column in range(columns):
            slot = all_slots[chunks[entry + column // layout.chunk] + column % layout.chunk]
            at = number * layout.chunk + column
            for query in range(first, first + count):
                position, length = positions[query], lengths[query]
                if at < length:
                    visible = at <= position and (window is None or at > position - window)
                else:
                    visible = bool(ancestors[query] >> (at - length) & 1)
                if visible:
                    assert at not in seen[query], "two items hold the same column of a query"
                    seen[query][at] = slot
        assert run == -(-columns // layout.chunk)
    return [[slots[at] for at in sorted(slots)] for slots in seen]
