"""What is made of weights for drafting, kept until the weights have changed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor
from torch.nn import functional as F

from medusa_apar.runtimes.cpu.weight_fingerprint import WeightFingerprint, places
from medusa_apar.runtimes.cpu.weights import PackedMatrix
from medusa_apar.runtimes.packed_linear import can_pack, pack, packed_linear

T = TypeVar("T")


class WeightCopies:
    """Copies of weights by kind: calls that need other kinds can have them at once."""

    def __init__(self) -> None:
        self._copies: dict[Hashable, _Copy] = {}

    def get(self, kind: Hashable, weights: Sequence[Tensor], make: Callable[[], T], bits: bool = False) -> T:
        """What `make` made of these weights, made anew where they lie elsewhere or were written to since.

        bits: looks at what the weights hold, too, since torch does not count what is written through `.data`. That
            reads some of them every time (`WeightFingerprint`), so it is for once a call.
        """
        kept = self._copies.get(kind)  # which another call may drop meanwhile
        if kept is None or not kept.is_of(weights, bits):
            fingerprint = WeightFingerprint(weights) if bits else None  # before any of it is copied
            kept = self._copies[kind] = _Copy(places(weights), fingerprint, make())
        made: T = kept.made
        return made

    def last(self, kind: Hashable) -> Any | None:
        """What was made last, whatever its weights have become."""
        kept = self._copies.get(kind)
        return None if kept is None else kept.made

    def clear(self) -> None:
        self._copies = {}


@dataclass(frozen=True, slots=True)
class _Copy:
    places: list[tuple]
    fingerprint: WeightFingerprint | None
    made: Any

    def is_of(self, weights: Sequence[Tensor], bits: bool) -> bool:
        if not bits:
            return self.places == places(weights)
        return self.fingerprint is not None and self.fingerprint.matches(weights)


class DraftRows:
    """The rows of an unembedding that a draft vocabulary has, and other layouts of them, made when first asked for."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias  # [draft vocabulary, H], [draft vocabulary]
        self._panels: dict[str, PackedMatrix] = {}

    def panels(self, packing: str) -> PackedMatrix:
        """As the CPU runtime has its weights."""
        found = self._panels.get(packing)
        if found is None:
            found = self._panels[packing] = PackedMatrix(self.weight, packing, self.bias)
        return found

    def logits(self, states: Tensor) -> Tensor:
        """[..., H] -> [..., draft vocabulary], without gradients: few rows are multiplied in oneDNN's layout."""
        x = states.to(self.weight.dtype)
        if self._onednn is None:
            return F.linear(x, self.weight, self.bias)
        return packed_linear(x, self._onednn, self.weight, self.bias)

    @cached_property
    def _onednn(self) -> Tensor | None:
        return pack(self.weight) if can_pack(self.weight) else None
