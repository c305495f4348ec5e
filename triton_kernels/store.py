"""Keys and values of a step into their slots: one launch a layer for both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .aot import Variant


@triton.jit
def _store(
    key,
    value,
    keys,
    values,
    slots,
    key_row,
    key_head,
    value_row,
    value_head,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if slot < 0:
        return
    head, dim = tl.arange(0, HEAD_BLOCK)[:, None], tl.arange(0, DIM_BLOCK)[None, :]
    mask = (head < KV_HEADS) & (dim < DIM)
    k = tl.load(key + row * key_row + head * key_head + dim, mask=mask)
    tl.store(keys + (slot * KV_HEADS + head) * DIM + dim, k, mask=mask)
    mask = (head < KV_HEADS) & (dim < VALUE_DIM)
    v = tl.load(value + row * value_row + head * value_head + dim, mask=mask)
    tl.store(values + (slot * KV_HEADS + head) * VALUE_DIM + dim, v, mask=mask)


def store_kv(
    key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
) -> None:
    """keys[slots[n]] = key[n] and likewise values, but for negative slots, where nothing is written.

    key, value: [N, kv_heads, head_dim], any strides with the last dimension dense; the values' head_dim may be another.
    keys, values: [capacity, kv_heads, head_dim], contiguous. slots: int32 or int64 [N], none twice.
    """
    rows, kv_heads, dim = key.shape
    value_dim = value.shape[2]
    assert keys.is_contiguous() and values.is_contiguous() and key.stride(2) == value.stride(2) == 1
    _store[(rows,)](
        *(key, value, keys, values, slots),
        *(key.stride(0), key.stride(1), value.stride(0), value.stride(1)),
        KV_HEADS=kv_heads,
        DIM=dim,
        VALUE_DIM=value_dim,
        HEAD_BLOCK=triton.next_power_of_2(kv_heads),
        DIM_BLOCK=triton.next_power_of_2(max(dim, value_dim)),
        num_warps=4,
    )


def variants() -> list[Variant]:
    tensors = dict.fromkeys(("key", "value", "keys", "values"), "*bf16") | {"slots": "*i64"}
    strides = dict.fromkeys(("key_row", "key_head", "value_row", "value_head"), "i32")
    constexprs = {"KV_HEADS": 8, "DIM": 128, "VALUE_DIM": 128, "HEAD_BLOCK": 8, "DIM_BLOCK": 128}
    return [Variant("store bf16 d128", _store, tensors | strides, constexprs, 4, 1, (*tensors, *strides))]
