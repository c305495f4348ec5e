"""Matrices for products of compiled code, and what those products are."""

import functools
import platform
from pathlib import Path

import torch
from torch import nn

from medusa_apar.runtimes.cpu.weights import rounded

KINDS = ("float32", "bfloat16", "int8")


def operands(rows, outputs, inputs, seed=0, bias=False):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
    return x, weight, torch.randn(outputs, generator=generator) if bias else None


def assert_close_to_its_specification(made, packed, x):
    """made: of the rows x, by the weight that `packed` stores and rows as it rounds them."""
    read = rounded(x) if packed.kind == "int8" else nn.functional.pad(x, (0, packed.struct.inputs - x.shape[1]))
    read = read.bfloat16() if packed.kind == "bfloat16" else read
    bias = 0 if packed.bias is None else packed.bias[: packed.outputs]
    expected = (read.double() @ packed.dense().double().T + bias).float()
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6 * float(x.abs().max()) * packed.inputs**0.5 * 4)


@functools.cache
def fused():
    """Whether this processor rounds a product and a sum of floats once, as all do but old ones of x86."""
    info = Path("/proc/cpuinfo")
    return platform.machine() == "aarch64" or "fma" in (info.read_text().split() if info.is_file() else ())
