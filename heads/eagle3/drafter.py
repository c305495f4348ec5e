"""Drafting with an EAGLE-3 network, level by level, over the keys and values of the threads' paths.

In torch; where the CPU runtime's code has been compiled, all levels are one call of it (`runtimes/cpu/eagle3.py`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.drafting.drafter import Attend, AttendingDrafter, Keep, NewRows, Written
from medusa_apar.kv.pool import KVPool
from medusa_apar.models.families import base_logit_scale
from medusa_apar.runtimes.cpu.eagle3 import CompiledEagle3, compilable

from ..draft_heads import tree_tensors
from ..weight_copies import DraftRows

if TYPE_CHECKING:
    from .heads import Eagle3Heads

MOST_BYTES = 1 << 28  # of paths' keys and values that one draft gathers


class Eagle3Drafter(AttendingDrafter):
    """Drafts level by level; a level's rows see their path and the nodes above them. It is its own `layers`.

    packing: weight format of the CPU runtime, whose code multiplies then; None multiplies in torch.
    """

    def __init__(self, heads: Eagle3Heads, packing: str | None = None) -> None:
        self._heads, self._unembed = heads, heads.unembed
        self.network, self._compiled = heads.network, None
        self.boundaries, self.num_layers = heads.boundaries, heads.num_layers
        self._key = type(self), packing, tuple(weight.data_ptr() for weight in heads.parameters())
        if packing is not None:
            rows = self._rows()
            if rows is not None and rows.bias is None and compilable(heads, rows.weight):
                self._compiled = CompiledEagle3(heads, rows.weight, packing)
            elif rows is not None:
                self._panels = rows.panels(packing)
                self._unembed = self._packed_unembed
            if self._compiled is None or not self._compiled.writes:
                self.network = heads.network.packed(packing, only_extends=self._compiled is not None)

    def _rows(self) -> DraftRows | None:
        """The unembedding over a draft vocabulary; None where the base's whole one serves, which is packed already."""
        weight = self._heads.network.unembedding
        if weight is not None:
            return DraftRows(weight, None)
        return None if self._heads.token_map is None else self._heads.draft_rows(bits=True)

    @property
    def layers(self) -> Eagle3Drafter:
        return self

    @property
    def key(self) -> Hashable:
        return self._key

    def fuse(self, states: Tensor) -> Tensor:
        return self.network.fuse(states)

    def extend(self, input_ids: Tensor, features: Tensor, positions: Tensor, attend: Attend, keep: Keep) -> None:
        self.network.extend(self._heads.embed(input_ids), features, positions, attend, keep)

    def write(self, states: Tensor, rows: NewRows, pool: KVPool, first: int) -> bool:
        return self._compiled is not None and self._compiled.write(states, rows, pool, first)

    @torch.inference_mode()
    def propose_behind(
        self, written: Written, root_ids: Tensor, tree: DraftTree, min_probability: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """As `AttendingDrafter`."""
        if self._compiled is not None:
            return self._compiled.propose(written, root_ids, tree, min_probability)
        some, parts = _group(written), []
        least = math.log(min_probability) if min_probability > 0 else -math.inf
        for first in range(0, len(root_ids), some):
            those = slice(first, first + some)
            parts.append(self._propose(written._replace(paths=written.paths[those]), root_ids[those], tree, least))
        token_ids, log_probs = zip(*parts, strict=True)
        return torch.cat(token_ids), torch.cat(log_probs)

    def _propose(self, written: Written, root_ids: Tensor, tree: DraftTree, least: float) -> tuple[Tensor, Tensor]:
        """least: log-probability of a path below which nothing is looked for, as far as no other thread wants it."""
        threads, device, heads = len(root_ids), root_ids.device, self._heads
        token_ids = torch.full((threads, len(tree)), -1, dtype=torch.long, device=device)
        log_probs = torch.full((threads, len(tree)), -math.inf, dtype=torch.float32, device=device)
        paths = _Paths(written, heads.num_layers, 1 + sum(len(level.inner) for level in tree.levels), device)
        ids, features = root_ids[:, None], written.pool.features_at(paths.last)[:, None]  # [T, rows of the level]
        above = torch.zeros(1, 0, dtype=torch.bool, device=device)  # [rows, earlier drafted rows], which each sees
        reach = torch.zeros(threads, 1, device=device)  # [T, parents], log-probability of the path down to each
        looked = torch.arange(1, device=device)  # of the parents those whose children are looked for
        for depth, (level, places) in enumerate(zip(tree.levels, tree_tensors(tree, device).levels, strict=True)):
            rows = len(looked)
            seen = torch.cat([above, torch.eye(rows, dtype=torch.bool, device=device)], dim=1)
            positions = (paths.lengths[:, None] + depth).expand(threads, rows)
            embedded = heads.embed(ids).flatten(0, 1)
            drafted = self.network(embedded, features.flatten(0, 1), positions.flatten(), paths.attend(seen))
            best, chances = (
                x.unflatten(0, (threads, rows)) for x in heads.top(self._unembed(drafted.states), level.top_k)
            )
            # Every parent has an entry, -1 and -inf where nobody looked.
            all_best = best.new_full((threads, reach.shape[1], level.top_k), -1).index_copy(1, looked, best)
            all_chances = chances.new_full(all_best.shape, -math.inf).index_copy(1, looked, chances)
            found = all_best[:, places.parents, places.ranks]
            chance = all_chances[:, places.parents, places.ranks]
            token_ids[:, places.nodes], log_probs[:, places.nodes] = found, chance
            reach = (reach[:, places.parents] + chance)[:, places.inner]
            kept = (reach >= least).any(0) & (reach > -math.inf).any(0)
            inner = kept.nonzero()[:, 0]
            if not len(inner):
                break
            row_of = torch.zeros(all_best.shape[1], dtype=torch.long, device=device)
            row_of[looked] = torch.arange(rows, device=device)
            parents = row_of[places.inner_parents[inner]]
            features = drafted.features.unflatten(0, (threads, rows))[:, parents]
            ids, above, looked = found[:, places.inner[inner]], seen[parents], inner
        return token_ids, log_probs

    def _packed_unembed(self, x: Tensor) -> Tensor:
        return base_logit_scale(self._panels(x), self._heads.base)


def _group(written: Written) -> int:
    """How many threads draft at once: their paths' keys and values are gathered side by side, each as long as the
    longest."""
    first = written.pool.storage.first_draft_layer
    assert first is not None
    keys = written.pool.keys[first]
    each = 2 * max(map(len, written.paths)) * keys[0].numel() * keys.element_size()
    return max(MOST_BYTES // max(each, 1), 1)


class _Paths:
    """Keys and values of T threads' paths and, behind them, of so many drafted rows."""

    def __init__(self, written: Written, layers: int, drafted: int, device: torch.device) -> None:
        lengths = [len(path) for path in written.paths]
        self._longest = max(lengths)
        slots = torch.full((len(lengths), self._longest), -1, dtype=torch.long)
        for row, path in zip(slots, written.paths, strict=True):
            row[: len(path)] = torch.from_numpy(path)
        self.last = slots[torch.arange(len(lengths)), torch.tensor(lengths) - 1].to(device)
        self.lengths = torch.tensor(lengths, device=device)
        slots[:, 0] = -1  # nobody attends to a path's first token
        self._visible = (slots >= 0).to(device)[:, None, None]  # [T, 1, 1, longest]
        slots, pool, first = slots.clamp_(min=0).to(device), written.pool, written.pool.storage.first_draft_layer
        assert first is not None
        self._kept = []  # of each layer keys and values, [T, longest + drafted, heads, D]
        for layer in range(first, first + layers):
            stores = pool.keys[layer], pool.values[layer]
            both = [store.new_empty(len(slots), self._longest + drafted, *store.shape[1:]) for store in stores]
            for kept, store in zip(both, stores, strict=True):
                kept[:, : self._longest] = store[slots]
            self._kept.append(both)

    def attend(self, seen: Tensor) -> Attend:
        """seen: bool [rows, drafted rows so far], which of these each row of a level sees; its own come last."""
        threads, (rows, drafted) = len(self.lengths), seen.shape
        end = self._longest + drafted
        visible = torch.cat(
            [self._visible.expand(threads, 1, rows, -1), seen.expand(threads, 1, rows, drafted)], dim=-1
        )

        def attention(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.unflatten(0, (threads, rows)) for x in (q, k, v))  # [T, rows, heads, D]
            keys, values = self._kept[index]
            keys[:, end - rows : end], values[:, end - rows : end] = k, v
            own, keys, values = (x.transpose(1, 2) for x in (q.to(keys.dtype), keys[:, :end], values[:, :end]))
            out = F.scaled_dot_product_attention(own, keys, values, attn_mask=visible, enable_gqa=True)
            return out.transpose(1, 2).flatten(0, 1).to(q.dtype)

        return attention
