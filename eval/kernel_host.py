"""What a step's forest costs the host before its kernels can run, needing no GPU.

  python -m medusa_apar.eval.kernel_host

Threads that forked at the end of one prefix go on step by step through the decoder's own ledger, each with a chain of
draft nodes of which one is accepted. Milliseconds, medians of steps, for Llama-8B's heads in bfloat16: rows placed and
slots booked (`forest`), what the device must be told, in buffers as a CUDA graph has them (`tables for a graph`), tokens
accepted and slots taken back (`commit`). `pack` is the device's, so it does not run here.
"""

from __future__ import annotations

import statistics
from time import perf_counter

import torch

from medusa_apar.draft_tree import DraftTree
from medusa_apar.eval.kernel_forests import OWN_TOKENS, SHAPES, Case
from medusa_apar.eval.kernel_timing import table
from medusa_apar.forest import Forest, Stem
from medusa_apar.fork_manager import ForkManager
from medusa_apar.kv_pool import KVPool
from medusa_apar.packed_forest import PackedForest
from medusa_apar.paragraph_tree import ParagraphTree
from medusa_apar.slot_ledger import SlotLedger
from medusa_apar.triton_kernels.layout import CHUNK, LayoutKind, Sizes
from medusa_apar.triton_kernels.tree_attention import tile_for
from medusa_apar.verdict import Verdict

CASES = (Case(1, 64, 4096), Case(16, 8, 512), Case(16, 8, 4096), Case(16, 4, 32768), Case(64, 8, 4096))
WORD, FORK, CHILD = 9, 1, 2
CPU = torch.device("cpu")


class Steps:
    """A case's decoding without its model."""

    def __init__(self, case: Case) -> None:
        shape = SHAPES[0]
        group = shape.heads // shape.kv_heads
        self.kind = LayoutKind(None, tile_for(torch.bfloat16, shape.dim, group, case.rows), group, walk=False)
        self.ledger = SlotLedger(KVPool(first=1 << 17))
        self.manager = ForkManager(self.ledger, context_length=None)
        self.tree = ParagraphTree([WORD] * case.prefix, 7, {0}, FORK, CHILD)
        self.chain = DraftTree([(0,) * depth for depth in range(1, case.nodes)])
        self._buffers: dict[Sizes, PackedForest] = {}
        # Each child forks off at a token of its own, as siblings do; then all write on.
        trunk = self.tree.trunk
        for _ in range(case.threads - 1):
            self.step([trunk], 0)
            trunk.tokens += [FORK]
            self.manager._spawn(self.tree, trunk)
        threads = [thread for thread in self.tree.depth_first() if thread.live]
        for _ in range(OWN_TOKENS):
            self.step(threads, 0)

    def step(self, threads: list, drafted: int) -> tuple[float, float, float, int]:
        guesses = [WORD] * drafted
        started = perf_counter()
        stems = [Stem(t, len(t.tokens), draft_tree=self.chain, draft_tokens=guesses[:]) for t in threads]
        forest = Forest([stems], self.ledger, CPU)
        placed = perf_counter()
        sizes = Sizes.of(forest.leaves).rounded()
        buffers = self._buffers.get(sizes)
        if buffers is None:
            buffers = self._buffers[sizes] = PackedForest(sizes, CPU, roomy=True, commits=sizes.queries + CHUNK)
            buffers.become(forest)
            buffers.layout(self.kind)
        else:
            buffers.become(forest)
        told = perf_counter()
        for stem in stems:
            accepted = [0] if drafted else []
            self.manager.commit(self.tree, stem, Verdict([WORD] * (1 + len(accepted)), accepted, 0))
        return placed - started, told - placed, perf_counter() - told, buffers.sent


def measure(case: Case, times: int = 50) -> dict[str, object]:
    steps = Steps(case)
    threads = [thread for thread in steps.tree.depth_first() if thread.live]
    assert len(threads) == case.threads
    rows = [steps.step(threads, case.nodes - 1) for _ in range(times)]
    forest, tables, commit = (1e3 * statistics.median(column) for column in list(zip(*rows, strict=True))[:3])
    return {
        "threads": case.threads,
        "rows each": case.nodes,
        "shared prefix": case.prefix,
        "forest, ms": forest,
        "tables for a graph, ms": tables,
        "commit, ms": commit,
        "all, ms": forest + tables + commit,
        "KB sent": rows[-1][3] // 1024,
    }


if __name__ == "__main__":
    print(table([measure(case) for case in CASES]))
