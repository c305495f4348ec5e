"""The default model's linear layers, as torch runs them and packed:  python -m medusa_apar.eval.linear_layers

Milliseconds per step of the 211 layers, the unembedding among them, by rows; the median of seven runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from medusa_apar.eval.first_look import machine
from medusa_apar.packed_linear import pack, packed_linear

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


@torch.inference_mode()
def main() -> None:
    with torch.inference_mode(False):
        weights = [torch.randn(shape) for shape in SHAPES]
    packed = [pack(weight) for weight in weights]
    print(machine())
    print("rows  F.linear  packed")
    for rows in (1, 2, 4, 8, 16, 32):
        x = {width: torch.randn(rows, width) for width in (576, 1536)}
        plain = milliseconds(lambda x=x: [F.linear(x[w.shape[1]], w) for w in weights])
        ours = milliseconds(
            lambda x=x: [packed_linear(x[w.shape[1]], p, w) for w, p in zip(weights, packed, strict=True)]
        )
        print(f"{rows:4}  {plain:8.1f}  {ours:6.1f}", flush=True)


if __name__ == "__main__":
    main()
