"""What the engine asks of draft heads, and of what drafts with them."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from medusa_apar.drafting.draft_tree import DraftTree


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

    def drafter(self, packing: str | None = None, kernels: bool = False) -> Drafter:
        """What drafts with them from now on, their weights and the base's as they are.

        packing: weight format of the CPU runtime ("float32", "bfloat16" or "int8"); None drafts in torch.
        kernels: draft with the Triton kernels.
        """
