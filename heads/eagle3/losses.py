"""What an EAGLE-3 drafter is trained on: it drafts several tokens from every place of an answer at once.

The authors call it training-time test (arXiv 2503.01840, section 3.2). Round 0 is a root's row: it reads the fused
states of the base. The row of round k reads what round k - 1 has put out for the token before it, as a draft k tokens
behind its root does, and attends to what such a draft sees: the root's path with the base's features, then the drafted
rows in between, each of its own round. Every round has to match the base's distribution behind the same token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from medusa_apar.finetune.packing import NO_PARENT, PackedForest, PackedRow, path_mask
from medusa_apar.runtimes.attention import current_forest, forest_attention
from medusa_apar.runtimes.capture import Captured

from ..draft_heads import DraftHeads
from .heads import Eagle3Heads

RANKS = 10  # drafts of each round that are counted where a drafter is judged


class RoundLosses(NamedTuple):
    """Each round's summed cross-entropy, its places, and how often a draft of each rank was the base's choice there."""

    losses: Tensor  # [rounds]
    counts: Tensor  # [rounds]
    hits: Tensor  # [rounds, ranks]


def round_losses(
    heads: Eagle3Heads, row: PackedRow, states: Tensor, hidden: Tensor, counted: Tensor, rounds: int, ranks: int = 1
) -> RoundLosses:
    """Losses of a packed row of N tokens, threads among them.

    Args:
        states: [N, boundaries * H], the base's. hidden: [N, H], before its unembedding.
        counted: bool [N], behind which tokens the base's distribution is to be matched.
    """
    network, parents = heads.network, row.parents
    before = torch.where(parents == NO_PARENT, 0, parents)
    with torch.no_grad():
        targets = DraftHeads.unembed(heads, hidden).float().softmax(-1)  # by the base's own unembedding
        best = targets.argmax(-1)
    embedded = heads.embed(row.input_ids).detach()
    features = network.fuse(states)
    valid = torch.ones_like(parents, dtype=torch.bool)
    rounds_seen = _Rounds(row)
    sums: list[tuple[Tensor, Tensor, Tensor]] = []
    for number in range(rounds):
        valid = (parents != NO_PARENT) & valid[before]
        drafted = network(embedded, features[before], row.position_ids, rounds_seen.attend(number))
        features = drafted.features
        places = (valid & counted).nonzero()[:, 0]
        logits = heads.unembed(drafted.states[places]).float()
        losses = F.cross_entropy(logits, targets[places], reduction="sum")
        hits = (logits.detach().topk(ranks, dim=-1).indices == best[places, None]).sum(0)
        sums.append((losses, logits.new_tensor(len(places)), hits))
    return RoundLosses(*(torch.stack(each) for each in zip(*sums, strict=True)))


@torch.no_grad()
def base_states(heads: Eagle3Heads, row: PackedRow) -> tuple[Tensor, Tensor]:
    """What the base puts out along a packed row: [N, boundaries * H], and [N, H] before its unembedding."""
    model = heads.base
    attention = forest_attention(model, "sdpa"), current_forest(cast(Any, PackedForest(row)))
    with attention[0], attention[1], Captured(model, (), heads.boundaries) as captured:
        output = model.base_model(
            input_ids=row.input_ids[None],
            attention_mask=torch.ones_like(row.input_ids)[None],  # without one, equal positions would split the row
            position_ids=row.position_ids[None],
            use_cache=False,
        )
    return captured.boundary_states(), output.last_hidden_state[0]


class _Rounds:
    """Keys and values of every round's rows, and who sees which of them."""

    def __init__(self, row: PackedRow) -> None:
        first = row.parents == NO_PARENT
        self._visible = path_mask(row.parents) & ~first[None, :]
        self._visible |= torch.diag(first)  # nobody else attends to a path's first token
        before = torch.where(first, 0, row.parents)
        # Entry k: of each row the token k places above it; a row that has none stands in for it, and does not count.
        self._above = [torch.arange(len(row), device=before.device)]
        self._before = before
        self._kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # (layer, round) -> keys and values

    def attend(self, number: int) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
        while len(self._above) <= number:
            self._above.append(self._before[self._above[-1]])

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            copies = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(copies, dim=1) for x in (k, v))  # [N, heads, D]
            self._kept[layer, number] = k, v
            scale = q.shape[-1] ** -0.5
            keys, values = self._kept[layer, 0]
            scores = scale * torch.einsum("nhd,mhd->hnm", q, keys)
            root = self._above[number]
            scores = scores.masked_fill(~self._visible[root], float("-inf"))
            drafted = [(*self._kept[layer, i], self._above[number - i]) for i in range(1, number + 1)]
            own = [scale * (q * its[place]).sum(-1).T[..., None] for its, _, place in drafted]
            weights = torch.cat([scores, *own], dim=-1).float().softmax(-1).to(v.dtype)
            out = torch.einsum("hnm,mhd->nhd", weights[..., : len(keys)], values)
            for index, (_, its, place) in enumerate(drafted):
                out = out + weights[..., len(keys) + index].T[..., None] * its[place]
            return out

        return attention
