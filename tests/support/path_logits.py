"""What a runtime makes of a path, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from medusa_apar.forest.forest import Forest, Segment
from medusa_apar.kv.pool import KVPool
from medusa_apar.kv.slot_ledger import SlotLedger
from medusa_apar.runtimes.runtime import Runtime
from medusa_apar.threads.paragraph_tree import ParagraphTree


def path_logits(runtime: Runtime, ids: list[int]) -> Tensor:
    """[len(ids), vocab], a token a step: nothing beside it, nothing drafted."""
    ledger, trunk = SlotLedger(KVPool()), ParagraphTree(ids).trunk
    logits = []
    with runtime.session():
        for stop in range(1, len(ids) + 1):
            forest = Forest([[Segment(trunk, stop)]], ledger, torch.device("cpu"))
            logits.append(runtime.forward(forest, ledger.pool)[0].clone())
    return torch.cat(logits)
