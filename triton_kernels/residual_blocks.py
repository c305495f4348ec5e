"""Residual blocks of all draft heads, one launch a block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .aot import Variant
from .tiles import RESIDUAL_TILES, TESTED, load_tile, tile_for


def residual_blocks(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> torch.Tensor:
    """K heads' residual blocks, x + SiLU(W x + b), one after the other: [T, H] -> [K, T, H].

    x: float32, float16 or bfloat16, contiguous. weights, biases: per block [K, H, H] and [K, H], of x's dtype.
    Sums are float32, and each block's result is rounded once to x's dtype. AssertionError for what differs.
    """
    rows, hidden = x.shape
    tile = tile_for(RESIDUAL_TILES, rows, x.element_size())
    assert len(weights) == len(biases) > 0 and rows > 0, (len(weights), len(biases), rows)
    assert x.is_contiguous()
    for weight, bias in zip(weights, biases, strict=True):
        heads = len(weight)
        assert weight.shape == (heads, hidden, hidden) and bias.shape == (heads, hidden), (weight.shape, bias.shape)
        assert weight.dtype == bias.dtype == x.dtype, (weight.dtype, bias.dtype, x.dtype)
        assert weight.is_contiguous() and bias.is_contiguous()
        out = torch.empty(heads, rows, hidden, dtype=x.dtype, device=x.device)
        _residual_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(hidden, tile.columns), heads)](
            x,
            weight,
            bias,
            out,
            rows,
            0 if x.dim() == 2 else rows * hidden,
            HIDDEN=hidden,
            UPCAST=triton.knobs.runtime.interpret,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        x = out
    return x


@triton.jit(do_not_specialize=["rows"])
def _residual_kernel(
    x_ptr,  # [rows, HIDDEN], or [heads, rows, HIDDEN] with `head_stride`
    weight_ptr,  # [heads, HIDDEN, HIDDEN]
    bias_ptr,  # [heads, HIDDEN]
    out_ptr,  # [heads, rows, HIDDEN]
    rows,
    head_stride,
    HIDDEN: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    head = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    x_ptr += head * head_stride
    weight_ptr += head * HIDDEN * HIDDEN
    y = tl.zeros([ROWS, COLUMNS], tl.float32)
    for offset in range(0, HIDDEN, DEPTH):
        x = load_tile(x_ptr, row, rows, offset, HIDDEN, DEPTH, UPCAST)
        weight = load_tile(weight_ptr, column, HIDDEN, offset, HIDDEN, DEPTH, UPCAST)
        y = tl.dot(x, tl.trans(weight), y, input_precision="ieee")
    bias = tl.load(bias_ptr + head * HIDDEN + column, mask=column < HIDDEN, other=0.0)
    y += bias.to(tl.float32)[None, :]
    there = (row < rows)[:, None] & (column < HIDDEN)[None, :]
    at = row[:, None] * HIDDEN + column[None, :]
    out = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32) + y * tl.sigmoid(y)
    tl.store(out_ptr + head * rows * HIDDEN + at, out.to(out_ptr.dtype.element_ty), mask=there)


def variants() -> list[Variant]:
    """Each row of the tile table, in 16 and 32 bits."""
    found = []
    for dtype, hidden, rows in TESTED:
        tile = tile_for(RESIDUAL_TILES, rows, 4 if dtype == "fp32" else 2)
        found.append(
            Variant(
                name=f"residual-{dtype}-hidden{hidden}-rows{rows}",
                kernel=_residual_kernel,
                signature={
                    **dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"), f"*{dtype}"),
                    **dict.fromkeys(("rows", "head_stride"), "i32"),
                },
                constexprs={
                    "HIDDEN": hidden,
                    "UPCAST": False,
                    "ROWS": tile.rows,
                    "COLUMNS": tile.columns,
                    "DEPTH": tile.depth,
                },
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                divisible=("x_ptr", "weight_ptr", "bias_ptr", "out_ptr", "head_stride"),
            )
        )
    return found
