"""Attention backends, entered through transformers' own AttentionInterface and mask interface.

transformers asks the mask interface once per kind of layer (full, sliding, chunked) and hands the result to every such
layer. We answer with a ForestMask; `KVPool.update` gives each layer the pool, and the backend picks slots by request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from .forest import Forest, ForestMask
from .triton_kernels.reference import tree_attention

_current_forest: ContextVar[Forest] = ContextVar("medusa_apar_forest")


def _forest_mask(*args, mask_function: Callable, **kwargs) -> ForestMask:
    return _current_forest.get().mask(mask_function)


def sdpa_forest_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: ForestMask,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Dense-mask attention, request by request: query [1, heads, N, head_dim], key and value the pool's tensors."""
    out = [
        tree_attention(
            query[0, :, group.rows],
            key[group.columns],
            value[group.columns],
            attention_mask.bias(index, query.shape[1] // key.shape[1], query.dtype),
            scale=scaling,
            softcap=softcap,
            sinks=s_aux,
        )
        for index, group in enumerate(attention_mask.groups)
    ]
    return (out[0] if len(out) == 1 else torch.cat(out))[None], None


BACKENDS: dict[str, Callable] = {"sdpa": sdpa_forest_attention}

for _name, _function in BACKENDS.items():
    AttentionInterface.register(f"medusa_apar_{_name}", _function)
    AttentionMaskInterface.register(f"medusa_apar_{_name}", _forest_mask)


def pick_backend(attention: str) -> str:
    if attention != "auto" and attention not in BACKENDS:
        raise ValueError(f"attention={attention!r} is not one of 'auto', {', '.join(map(repr, BACKENDS))}.")
    return "sdpa" if attention == "auto" else attention


@contextmanager
def forest_attention(model: PreTrainedModel, backend: str) -> Iterator[None]:
    """Within the block `model` attends over forests; afterwards it has the implementation it had before."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if config is not None}.values()
    before = [(config, config._attn_implementation) for config in configs]
    try:
        for config, _ in before:
            config._attn_implementation = f"medusa_apar_{backend}"
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


@contextmanager
def current_forest(forest: Forest) -> Iterator[None]:
    token = _current_forest.set(forest)
    try:
        yield
    finally:
        _current_forest.reset(token)
