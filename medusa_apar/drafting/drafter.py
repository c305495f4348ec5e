"""What the engine asks of draft heads, and of what drafts with them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.kv.pool import KVPool

# Layer, queries [N, heads, D], keys and values [N, key/value heads, D] of N rows -> [N, heads, D]: whoever runs a
# drafter's layers keeps keys and values, and knows which of them each row sees; its own is among these.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
# Layer, keys and values, as above.
Keep = Callable[[int, Tensor, Tensor], object]


class NewRows(NamedTuple):
    """Rows that a step has run, long [N] each.

    parents: slots of the tokens before them on their paths, -1 where a path begins.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    parents: Tensor


class DraftLayers(Protocol):
    """Layers of a drafter that attend to what was written. Each step runs its rows through them behind the base's own.

    A row reads its token's embedding and a feature, which is of the token before it on the path: `fuse` makes one of
    the base's states there. Features, keys and values are kept in the pool, at the slots of the tokens.
    """

    boundaries: tuple[int, ...]  # of the base, whose states are fused: b lies behind its first b layers
    num_layers: int

    def fuse(self, states: Tensor) -> Tensor:
        """[N, boundaries * hidden size] -> [N, width]."""

    def extend(self, input_ids: Tensor, features: Tensor, positions: Tensor, attend: Attend, keep: Keep) -> None:
        """Keeps keys and values of tokens, long [N], at these path positions; `attend` does so as well."""

    def write(self, states: Tensor, rows: NewRows, pool: KVPool, first: int) -> bool:
        """Keeps all that is to be kept of the rows in one call; False where it cannot.

        Args:
            states: [N, boundaries * hidden size].
            first: number of its first layer in the pool.
        """


@dataclass(frozen=True, slots=True)
class Reads:
    """What draft heads want of a forward pass.

    aux_layers: base layers whose outputs they read beside the final hidden state. layers: that run behind the base's.
    """

    aux_layers: tuple[int, ...] = ()
    layers: DraftLayers | None = None

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Places in the base whose states those layers fuse."""
        return () if self.layers is None else self.layers.boundaries

    @classmethod
    def of(cls, heads: Heads | None, drafter: Drafter | AttendingDrafter | None) -> Reads:
        """What heads want, and what drafts with them."""
        layers = drafter.layers if isinstance(drafter, AttendingDrafter) else None
        return cls() if heads is None else cls(tuple(heads.aux_layers), layers)


class Written(NamedTuple):
    """What T threads have written, for a drafter that attends to it.

    paths: of each thread, the slots of all tokens before its root, int64, in path order.
    """

    pool: KVPool
    paths: list[np.ndarray]


class Drafter(Protocol):
    """Proposes draft tokens from hidden states, by the weights as they were when it was made."""

    @property
    def key(self) -> Hashable:
        """Tells apart what a captured step reads: another one where the drafter works otherwise or its weights lie
        elsewhere."""

    def propose(
        self, hidden_states: Tensor, root_ids: Tensor, tree: DraftTree, min_probability: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Tokens for the n nodes of `tree` below each of T roots.

        Args:
            hidden_states: [T, input_size], from which the base chose the roots.
            root_ids: long [T], those tokens.
            min_probability: below nodes whose path from the root is less likely than this, the drafter need not look:
                such a node may hold any token or -1, with log-probability -inf. Drafters that always look at the whole
                tree ignore it.

        Returns: token ids (long) and their log-probabilities given the parent (float32), both [T, n].
        """


class AttendingDrafter(ABC):
    """Proposes from what was written, which its layers have seen. No protocol, since every step asks which kind it has:
    of a protocol that question takes 13 microseconds."""

    @property
    @abstractmethod
    def layers(self) -> DraftLayers:
        """What every step's rows have to go through."""

    @property
    @abstractmethod
    def key(self) -> Hashable:
        """As `Drafter.key`."""

    @abstractmethod
    def propose_behind(
        self, written: Written, root_ids: Tensor, tree: DraftTree, min_probability: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """As `Drafter.propose`, of the T threads that have written this and go on with the roots."""


class Heads(Protocol):
    """Draft heads as the engine needs them: what they read, and what drafts with them."""

    aux_layers: tuple[int, ...]  # base layers whose outputs they read beside the final hidden state
    num_heads: int
    acceptance: list[list[float]] | None  # measured chance that a draft of each rank is right, [heads][ranks]

    @property
    def input_size(self) -> int:
        """Width of the hidden states they read: the base's hidden size times one more than there are aux_layers."""

    @property
    def shape_key(self) -> Hashable:
        """Equal for heads that take equally long to draft."""

    def check_matches(self, model: PreTrainedModel) -> None:
        """ValueError if these heads cannot sit on `model`."""

    def refresh(self) -> None:
        """Drops whatever was copied from weights: it is copied anew when it is needed."""

    def drafter(self, packing: str | None = None, kernels: bool = False) -> Drafter | AttendingDrafter:
        """What drafts with them from now on, their weights and the base's as they are.

        packing: weight format of the CPU runtime ("float32", "bfloat16" or "int8"); None drafts in torch.
        kernels: draft with the Triton kernels.
        """
