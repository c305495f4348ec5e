"""A drafter's layers behind the base's: every row of a forest goes through them, over the same paths."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from medusa_apar.drafting.drafter import DraftLayers, NewRows
from medusa_apar.forest.forest import Forest
from medusa_apar.forest.mask import ForestMask
from medusa_apar.kv.pool import KVPool

from .attention import sdpa_forest_attention


def extend(layers: DraftLayers, states: Tensor, forest: Forest, pool: KVPool, first: int) -> None:
    """Keeps features, keys and values of a forest's rows.

    Args:
        states: [N, boundaries * H], the base's.
        first: number of the drafter's first layer in the pool.
    """
    pool.storage.first_draft_layer, pool.slots = first, forest.slots
    rows = NewRows(forest.input_ids[0], forest.position_ids[0], forest.slots, forest.parent_slots)
    if layers.write(states, rows, pool, first):
        return
    pool.keep_features(layers.fuse(states))
    features = pool.features_at(rows.parents)
    masks: list[ForestMask] = []  # a drafter of one layer needs none

    def keep(index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return pool.update(k.transpose(0, 1)[None], v.transpose(0, 1)[None], first + index)

    def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = keep(index, k, v)
        if not masks:
            masks.append(forest.mask(_not_the_first))
        out, _ = sdpa_forest_attention(cast(Any, None), q.transpose(0, 1)[None], keys, values, masks[0])
        return out[0]

    layers.extend(rows.token_ids, features, rows.positions, attend, keep)


def _not_the_first(batch: int, head: int, row: Tensor, column: Tensor) -> Tensor:
    """A path's first token has no token before it, and so no feature: nobody attends to it but itself."""
    return (column > 0) | (row == 0)
