"""Which models the compiled step computes: those that are, module by module, what transformers defines.

A name tells little. A class of the name may be somebody else's, its `forward` may have been replaced, in the class or
in an instance, and hooks may change what goes in and out. Such a model is left to torch, which runs what is there.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from .layers import ACTIVATIONS, FAMILIES, Family, eps_of, family_of, layers_of, rotary_kinds, score_cap

_HELPERS = ("apply_rotary_pos_emb", "rotate_half")  # what a module's `forward` calls of its own file
_FOLDERS = tuple(str(Path(str(package.__file__)).parent) + os.sep for package in (transformers, torch))


def unknown_part(model: PreTrainedModel) -> str | None:
    """Says in half a sentence which part of a model is not as transformers defines it; None where every part is."""
    family = family_of(model)
    if family is None:
        return f"{type(model).__name__} is none of the models that it knows ({', '.join(FAMILIES)})"
    home = family.home
    try:
        parts = list(_parts(model, family))
    except (AttributeError, KeyError, TypeError) as error:
        return f"{type(model).__name__} is not built like {family.name} ({error})"
    for module, *names in parts:
        kind: Any = type(module)
        if kind.__name__ not in names:
            return f"its {names[0]} is a {kind.__name__}"
        own = vars(kind)
        if not _is_own(kind, home, own.get("forward"), own.get("_norm"), kind.__call__):
            return f"the forward pass of its {kind.__name__} is not the one that transformers defines"
    if any(_innermost(vars(sys.modules[home]).get(name)) is None for name in _HELPERS):
        return f"the rotary embeddings of {family.name} are not the ones that transformers defines"
    for module in model.modules():
        its = vars(module)
        if not (its["_forward_hooks"] or its["_forward_pre_hooks"] or "forward" in its):
            continue
        hooks = [*its["_forward_hooks"].values(), *its["_forward_pre_hooks"].values()]
        if "forward" in its:
            hooks.append(its["forward"])
        if not all(only_looks_on(hook) for hook in hooks):
            return f"a {type(module).__name__} of the model has hooks"
    if torch.nn.modules.module._has_any_global_hook():
        return "all modules have hooks"
    return None


def _parts(model: Any, family: Family) -> Iterator[tuple[Any, ...]]:
    """Every module whose work the compiled step does, and what its class may be called. By way of `_modules`, since
    this is asked in every call."""
    decoder, name = model._modules["model"], family.name
    own = decoder._modules
    yield model, f"{name}ForCausalLM"
    yield decoder, name + family.decoder
    yield own["embed_tokens"], family.embedding
    yield own["rotary_emb"], f"{name}RotaryEmbedding"
    yield own["norm"], f"{name}RMSNorm"
    yield model._modules["lm_head"], "Linear"
    for parts in layers_of(model, family):
        yield parts.layer, f"{name}DecoderLayer"
        yield parts.attention, f"{name}Attention"
        yield parts.mlp, f"{name}MLP"
        yield parts.activation, *ACTIVATIONS
        for norm in parts.all_norms:
            yield norm, f"{name}RMSNorm"
        for linear in parts.linears:
            yield linear, "Linear"
        for dropout in parts.dropouts:
            yield dropout, "Dropout"


@functools.lru_cache(maxsize=256)
def _is_own(kind: Any, home: str, forward: Any, norm: Any, call: Any) -> bool:
    """Whether a class and its `forward`, and what that calls of it, are those of transformers or torch; asked again
    where one is replaced."""
    if kind.__module__ != home and not kind.__module__.startswith(("torch.nn.modules.", "transformers.activations")):
        return False
    if norm is not None and _innermost(norm) is None:
        return False
    code = _innermost(forward)
    if code is None or code.co_qualname != f"{kind.__name__}.forward":
        return False
    return code.co_filename == sys.modules[kind.__module__].__file__ and _innermost(call) is not None


def _innermost(function: Any) -> CodeType | None:
    """The code of what a function wraps at last; None where any of them was written outside transformers and torch.
    `functools.wraps` makes anybody's function bear another's name, but not its file."""
    while isinstance(function, FunctionType) and function.__code__.co_filename.startswith(_FOLDERS):
        if not hasattr(function, "__wrapped__"):
            return function.__code__
        function = function.__wrapped__
    return None


def only_looks_on(hook: Any) -> bool:
    """Whether a hook changes nothing: one of another call of ours that runs this very model in torch, or those that
    transformers leaves in a model which was asked for its hidden states once."""
    module = str(getattr(getattr(hook, "func", hook), "__module__", ""))
    return module.startswith("medusa_apar.") or module == "transformers.utils.output_capturing"


def odd_scale(model: Any) -> str | None:
    """Whether layers of a model that is known differ in what the compiled step has one number for."""
    family = family_of(model)
    assert family is not None
    decoder, layers = model.model, layers_of(model, family)
    scales = {
        (parts.attention.scaling, score_cap(parts.attention), getattr(parts.layer, "residual_multiplier", 1.0))
        for parts in layers
    }
    small = {eps_of(norm) for norm in (decoder.norm, *(norm for parts in layers for norm in parts.all_norms))}
    if len(scales) > 1 or len(small) > 1:
        return "its layers differ in how they scale"
    if len({ACTIVATIONS[type(parts.activation).__name__] for parts in layers}) > 1:
        return "its layers differ in their activation"
    if any(module.training for parts in layers for module in (parts.attention, *parts.dropouts)):
        return "a part of it is in training mode"
    if not all(parts.attention.is_causal for parts in layers):
        return "its rows see what comes after them"
    return None if decoder.embed_tokens.max_norm is None else "its embeddings are normalised"


def odd_shape(model: Any) -> str | None:
    """Which weights of a model that is known have other sizes than its config says; None where all agree."""
    family = family_of(model)
    assert family is not None
    config, decoder, layers = model.config, model.model, layers_of(model, family)
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim = layers[0].attention.head_dim
    widths = {"qkv": (heads * dim, kv_heads * dim, kv_heads * dim), "gate_up": (inner, inner)}
    if family.fused:
        widths = {name: (sum(each),) for name, each in widths.items()}
    for parts in layers:
        expected = {
            **{id(each): (width, hidden) for each, width in zip(parts.qkv, widths["qkv"], strict=True)},
            **{id(each): (width, hidden) for each, width in zip(parts.gate_up, widths["gate_up"], strict=True)},
            **{id(parts.output): (hidden, heads * dim), id(parts.down): (hidden, inner)},
        }
        for linear in parts.linears:
            if tuple(linear.weight.shape) != expected[id(linear)]:
                return f"a linear layer of its {_place(parts, linear)} is of another size than its config says"
        if any(norm is not None and tuple(norm.weight.shape) != (hidden,) for norm in parts.norms):
            return "a norm is of another size than its config says"
        sizes = [tuple(norm.weight.shape) for norm in parts.path_norms]
        if sizes and sizes not in ([(dim,), (dim,)], [(heads * dim,), (kv_heads * dim,)]):
            return "a norm of its queries or keys is of another size than its config says"
    if tuple(decoder.norm.weight.shape) != (hidden,) or decoder.embed_tokens.weight.shape[1:] != (hidden,):
        return "its embeddings are of another size than its config says"
    if model.lm_head.weight.shape[1] != hidden:
        return "its unembedding is of another size than its config says"
    tables = [getattr(decoder.rotary_emb, f"{kind}inv_freq") for kind in rotary_kinds(decoder.rotary_emb)]
    turned = {2 * len(table) for table in tables}
    if dim % 32 or hidden % 16 or inner % 16 or any(each % 32 or each > dim for each in turned):
        return "its sizes are no multiples of 16 (heads, and what is turned of them, of 32)"
    return "its layers turn heads to different widths" if len(turned) > 1 else None


def _place(parts: Any, linear: Any) -> str:
    return "MLP" if linear in (*parts.gate_up, parts.down) else "attention"
