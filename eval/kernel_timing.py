"""How the kernels are timed, and what their times are held against."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def measure(run: Callable[[], Any], device: str) -> float:
    """Median milliseconds."""
    if device == "cuda":
        from triton.testing import do_bench

        median: float = do_bench(run, warmup=10, rep=50, return_mode="median")
        return median
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


def copy_bandwidth(device: str) -> float:
    """Bytes per second of a copy of 1 GB, read and write counted."""
    size = 1 << (28 if device == "cuda" else 20)
    source = torch.empty(size, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * size / (measure(lambda: target.copy_(source), device) * 1e-3)


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a square product of 8,192."""
    size = 8192 if device == "cuda" else 64
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / (measure(lambda: a @ a, device) * 1e-3)


def host_ms(run: Callable[[], Any], times: int = 20) -> float:
    run()
    started = time.perf_counter()
    for _ in range(times):
        run()
    return 1e3 * (time.perf_counter() - started) / times


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, columns in the order in which rows first have them."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)

    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join(cell(row.get(name)) for name in names)} |" for row in rows]
    return "\n".join(lines)
