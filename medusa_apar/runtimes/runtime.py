"""What the engine asks of whatever runs a model's steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from medusa_apar.drafting.drafter import AttendingDrafter, Drafter, Heads, Reads
from medusa_apar.forest.forest import Forest
from medusa_apar.kv.pool import KVPool
from medusa_apar.triton_kernels.reference import Verified
from medusa_apar.verify.recipe import Chooser
from medusa_apar.verify.tail import StepOutput, Tail

NOTHING = Reads()  # what is read where there are no heads


@dataclass(frozen=True, slots=True)
class RuntimeFacts:
    """What does not change as long as a runtime lives.

    Attributes:
        kind: what the weights are, a dtype's name or "int8".
        backend: what attends: "sdpa" or "triton" in torch, "cpu" in compiled code.
        graphs: whether steps run as CUDA graphs.
        max_nodes: draft nodes that a thread can have in one step; None for any number.
        fused_verify: whether the verify kernel can run behind the forward pass.
        build: which compiled code runs, "" for torch's own: what one build's steps cost says nothing of another's.
    """

    kind: str
    backend: str
    graphs: bool = False
    max_nodes: int | None = None
    fused_verify: bool = False
    build: str = ""


class Runtime(Protocol):
    """What runs a model's step."""

    facts: RuntimeFacts

    @property
    def description(self) -> str:
        """What runs and in which weights, in a few words."""

    def pool(self, max_slots: int | None) -> KVPool:
        """An empty pool for an engine."""

    def session(self, checked: bool = False) -> AbstractContextManager[None]:
        """Entered for all steps from an engine's first request to its last.

        checked: `unsupported_reason` has just said None; the session need not ask it again, which takes a walk over the
        model.
        """

    def unsupported_reason(self) -> str | None:
        """Why the model, as it has become, cannot be run any more, in half a sentence; None where it can."""

    def refresh(self) -> None:
        """Drops whatever was copied from the model's weights."""

    def weights(self) -> object:
        """The same object as long as the model computes the same; asked within `session`."""

    def drafter(self, heads: Heads) -> Drafter | AttendingDrafter:
        """What drafts with these heads beside this runtime's steps. The heads are not changed: several runtimes may
        have them at once."""

    def forward(self, forest: Forest, pool: KVPool, reads: Reads = NOTHING) -> tuple[Tensor, Tensor]:
        """Runs a forest. Returns, for its verified rows, logits [M, vocab] and hidden states [M, hidden * (1 + aux
        layers)]: before the unembedding, then each aux layer's at unit scale. All rows go on through `reads.layers`."""

    def step(self, forest: Forest, pool: KVPool, reads: Reads, tail: Tail | None) -> StepOutput:
        """What `forward` returns, and what the tail's device part has chosen from it."""

    def argmax(self, logits: Tensor) -> Tensor:
        """[M, vocab] -> long [M]."""

    def top(self, logits: Tensor, rows: np.ndarray, count: int) -> tuple[Tensor, Tensor]:
        """Of these rows (int64 [N]) of `logits` [M, vocab] the `count` largest, best first: ids (long) and float32
        logits, both [N, count]. What is not finite is no token's, and its id says nothing."""

    @property
    def chooser(self) -> Chooser | None:
        """Compiled code that chooses tokens on the host; None where Python and torch do."""

    @property
    def verify(self) -> Callable[..., Verified] | None:
        """The kernel `triton_kernels.verify.verify` where it runs."""
