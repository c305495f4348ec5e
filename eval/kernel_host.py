"""What a step's forest costs the host before its kernels can run, needing no GPU.

  python -m medusa_apar.eval.kernel_host

Threads that forked at the end of one prefix go on step by step through the engine's own ledger, each with a chain of
draft nodes of which one is accepted. Milliseconds, medians of steps, for Llama-8B's heads in bfloat16: rows placed and
slots booked (`forest`); what the device must be told, in the buffers of a CUDA graph (`tables`); tokens accepted and
slots taken back (`commit`). `pack` is the device's, so it does not run here.
"""

from __future__ import annotations

import statistics

from .kernel_forests import Case
from .kernel_packing import Steps
from .kernel_timing import table

CASES = (Case(1, 64, 4096), Case(16, 8, 512), Case(16, 8, 4096), Case(16, 4, 32768), Case(64, 8, 4096))


def measure(case: Case, times: int = 60) -> dict[str, object]:
    steps = Steps(case)
    rows = [steps.step() for _ in range(times)][times // 4 :]
    forest, tables, commit = (1e3 * statistics.median(column) for column in zip(*rows, strict=True))
    sent = steps.buffer(steps.forest()).sent
    return {
        "threads": case.threads,
        "rows each": case.nodes,
        "shared prefix": case.prefix,
        "forest, ms": forest,
        "tables, ms": tables,
        "commit, ms": commit,
        "all, ms": forest + tables + commit,
        "KB": sent // 1024,
    }


if __name__ == "__main__":
    print(table([measure(case) for case in CASES]))
