"""What drafts with heads: in torch, from weights packed as the CPU runtime's, or with the Triton kernels.

The heads walk the draft tree (`DraftHeads.draft`). A drafter says how states become the likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.models.families import base_logit_scale
from medusa_apar.runtimes.cpu.weight_fingerprint import plain
from medusa_apar.runtimes.cpu.weights import top

from .weight_copies import DraftRows

if TYPE_CHECKING:
    from .draft_heads import DraftHeads

MAX_RANKS = 16  # of a head's tokens, which the kernels find


class TorchDrafter:
    """Drafts in torch.

    rows: the base's unembedding over the heads' draft vocabulary; None where they propose the whole vocabulary, or
        have an unembedding of their own.
    """

    def __init__(self, heads: DraftHeads, rows: DraftRows | None) -> None:
        self.heads, self.rows = heads, rows
        self.key: Hashable = (type(self), type(heads), _where_weights_lie(heads, rows))

    @torch.inference_mode()
    def propose(
        self, hidden_states: Tensor, root_ids: Tensor, tree: DraftTree, min_probability: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """As `Drafter.propose`; the whole tree is looked at."""
        return self.heads.draft(hidden_states, root_ids, tree, self)

    def likeliest(self, states: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """`top` of the logits that the base's unembedding makes of states [..., H]."""
        return self.top(self.logits(states), top_k)

    def logits(self, states: Tensor) -> Tensor:
        """[..., H] -> [..., draft vocabulary]."""
        if self.rows is None:
            return self.heads.unembed(states)
        return base_logit_scale(self.rows.logits(states), self.heads.base)

    def top(self, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """[..., draft vocabulary] -> vocabulary ids (long) and log-probabilities (float32), both [..., top_k]."""
        return self.heads.top(logits, top_k)


class PackedDrafter(TorchDrafter):
    """Drafts in torch but for the unembedding of a draft vocabulary and the choice of tokens, which compiled code does.

    packing: weight format of the CPU runtime.
    """

    def __init__(self, heads: DraftHeads, rows: DraftRows | None, packing: str) -> None:
        super().__init__(heads, rows)
        self.key = (self.key, packing)
        self._panels = None if rows is None else rows.panels(packing)

    def logits(self, states: Tensor) -> Tensor:
        if self._panels is None:
            return super().logits(states)
        return base_logit_scale(self._panels(states), self.heads.base)

    def top(self, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        log_probs, index = top(logits.float(), top_k)
        return self.heads.vocabulary_ids(index), log_probs


class KernelDrafter(TorchDrafter):
    """Drafts with the Triton kernels, which write no logits, and in torch where they cannot serve."""

    def __init__(self, heads: DraftHeads, rows: DraftRows | None) -> None:
        super().__init__(heads, rows)
        unembedding = None if heads.owns_unembedding else heads.plain_unembedding()
        self._unembedding = unembedding if unembedding is not None and unembedding[0].is_contiguous() else None

    def serves(self, states: Tensor, top_k: int) -> bool:
        """Whether the kernels can draft so many ranks from these states."""
        return top_k <= MAX_RANKS and states.numel() > 0

    def likeliest(self, states: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        if self._unembedding is None or not self.serves(states, top_k):
            return super().likeliest(states, top_k)
        from medusa_apar.triton_kernels.top_logits import top_logits

        weight, bias = self._unembedding
        flat = states.to(weight.dtype).reshape(-1, self.heads.hidden_size).contiguous()
        values, index, total = top_logits(flat, weight, bias, top_k)
        ids, shape = self.heads.vocabulary_ids(index.long()), (*states.shape[:-1], top_k)
        return ids.view(shape), (values - total[:, None]).view(shape)


def _where_weights_lie(heads: DraftHeads, rows: DraftRows | None) -> tuple:
    ends = heads.base.get_input_embeddings(), heads.base.get_output_embeddings()
    weights = [*heads.parameters(), *heads.buffers(), *(weight for end in ends for weight in end.parameters())]
    if rows is not None:
        weights.append(rows.weight)
    return tuple((weight.data_ptr(), weight.dtype, weight.device) for weight in weights if plain(weight))
