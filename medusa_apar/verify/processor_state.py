"""Which logits processors keep state between calls: threads, rows and drafts would mix it up."""

from __future__ import annotations

import array
import collections
import datetime
import decimal
import functools
import io
import itertools
import operator
import pickle
import random
import re
import types
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# One look takes a millisecond or two at most, whatever a processor holds.
_NODES = 128  # values that are looked at, those nearest to the processor first
_ENTRIES = 16  # of each container, from either end
_DEPTH = 7
_DIGESTED = 1 << 22  # bytes of an array; of a larger one, as many spread over it
# Every call is looked at until so many have changed nothing, then one in so many.
_OFTEN, _SELDOM = 32, 16

_VALUES = (type(None), bool, int, float, complex, str, bytes, np.generic)
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)
_BUFFERS = (bytearray, array.array)
_SEQUENCES = (list, tuple, collections.deque)
_BOUND = (types.MethodType, types.BuiltinMethodType, types.MethodWrapperType)
# What results do not depend on through anything that a call changes. Files are for notes.
_PURE = (
    *(type, types.ModuleType, types.CodeType, PreTrainedModel, PreTrainedTokenizerBase, io.IOBase),
    *(re.Pattern, re.Match),
    *(range, slice, datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo, decimal.Decimal, np.dtype),
    *(operator.itemgetter, operator.attrgetter, operator.methodcaller, np.ufunc, types.EllipsisType),
    *(types.MethodDescriptorType, types.WrapperDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType),
)
_PURE_PACKAGES = {
    *("tokenizers", "sentencepiece", "torch", "medusa_apar", "logging", "threading", "_thread", "weakref", "json"),
    *("_json", "regex", "_regex"),
}
_OF_MODULES = frozenset(vars(torch.nn.Module()))
_HELD = ("_buffers", "_parameters", "_modules")


class StateWatch:
    """Looks at `processors` after they were called.

    What the first call leaves behind is a cache, and so is a dict or a set that only grows. Whatever else changes from
    one call to the next is state: the next result may depend on it. What cannot be looked into, such as an iterator or
    an object of compiled code, may be state. State in globals is not seen, nor what lies deep in large containers.
    """

    def __init__(self, processors: Iterable[Callable]) -> None:
        self._watched = list(processors)
        self._before: list[dict[tuple, Any]] | None = None
        self._calls = 0
        self.users = 0  # unfinished requests whose processors these are
        self.shared = False  # whether there were several at once
        self.stateful: str | None = None  # the name of one that is, and what it does

    def called(self) -> None:
        if not self._watched or self.stateful is not None:
            return
        self._calls += 1
        if self._calls > _OFTEN and self._calls % _SELDOM:
            return
        now = [_picture(processor) for processor in self._watched]
        for processor, before, after in zip(self._watched, self._before or now, now, strict=True):
            if any(_changed(state, after[path]) for path, state in before.items() if path in after):
                self.stateful = f"{name_of(processor)} keeps state"
                return
            if opaque := next((state.kind for state in after.values() if isinstance(state, _Opaque)), None):
                self.stateful = f"{name_of(processor)} may keep state (in its {opaque})"
                return
        self._before = now


def name_of(processor: Callable) -> str:
    return getattr(processor, "__name__", type(processor).__name__)


@dataclass(frozen=True, slots=True)
class _Same:
    """What is told apart by being itself; kept, so that nothing new can take its address."""

    what: Any
    version: Any = None


@dataclass(frozen=True, slots=True)
class _Growing:
    """A dict or a set, and some of its keys."""

    what: Any
    size: int
    keys: list[Any]


@dataclass(frozen=True, slots=True)
class _Opaque:
    kind: str


def _picture(processor: Callable) -> dict[tuple, Any]:
    """What is to be compared with a later picture, by where it was found."""
    picture: dict[tuple, Any] = {}
    queue: collections.deque[tuple[tuple, Any]] = collections.deque([((), processor)])
    seen: set[int] = set()
    while queue:
        path, value = queue.popleft()
        picture[path], parts = _state(value)
        if len(path) < _DEPTH and id(value) not in seen:
            seen.add(id(value))
            room = _NODES - len(picture) - len(queue)
            queue.extend(((*path, name), part) for name, part in itertools.islice(parts, max(room, 0)))
    return picture


def _state(value: Any) -> tuple[Any, Iterable[tuple[Any, Any]]]:
    """What of a value can be compared by itself, and the parts to look into."""
    if isinstance(value, _VALUES):
        return (type(value), value), ()
    if type(value) is torch.Generator:  # `isinstance` of this one takes 2 us
        return _Same(value, value.get_state().numpy().tobytes()), ()
    if isinstance(value, torch.Tensor):
        return _Same(value, None if value.is_inference() else value._version), ()
    if isinstance(value, np.ndarray):
        return _Same(value, _digest(value)), ()
    if isinstance(value, _BUFFERS):
        return (type(value), len(value), zlib.crc32(value)), ()
    if isinstance(value, _GENERATORS):
        try:
            return _Same(value, pickle.dumps(value)), ()
        except Exception:  # of those that draw from the machine
            return _Opaque(type(value).__name__), ()
    if isinstance(value, torch.nn.Module) and not isinstance(value, PreTrainedModel):
        own = ((name, part) for name, part in vars(value).items() if name not in _OF_MODULES)
        return _Same(value), itertools.chain(own, *(vars(value)[name].items() for name in _HELD))
    attributes = _attributes(value)
    others = (attributes or {}).items()
    if isinstance(value, _SEQUENCES):
        last = itertools.islice(reversed(value), 2 * _ENTRIES)
        return (type(value), len(value)), itertools.chain(others, enumerate(last))
    if isinstance(value, (dict, types.MappingProxyType)):
        ends = itertools.islice(value, _ENTRIES), itertools.islice(reversed(value), _ENTRIES)
        keys = list(dict.fromkeys(itertools.chain(*ends)))
        entries = ((("entry", key), value[key]) for key in keys if key in value)
        return _Growing(value, len(value), keys), itertools.chain(others, entries)
    if isinstance(value, (set, frozenset)):
        return _Growing(value, len(value), list(itertools.islice(value, 2 * _ENTRIES))), others
    if isinstance(value, _PURE) or type(value).__module__.partition(".")[0] in _PURE_PACKAGES:
        return _Same(value), ()
    if attributes is None:
        return _Opaque(type(value).__name__), ()
    return _Same(value, tuple(attributes)), others


def _attributes(value: Any) -> dict[str, Any] | None:
    """By name; None where nothing can be known of them."""
    if type(value) is object:
        return {}
    kinds = type(value).__mro__
    parts: dict[str, Any] = {}
    if isinstance(value, _BOUND):
        return {"self": value.__self__}
    if isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        parts |= {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
        parts |= {"defaults": value.__defaults__, "keyword defaults": value.__kwdefaults__}
    elif isinstance(value, functools.partial):
        parts |= {"function": value.func, "arguments": value.args, "keywords": value.keywords}
    elif not hasattr(value, "__dict__") and not any("__slots__" in vars(kind) for kind in kinds):
        return None
    for kind in kinds:
        if "__slots__" in vars(kind):
            slots = (name for name, slot in vars(kind).items() if isinstance(slot, types.MemberDescriptorType))
            parts |= {slot: getattr(value, slot) for slot in slots if hasattr(value, slot)}
    return parts | dict(getattr(value, "__dict__", {}))


def _digest(values: np.ndarray) -> int:
    if values.dtype.hasobject:
        return hash(tuple(map(id, values.flat[:_NODES])))
    if values.nbytes > _DIGESTED:
        values = values.flat[:: -(-values.nbytes // _DIGESTED)]
    return zlib.crc32(np.ascontiguousarray(values).tobytes())


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _changed(before: Any, now: Any) -> bool:
    if type(before) is not type(now):
        return True
    if isinstance(before, _Same):
        return before.what is not now.what or before.version != now.version
    if isinstance(before, _Growing):
        return now.size < before.size or not all(key in now.what for key in before.keys)
    if isinstance(before, tuple):  # of a NaN, that it is one
        return before != now and (before[0] is not now[0] or before[1] == before[1] or now[1] == now[1])
    return False
