"""Draft heads without weights: one that knows what comes, and what it has in common with others."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from transformers import PreTrainedModel

from medusa_apar import DraftTree
from medusa_apar.drafting.drafter import Drafter
from tests.support.models import LLAMA_LIKE, VOCAB


class WeightlessHeads:
    """Draft heads that are their own drafter (`medusa_apar.drafting.drafter`); `propose` is what they differ in."""

    aux_layers = ()
    num_heads, input_size = 3, LLAMA_LIKE["hidden_size"]
    acceptance: list[list[float]] | None = [[0.8, 0.1, 0.05]] * 3

    @property
    def shape_key(self) -> Hashable:
        return type(self).__name__, self.num_heads

    @property
    def key(self) -> Hashable:
        return id(self)

    def check_matches(self, model: PreTrainedModel) -> None: ...

    def refresh(self) -> None: ...

    def drafter(self, packing: str | None = None, kernels: bool = False) -> Drafter:
        return self

    def propose(
        self, hidden_states: torch.Tensor, root_ids: torch.Tensor, tree: DraftTree, min_probability: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError


class RecallHeads(WeightlessHeads):
    """Heads that remember a finished run: nearest hidden state -> the tokens that followed it there.

    Guesses so well that runs of several tokens, `[Fork]` among them, are accepted at once; every `wrong_every`-th
    guess is spoilt.
    """

    def __init__(self, model: PreTrainedModel, paragraph_trees, num_heads: int = 3, wrong_every: int = 5):
        self.num_heads, self.wrong_every, self._calls = num_heads, wrong_every, 0
        self.input_size = model.config.get_text_config().hidden_size
        self.acceptance = [[0.8, 0.1, 0.05, 0.03]] * num_heads
        keys, futures = [], []
        for thread in (thread for tree in paragraph_trees for thread in tree.threads):
            ids = thread.path_ids + thread.token_ids
            with torch.no_grad():
                hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
            for position in range(len(thread.path_ids) - 1, len(ids) - 1):
                future = ids[position + 2 : position + 2 + num_heads]
                keys.append(hidden[position])
                futures.append(future + [0] * (num_heads - len(future)))
        self._keys, self._futures = torch.stack(keys), torch.tensor(futures)

    def propose(
        self, hidden_states: torch.Tensor, root_ids: torch.Tensor, tree: DraftTree, min_probability: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        nearest = torch.cdist(hidden_states, self._keys).argmin(dim=1)
        first = self._futures[nearest][..., None]
        self._calls += 1
        if self._calls % self.wrong_every == 0:
            first = (first + 1) % VOCAB
        table = (first + torch.arange(tree.top_k)) % VOCAB
        token_ids = table[:, tree.depths, tree.ranks]
        return token_ids, torch.zeros(token_ids.shape)
