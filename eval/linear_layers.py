"""The default model's linear layers, as torch runs them and packed:  python -m medusa_apar.eval.linear_layers

Milliseconds per step of the 211 layers, the unembedding among them, by rows; the median of seven runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from medusa_apar.job import machine
from medusa_apar.runtimes.packed_linear import pack, packed_linear

# SmolLM2-135M: (out, in) of one layer, 30 layers, and the unembedding.
LAYER = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
SHAPES = LAYER * 30 + [(49152, 576)]


def milliseconds(run: Callable[[], object], repeats: int = 7) -> float:
    run()
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        taken.append(1e3 * (time.perf_counter() - started))
    return statistics.median(taken)


def run_plain(x: dict[int, torch.Tensor], weights: list[torch.Tensor]) -> None:
    for weight in weights:
        F.linear(x[weight.shape[1]], weight)


def run_packed(x: dict[int, torch.Tensor], weights: list[torch.Tensor], packed: list[torch.Tensor]) -> None:
    for weight, layout in zip(weights, packed, strict=True):
        packed_linear(x[weight.shape[1]], layout, weight)


@torch.inference_mode()
def main() -> None:
    with torch.inference_mode(False):
        weights = [torch.randn(shape) for shape in SHAPES]
    packed = [pack(weight) for weight in weights]
    print(machine())
    print("rows  F.linear  packed")
    for rows in (1, 2, 4, 8, 16, 32):
        x = {width: torch.randn(rows, width) for width in (576, 1536)}
        plain = milliseconds(partial(run_plain, x, weights))
        ours = milliseconds(partial(run_packed, x, weights, packed))
        print(f"{rows:4}  {plain:8.1f}  {ours:6.1f}", flush=True)


if __name__ == "__main__":
    main()
