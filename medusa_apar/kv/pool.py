"""Slots for keys and values: one per cached token, never copied or moved.

K is stored after RoPE, so a slot's number says nothing of its token's place on the path; `positions` remembers that.
Which slots a request has is for `SlotRuns` to choose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import Cache

from .slot_runs import SlotRuns

_FIRST_CAPACITY = 256


@dataclass(slots=True, eq=False)
class KVStorage:
    """Where a pool's keys and values lie: layer -> [capacity, kv_heads, head_dim], a tensor of its own each.

    scales: of those that are int16 steps: layer -> float32 [capacity, kv_heads, 2], a key's step and a value's.
    features: what a drafter that attends knows behind each slot's token: [capacity, width] at 0, or nothing.
    first_draft_layer: number of the drafter's first layer among keys and values; None without.
    chunks: int32 [chunks, columns], which slots a path's tokens lie in; written by PathTable, which says more.
    """

    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    scales: dict[int, torch.Tensor] = field(default_factory=dict)
    features: dict[int, torch.Tensor] = field(default_factory=dict)
    chunks: torch.Tensor | None = None
    first_draft_layer: int | None = None

    def forget_drafter(self) -> None:
        """Without what a drafter has kept: another one is none of its business, nor are callers without."""
        self.features.clear()
        first = math.inf if self.first_draft_layer is None else self.first_draft_layer
        for layer in [layer for layer in self.keys if layer >= first]:
            del self.keys[layer], self.values[layer]
        self.first_draft_layer = None

    @property
    def capacity(self) -> int:
        return max((len(store) for store in self.keys.values()), default=0)


class KVPool(Cache):
    """The cache object transformers' layers write to, `slots` of the current forest telling where.

    `update` takes [1, kv_heads, N, head_dim], scatters it to the forest's N slots and returns a view of the whole pool,
    [1, kv_heads, capacity, head_dim]: our attention functions pick the slots a request may see.

    Args:
        max_slots: most slots ever in use, or None to grow on demand.
        storage: of an earlier pool that is not used any more; what it held is nobody's.
        first: slots to begin with where there is no limit.
    """

    def __init__(self, max_slots: int | None = None, storage: KVStorage | None = None, first: int = _FIRST_CAPACITY):
        super().__init__(layers=[])
        self.max_slots = max_slots
        self.storage = KVStorage() if storage is None else storage
        self.storage.forget_drafter()
        self._take_storage()
        self.positions = np.zeros(0, dtype=np.int64)  # [capacity] path position of the token in each slot
        self.slots: torch.Tensor | None = None  # int64 [N], set by the runtime before each forward pass
        # A backend's own way of writing: key and value [N, kv_heads, head_dim], the layer's keys and values, slots.
        self.write: Callable[..., None] | None = None
        self._runs = SlotRuns()
        self.cached = 0  # slots in use that no live thread needs; written by PrefixCache
        self.peak = 0  # most slots ever in use by live threads
        self._grow(max(first if max_slots is None else max_slots, self.storage.capacity))

    @property
    def capacity(self) -> int:
        return len(self.positions)

    @property
    def in_use(self) -> int:
        return self._runs.held

    @property
    def live(self) -> int:
        """Slots in use that are not just cached, draft nodes' among them."""
        return self.in_use - self.cached

    @property
    def available(self) -> int | None:
        """Slots that live threads can still be given, cached ones among them; None means any number."""
        return None if self.max_slots is None else self.max_slots - self.live

    @property
    def used(self) -> np.ndarray:
        """The slots that are in use, int64, ascending."""
        return self._runs.slots

    def allocate(self, positions: np.ndarray, owners: Iterable[tuple[Hashable, int]] | None = None) -> np.ndarray:
        """Slots for tokens at these path positions; int64, same length. MemoryError beyond `max_slots`.

        owners: for whom, and how many of them, in the order of `positions`; what one owner has lies close together.
            By default all are the same owner's.
        """
        count = len(positions)
        owners = [(None, count)] if owners is None else list(owners)
        if self.max_slots is not None and self.in_use + count > self.max_slots:
            raise MemoryError(f"{count} slots were asked of a KV pool with {self.max_slots - self.in_use} left.")
        runs = self._runs
        wants = runs.wants(owners)
        short = runs.go_on(wants)
        if short and self.max_slots is None and runs.crowded(missing := sum(want.missing for want in short)):
            try:
                # Half of it is free then, so that owners can go on where they are.
                self._grow(2 * max(self.capacity, self.in_use + missing))
            except Exception:  # no memory: then they lie wherever there is a gap, if there are enough
                if missing > self.capacity - self.in_use:
                    runs.release(slot for want in wants for slot in want.slots)
                    raise
            short = runs.go_on(short)
        if short:
            runs.begin(short)
        slots = np.array([slot for want in wants for slot in want.slots], dtype=np.int64)
        self.positions[slots] = positions
        self.peak = max(self.peak, self.live)
        return slots

    def release(self, slots: Iterable[int]) -> None:
        """KeyError for a slot that is free."""
        self._runs.release(slots)

    def disown(self, owner: Hashable) -> None:
        """The owner takes no more slots; those that it has are nobody's until they are released."""
        self._runs.disown(owner)

    def let_go(self) -> None:
        """Gives up the keys and values: their memory is free unless a runtime goes on with it. What is counted here
        stays, and the pool cannot be written to any more."""
        self.storage = KVStorage()
        self._take_storage()

    def _take_storage(self) -> None:
        self.keys, self.values, self.scales = self.storage.keys, self.storage.values, self.storage.scales
        self._features = self.storage.features

    def keep_features(self, features: torch.Tensor) -> None:
        """[N, width], behind the tokens of the current forest's rows."""
        assert self.slots is not None
        self.features(features.shape[1], features.dtype, features.device)[self.slots] = features

    def features(self, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """[capacity, width], where features lie; begun with zeros where there are none of this kind."""
        kept = self._features.get(0)
        if kept is None or (kept.shape[1], kept.dtype, kept.device) != (width, dtype, device):
            with torch.inference_mode(False):  # it outlives a caller's inference mode, and is written to outside of it
                kept = torch.zeros(self.capacity, width, dtype=dtype, device=device)
            self._features[0] = kept
        return kept

    def layer(
        self, layer: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values, [capacity, kv_heads, head_dim] each; begun with zeros where there are none of this
        kind."""
        for store in (self.keys, self.values):
            kept = store.get(layer)
            if kept is None or (*kept.shape[1:], kept.dtype, kept.device) != (kv_heads, head_dim, dtype, device):
                # Zeros, not empty: masked slots still meet a softmax weight of zero, and 0 * NaN is NaN.
                store[layer] = torch.zeros(self.capacity, kv_heads, head_dim, dtype=dtype, device=device)
        return self.keys[layer], self.values[layer]

    def features_at(self, slots: torch.Tensor) -> torch.Tensor:
        """What was kept for these slots (long, any shape), [..., width]; zeros for -1, which is no slot."""
        found = self._features[0][slots.clamp(min=0)]
        return found.masked_fill((slots < 0)[..., None], 0.0)

    def _grow(self, capacity: int) -> None:
        for store in (self.keys, self.values, self.scales, self._features):
            for layer, old in store.items():
                if len(old) < capacity:
                    store[layer] = torch.cat([old, old.new_zeros(capacity - len(old), *old.shape[1:])])
        self.positions = np.concatenate([self.positions, np.zeros(capacity - self.capacity, dtype=np.int64)])
        self._runs.grow(capacity)

    # What transformers calls during a forward pass.

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.slots is not None, "the runtime sets `slots` before every forward pass"
        for store, states in ((self.keys, key_states), (self.values, value_states)):
            if layer_idx not in store:
                # Zeros, not empty: masked slots still meet a softmax weight of zero, and 0 * NaN is NaN.
                store[layer_idx] = states.new_zeros(self.capacity, states.shape[1], states.shape[3])
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        key, value = key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)
        if self.write is None:
            keys[self.slots], values[self.slots] = key, value
        else:
            self.write(key, value, keys, values, self.slots)
        return keys.transpose(0, 1)[None], values.transpose(0, 1)[None]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.capacity, 0

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def is_compileable(self) -> bool:
        return False
