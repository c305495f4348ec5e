"""What the tables of tree attention cost the host, needing no GPU.

  python -m medusa_apar.eval.kernel_host

For Llama-8B's heads in bfloat16: milliseconds for the tables alone, and padded and joined as a CUDA graph takes them.
"""

from __future__ import annotations

import torch

from medusa_apar.eval.kernel_forests import SHAPES, Case, leaves
from medusa_apar.eval.kernel_timing import host_ms, table
from medusa_apar.triton_kernels.layout import CHUNK, Sizes, plan, power_of_two
from medusa_apar.triton_kernels.tree_attention import tile_for

CASES = (Case(1, 64, 4096), Case(16, 8, 512), Case(16, 8, 4096), Case(16, 4, 32768), Case(64, 8, 4096))


def measure(case: Case) -> dict[str, object]:
    shape, made = SHAPES[0], leaves(case)
    group = shape.heads // shape.kv_heads
    tile = tile_for(torch.bfloat16, shape.dim, group, case.rows)

    def joined() -> torch.Tensor:
        sizes = Sizes.of(made, CHUNK, power_of_two(case.rows))
        return plan(made, tile, group).padded(sizes, tile.rows // group).flat()

    return {
        "threads": case.threads,
        "rows each": case.nodes,
        "shared prefix": case.prefix,
        "tables, ms": host_ms(lambda: plan(made, tile, group)),
        "for a graph, ms": host_ms(joined),
        "KB": joined().nbytes // 1024,
    }


if __name__ == "__main__":
    print(table([measure(case) for case in CASES]))
