"""Packing a step's forest: threads that decode without their model, and the kernel beside its reference."""

from __future__ import annotations

from time import perf_counter
from typing import Any, NamedTuple

import torch

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.engine.commit import commit
from medusa_apar.forest.device_tables import PackedForest
from medusa_apar.forest.forest import Forest, Segment
from medusa_apar.kv.pool import KVPool
from medusa_apar.kv.slot_ledger import SlotLedger
from medusa_apar.threads.fork_manager import ForkManager
from medusa_apar.threads.fork_policy import ControlTokenForks
from medusa_apar.threads.fork_rule import ForkRule
from medusa_apar.threads.request import Request, RequestOptions
from medusa_apar.triton_kernels import reference
from medusa_apar.triton_kernels.layout import CHUNK, MAX_WINDOWS, NO_WINDOW, LayoutKind, Sizes
from medusa_apar.triton_kernels.pack import pack
from medusa_apar.triton_kernels.tree_attention import tile_for
from medusa_apar.verify.verify_result import VerifyResult

from .kernel_forests import SHAPES, Case
from .kernel_timing import measure

WORD, FORK, CHILD = 9, 1, 2
APART = 3  # tokens between two forks
WINDOW = 2  # narrower than the drafts are deep


class Seconds(NamedTuple):
    """What a step costs the host: placing rows and booking slots; filling buffers; committing tokens and slots."""

    forest: float
    tables: float
    commit: float


class Steps:
    """A case's decoding: every thread drafts a chain, of which one node is accepted. Where nothing packs, the host's
    part is all that happens."""

    def __init__(self, case: Case, device: str = "cpu", packing: bool = False) -> None:
        shape = SHAPES[0]
        group = shape.heads // shape.kv_heads
        self.kind = LayoutKind(None, tile_for(torch.bfloat16, shape.dim, group, case.rows), group, walk=False)
        self.device, self.packing = torch.device(device), packing
        self.ledger = SlotLedger(KVPool(first=1 << 17))
        self.manager = ForkManager(context_length=None)
        options = RequestOptions(policy=ControlTokenForks(), rule=ForkRule(FORK, CHILD, max_depth=1))
        self.request = Request("0", [WORD] * case.prefix, options, key=7)
        self.tree = self.request.tree
        self.chain = DraftTree([(0,) * depth for depth in range(1, case.nodes)])
        self.buffers: dict[Sizes, PackedForest] = {}
        trunk = self.tree.trunk
        for _ in range(case.threads - 1):
            self.step(written=[WORD] * (APART - 1) + [FORK])
        assert len(self.tree.threads) == case.threads and trunk.live

    def forest(self, drafts: bool = True) -> Forest:
        threads = [thread for thread in self.tree.depth_first() if thread.live]
        tokens = [WORD] * len(self.chain) if drafts else []
        segments = [
            Segment(one, len(one.tokens), draft_tree=self.chain, draft_tokens=tokens[:], request=self.request)
            for one in threads
        ]
        return Forest([segments], self.ledger, self.device)

    def buffer(self, forest: Forest) -> PackedForest:
        """As a CUDA graph has it."""
        sizes = Sizes.of(forest.leaves).rounded()
        if sizes in self.buffers:
            self.buffers[sizes].load(forest)
        else:
            buffer = self.buffers[sizes] = PackedForest(sizes, self.device, True, commits=sizes.queries + CHUNK)
            buffer.load(forest)
            buffer.layout(self.kind, forest)
        return self.buffers[sizes]

    def step(self, written: list[int] | None = None) -> Seconds:
        """written: what the trunk writes instead, without drafts, while the others write a word."""
        started = perf_counter()
        forest = self.forest(drafts=written is None)
        placed = perf_counter()
        buffer = self.buffer(forest)
        if self.packing:
            buffer.pack()
        told = perf_counter()
        for segment in forest.segments:
            if written is None:
                result = VerifyResult([WORD, WORD], [0], 0) if segment.draft_tokens else VerifyResult([WORD], [], 0)
            else:
                result = VerifyResult(written if segment.thread is self.tree.trunk else [WORD], [], 0)
            commit(segment, result, self.manager, self.ledger)
        return Seconds(placed - started, told - placed, perf_counter() - told)


def check_pack(device: str, case: Case) -> dict[str, Any]:
    """Everything that the kernel writes, over garbage and into a copy of the table, against its reference."""
    steps = Steps(case, device, packing=True)
    equal = True
    for _ in range(3):
        forest = steps.forest()
        buffer = steps.buffer(forest)
        descriptor = buffer.descriptor._replace(windows=_windows(device))
        tables, written = [], []
        for function in (pack, reference.pack):
            tables.append(forest.table.clone())
            written.append(reference.Packed(*(torch.full_like(part, -7) for part in buffer.packed)))
            function(descriptor, tables[-1], written[-1])
        equal &= all(torch.equal(*pair) for pair in zip(*written, strict=True)) and torch.equal(*tables)
        buffer.pack()
        for segment in forest.segments:
            commit(segment, VerifyResult([WORD], [], 0), steps.manager, steps.ledger)
        expected = torch.from_numpy(steps.ledger.table.slots).to(device)
        equal &= torch.equal(forest.table[: len(expected)], expected)
    return {"kernel": "pack", "rows": case.rows, "threads": case.threads, "equal": equal}


def time_pack(case: Case, device: str) -> dict[str, Any]:
    steps = Steps(case, device)
    buffer = steps.buffer(steps.forest())
    row = {"threads": case.threads, "rows": case.rows, "prefix": case.prefix, "KB_sent": buffer.sent / 1024}
    return row | {"ms": measure(buffer.pack, device), "send_ms": measure(buffer.send, device)}


def _windows(device: str) -> torch.Tensor:
    windows = torch.zeros(MAX_WINDOWS, dtype=torch.int32, device=device)
    windows[0], windows[3] = NO_WINDOW, WINDOW
    return windows
