"""What drafts tokens from hidden states, as the engine sees it: draft heads, or whatever stands in for them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .draft_tree import DraftTree


class Drafter(Protocol):
    def propose(self, hidden_states: Tensor, root_ids: Tensor, tree: DraftTree) -> tuple[Tensor, Tensor]:
        """As `DraftHeads.propose`."""
