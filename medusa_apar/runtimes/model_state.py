"""Whether a model still computes what it did, as far as its modules, their settings and their weights tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .cpu.packed_model import weights_of
from .cpu.weight_fingerprint import WeightFingerprint, plain


class ModelState:
    """What a model was. An adapter that is switched on or off, say, changes no weight but a setting of a module."""

    def __init__(self, model: Any) -> None:
        weights = weights_of(model)
        self._modules, self._unreadable = _modules(model), _unreadable(weights)
        self._fingerprint = WeightFingerprint(_readable(weights))

    def is_of(self, model: Any) -> bool:
        """Whether it still is that. Of large weights a part is read each time: `WeightFingerprint` says how much."""
        weights = weights_of(model)
        return (
            _unreadable(weights) == self._unreadable
            and _modules(model) == self._modules
            and self._fingerprint.matches(_readable(weights))
        )


def _readable(weights: Sequence[Tensor]) -> list[Tensor]:
    return [weight for weight in weights if plain(weight)]


def _unreadable(weights: Sequence[Tensor]) -> list[tuple]:
    """What can be told of weights of a quantiser, and of those that are offloaded."""
    return [(id(weight), weight.dtype, weight.shape) for weight in weights if not plain(weight)]


def _modules(model: Any) -> list[tuple]:
    """Each module with those of its own attributes that are numbers, names or collections of these."""
    return [
        (id(module), type(module), [(name, repr(value)) for name, value in vars(module).items() if _is_setting(value)])
        for module in model.modules()
    ]


def _is_setting(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_setting, (*value, *value.values())))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_setting, value))
    return isinstance(value, (bool, int, float, str, type(None)))
