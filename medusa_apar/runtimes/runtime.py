"""What every runtime can do: the protocol that the engine talks to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from medusa_apar.forest.forest import Forest
from medusa_apar.kv.pool import KVPool
from medusa_apar.triton_kernels.reference import Verified

if TYPE_CHECKING:
    from medusa_apar.verify.device_verify import Choice


class Runtime(Protocol):
    """What runs a model's step."""

    @property
    def kind(self) -> str:
        """What the weights are: a dtype's name, or "int8"."""

    @property
    def description(self) -> str:
        """What runs and in which weights, in a few words."""

    def pool(self, max_slots: int | None) -> KVPool:
        """An empty pool for a generate call."""

    def running(self, checked: bool = False) -> AbstractContextManager[None]:
        """Entered once for all steps of a generate call. checked: `refusal` has just been asked, which takes a walk."""

    def refusal(self) -> str | None:
        """Why the model, as it has become, cannot be run any more, in half a sentence; None where it can."""

    def refresh(self) -> None:
        """Drops whatever was copied from the model's weights."""

    def forward(self, forest: Forest, pool: KVPool, taps: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """Of a forest's verified rows: logits [M, vocab], and the hidden states [M, hidden * (1 + taps)] before the
        unembedding and, at unit scale, behind the tapped layers."""

    def step(
        self, forest: Forest, pool: KVPool, taps: tuple[int, ...], choice: Choice | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What `forward` returns, and what `choice` chose from it; None where there is no choice."""

    def argmax(self, logits: Tensor) -> Tensor:
        """[M, vocab] -> long [M]."""

    @property
    def most_nodes(self) -> int | None:
        """Most draft nodes of a thread; None: any number."""

    @property
    def verify(self) -> Callable[..., Verified] | None:
        """The kernel `triton_kernels.verify.verify` where it runs."""
