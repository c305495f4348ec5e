"""Attention backends, entered through transformers' own AttentionInterface and mask interface.

transformers asks the mask interface once per kind of layer (full, sliding, chunked) and hands the result to every such
layer. We answer with a ForestMask; `KVPool.update` gives each layer the pool, and the backend picks slots by request.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from medusa_apar.forest.forest import Forest
from medusa_apar.forest.mask import ForestMask
from medusa_apar.triton_kernels.reference import dense_attention

from .devices import device_of

# Whatever the backend's mask function takes for one: dense masks a Forest, the kernels anything that has a layout.
_current_forest: ContextVar[Any] = ContextVar("medusa_apar_forest", default=None)
# transformers' attention function: queries, keys and values -> what is read, and weights where they are wanted.
Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
# What an attention function may be given that changes its result: sparse or biased attention that we do not do.
_NEVER_IGNORED = ("position_bias", "indices", "block_indices", "sinks")


def _dense_mask(forest: Forest, mask_function: Callable, local_size: int | None) -> ForestMask:
    return forest.mask(mask_function)


def sdpa_forest_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: ForestMask,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Dense-mask attention, request by request: query [1, heads, N, head_dim], key and value what KVPool returns."""
    out = [
        dense_attention(
            query[0, :, group.rows],
            _columns(key[0], group.columns),
            _columns(value[0], group.columns),
            attention_mask.bias(index, query.shape[1] // key.shape[1], query.dtype),
            scale=scaling,
            softcap=softcap,
            sinks=s_aux,
        )
        for index, group in enumerate(attention_mask.groups)
    ]
    return torch.cat(out)[None], None


def _columns(pool: torch.Tensor, columns: slice | torch.Tensor) -> torch.Tensor:
    """One request's slots of a layer's keys or values [kv_heads, capacity, head_dim], as KVPool returns them."""
    if isinstance(columns, slice):
        return pool[:, columns]
    # A slot's heads lie side by side: taken together they are copied 2.5 times as fast as head by head.
    return pool.transpose(0, 1).index_select(0, columns).transpose(0, 1)


# Attention over a forest, and what its `attention_mask` is made by.
BACKENDS: dict[str, tuple[Attention, Callable]] = {"sdpa": (sdpa_forest_attention, _dense_mask)}
if importlib.util.find_spec("triton") is not None:
    from .triton_attention import tree_mask, triton_forest_attention, unsupported_reason

    BACKENDS["triton"] = triton_forest_attention, tree_mask


def _mask_or_theirs(make: Callable) -> Callable:
    def mask(*args: Any, mask_function: Callable, config: Any, local_size: int | None = None, **kwargs: Any) -> Any:
        forest = _current_forest.get()
        if forest is not None:
            return make(forest, mask_function, local_size)
        # Somebody else's forward pass, while one of our calls is under way.
        theirs = ALL_MASK_ATTENTION_FUNCTIONS[_their_implementation(config)]
        return theirs(*args, mask_function=mask_function, config=config, local_size=local_size, **kwargs)

    return mask


def _or_theirs(backend: Attention) -> Attention:
    """The backend under a forest; what the model had before for a forward pass that is not ours."""

    def attend(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        if _current_forest.get() is not None:
            unknown = [name for name in _NEVER_IGNORED if kwargs.get(name) is not None]
            if unknown:
                name = type(module).__name__
                raise NotImplementedError(f"{name} attends with {', '.join(unknown)}, which is not supported.")
            return backend(module, *args, **kwargs)
        eager: Any = vars(sys.modules[type(module).__module__]).get("eager_attention_forward")
        theirs: Attention = ALL_ATTENTION_FUNCTIONS.get_interface(_their_implementation(module.config), eager)
        return theirs(module, *args, **kwargs)

    return attend


for _name, (_attend, _mask) in BACKENDS.items():
    AttentionInterface.register(f"medusa_apar_{_name}", _or_theirs(_attend))
    AttentionMaskInterface.register(f"medusa_apar_{_name}", _mask_or_theirs(_mask))


def pick_backend(attention: str, model: PreTrainedModel) -> str:
    """The backend's name; "auto" takes the kernels where they run compiled."""
    device = device_of(model).type
    devices = {parameter.device for parameter in model.parameters()}
    if attention == "auto":
        return "triton" if device == "cuda" and len(devices) == 1 and "triton" in BACKENDS else "sdpa"
    if attention not in ("sdpa", "triton"):
        raise ValueError(f"attention={attention!r} is not one of 'auto', 'sdpa', 'triton'.")
    if attention not in BACKENDS:
        raise ValueError("attention='triton' needs the package triton.")
    if attention == "triton" and len(devices) > 1:
        raise ValueError(f"attention='triton' needs the model on one device, and it lies on {len(devices)}.")
    if attention == "triton" and (why := unsupported_reason(device)):
        raise ValueError(f"attention='triton' cannot be had: {why}.")
    return attention


@dataclass(slots=True)
class _Swap:
    config: PreTrainedConfig
    before: str  # the implementation the model came with
    users: int = 0  # calls under way


_swaps: dict[int, _Swap] = {}  # by id of the config
_swaps_lock = threading.Lock()


def _their_implementation(config: Any) -> Any:
    # A foreign pass may have read our name just before the last of our calls gave the config back.
    swap = _swaps.get(id(config))
    return config._attn_implementation if swap is None else swap.before


@contextmanager
def forest_attention(model: PreTrainedModel, backend: str) -> Iterator[None]:
    """Within the block `model` attends over forests; when the last such block ends it is as it was.

    Calls may overlap, in threads or by turns, and the model's own forward passes go on beside them.
    """
    found = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if isinstance(config, PreTrainedConfig)}
    with _swaps_lock:
        for key, config in configs.items():
            swap = _swaps.setdefault(key, _Swap(config, config._attn_implementation))
            swap.users += 1
        for config in configs.values():
            config._attn_implementation = f"medusa_apar_{backend}"
    try:
        yield
    finally:
        with _swaps_lock:
            for key in configs:
                _swaps[key].users -= 1
            unused = [key for key in configs if not _swaps[key].users]
            for key in unused:  # all are given back before any is forgotten: see _their_implementation
                _swaps[key].config._attn_implementation = _swaps[key].before
            for key in unused:
                del _swaps[key]


@contextmanager
def current_forest(forest: Any) -> Iterator[None]:
    token = _current_forest.set(forest)
    try:
        yield
    finally:
        _current_forest.reset(token)
