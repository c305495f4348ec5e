"""Which logits processors keep state between calls: threads, rows and drafts would mix it up."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

_MOST = 64  # entries of a container that are looked at
_DEPTH = 4


class StateWatch:
    """Looks at `processors` after every time they were called.

    What the first call leaves behind is a cache, and so is a dict or a set that only grows. Whatever else changes from
    one call to the next is state: the next result may depend on it. State in globals is not seen.
    """

    def __init__(self, processors: Iterable[Callable]) -> None:
        self._watched = list(processors)
        self._before: list[Any] | None = None
        self.stateful: str | None = None  # the name of one that is

    def called(self) -> None:
        if not self._watched or self.stateful is not None:
            return
        now = [_state(processor, _DEPTH) for processor in self._watched]
        if self._before is not None:
            pairs = zip(self._watched, self._before, now, strict=True)
            self.stateful = next((name_of(which) for which, *states in pairs if _changed(*states)), None)
        self._before = now


def name_of(processor: Callable) -> str:
    return getattr(processor, "__name__", type(processor).__name__)


class _Growing(dict):
    """The state of a dict or a set."""


@dataclass(frozen=True, slots=True)
class _Same:
    """The state of what is told apart by being itself; kept, so that nothing new can take its address."""

    what: Any
    version: int | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.what is other.what and self.version == other.version


def _state(value: Any, depth: int) -> Any:
    """A picture of a value that a later one can be compared with."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return value
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, torch.Tensor):
        return _Same(value, None if value.is_inference() else value._version)
    if isinstance(value, (type, types.ModuleType, torch.nn.Module)) or not depth:
        return _Same(value)
    if isinstance(value, (list, tuple)):
        return len(value), [_state(entry, depth - 1) for entry in value[-_MOST:]]
    if isinstance(value, dict):
        return _Growing((repr(key), _state(value[key], depth - 1)) for key in list(value)[:_MOST])
    if isinstance(value, (set, frozenset)):
        return _Growing((repr(entry), None) for entry in list(value)[:_MOST]) if len(value) <= _MOST else len(value)
    parts: dict[str, Any] = {}
    if isinstance(value, types.MethodType):
        parts["self"] = value.__self__
    elif isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        parts |= {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
    own = getattr(value, "__dict__", {})
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()) if hasattr(value, name)]
    parts |= dict(own) | {name: getattr(value, name) for name in slots if isinstance(name, str)}
    return _Same(value), {name: _state(part, depth - 1) for name, part in list(parts.items())[:_MOST]}


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _changed(before: Any, now: Any) -> bool:
    if isinstance(before, _Growing) and isinstance(now, _Growing):
        return any(key not in now or _changed(state, now[key]) for key, state in before.items())
    if isinstance(before, dict) and isinstance(now, dict):
        return before.keys() != now.keys() or any(_changed(before[name], now[name]) for name in before)
    if isinstance(before, (list, tuple)) and isinstance(now, (list, tuple)):
        return len(before) != len(now) or any(map(_changed, before, now))
    return type(before) is not type(now) or (before != now and before == before)
