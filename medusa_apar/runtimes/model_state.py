"""Whether a model still computes what it did, as far as its modules, their settings and their weights tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .cpu.known import only_looks_on
from .cpu.packed_model import weights_of
from .cpu.weight_fingerprint import WeightFingerprint, plain

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


class ModelState:
    """What a model was. An adapter that is switched on or off, say, changes no weight but a setting of a module.

    Noticed are other modules, classes, weights, hooks, `forward`s, and settings, be they a module's or a config's:
    numbers, names, and collections of these. What looks the same and is another is not: a hook or a `forward` whose own
    mind has changed, an object in a setting, what code reads of files, the environment or other modules than the
    model's.
    """

    def __init__(self, model: Any) -> None:
        weights = weights_of(model)
        self._code, self._unreadable = _code(model), _unreadable(weights)
        self._fingerprint = WeightFingerprint(_readable(weights))

    def is_of(self, model: Any) -> bool:
        """Whether it still is that. Of large weights a part is read each time: `WeightFingerprint` says how much."""
        weights = weights_of(model)
        return (
            _unreadable(weights) == self._unreadable
            and _code(model) == self._code
            and self._fingerprint.matches(_readable(weights))
        )


def _readable(weights: Sequence[Tensor]) -> list[Tensor]:
    return [weight for weight in weights if plain(weight)]


def _unreadable(weights: Sequence[Tensor]) -> list[tuple]:
    """What can be told of weights of a quantiser, and of those that are offloaded."""
    return [(id(weight), weight.dtype, weight.shape) for weight in weights if not plain(weight)]


def _code(model: Any) -> list[tuple]:
    """What runs and by which settings: of all modules, of each module, and of each config."""
    everywhere = torch.nn.modules.module
    found: list[tuple] = [(*everywhere._global_forward_pre_hooks, *everywhere._global_forward_hooks)]
    configs: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        its = vars(module)
        found.append((id(module), type(module), type(module).forward, *_replaced(its), _settings(its)))
        if isinstance(config := its.get("config"), PreTrainedConfig):
            configs[id(config)] = config
    return found + [(key, _settings(vars(config))) for key, config in configs.items()]


def _replaced(its: dict[str, Any]) -> Iterator[Any]:
    """A module's own `forward`, and its hooks, each under a number that no other ever has; but for what only looks on,
    and comes and goes with passes of ours."""
    forward = its.get("forward")
    yield None if forward is None or only_looks_on(forward) else forward
    for name in _HOOKS:
        yield [(number, hook) for number, hook in list(its[name].items()) if not only_looks_on(hook)]


def _settings(attributes: dict[str, Any]) -> list[tuple[str, str]]:
    """A module's or a config's settings, but for which attention it names: `attention.forest_attention` sets that."""
    known = ((name, value) for name, value in list(attributes.items()) if _is_setting(value))
    own = (*_HOOKS, "_attn_implementation", "_attn_implementation_internal")
    return [(name, repr(value)) for name, value in known if name not in own]


def _is_setting(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_setting, (*value, *value.values())))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_setting, value))
    return isinstance(value, (bool, int, float, str, type(None)))
