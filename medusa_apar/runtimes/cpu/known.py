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

# Families whose decoder layers are Llama's: norm, rotary attention, norm, gated SiLU, both residual.
_FAMILIES = ("Llama", "Mistral", "Qwen2")
_HELPERS = ("apply_rotary_pos_emb", "rotate_half")  # what a module's `forward` calls of its own file
_FOLDERS = tuple(str(Path(str(package.__file__)).parent) + os.sep for package in (transformers, torch))


def unknown_part(model: PreTrainedModel) -> str | None:
    """Says in half a sentence which part of a model is not as transformers defines it; None where every part is."""
    family = type(model).__name__.removesuffix("ForCausalLM")
    home = f"transformers.models.{family.lower()}.modeling_{family.lower()}"
    if family not in _FAMILIES or type(model).__module__ != home:
        return f"{type(model).__name__} is not built like Llama"
    try:
        parts = list(_parts(model, family))
    except (AttributeError, KeyError, TypeError) as error:
        return f"{type(model).__name__} is not built like Llama ({error})"
    for module, *names in parts:
        kind: Any = type(module)
        if kind.__name__ not in names:
            return f"its {names[0]} is a {kind.__name__}"
        if not _is_own(kind, home, vars(kind).get("forward"), kind.__call__):
            return f"the forward pass of its {kind.__name__} is not the one that transformers defines"
    if any(_innermost(vars(sys.modules[home]).get(name)) is None for name in _HELPERS):
        return f"the rotary embeddings of {family} are not the ones that transformers defines"
    for module in model.modules():
        its = vars(module)
        if not (its["_forward_hooks"] or its["_forward_pre_hooks"] or "forward" in its):
            continue
        hooks = [*its["_forward_hooks"].values(), *its["_forward_pre_hooks"].values()]
        if "forward" in its:
            hooks.append(its["forward"])
        if not all(_only_looks_on(hook) for hook in hooks):
            return f"a {type(module).__name__} of the model has hooks"
    if torch.nn.modules.module._has_any_global_hook():
        return "all modules have hooks"
    return None


def _parts(model: Any, family: str) -> Iterator[tuple[Any, ...]]:
    """Every module whose work the compiled step does, and what its class may be called. By way of `_modules`, since
    this is asked in every call."""
    decoder = model._modules["model"]
    own = decoder._modules
    yield model, f"{family}ForCausalLM"
    yield decoder, f"{family}Model"
    yield own["embed_tokens"], "Embedding"
    yield own["rotary_emb"], f"{family}RotaryEmbedding"
    yield own["norm"], f"{family}RMSNorm"
    yield model._modules["lm_head"], "Linear"
    names = f"{family}DecoderLayer", f"{family}Attention", f"{family}MLP", f"{family}RMSNorm"
    for layer in own["layers"]:
        inner = layer._modules
        attention, mlp = inner["self_attn"], inner["mlp"]
        yield layer, names[0]
        yield attention, names[1]
        yield mlp, names[2]
        yield mlp._modules["act_fn"], "SiLUActivation", "SiLU"
        yield inner["input_layernorm"], names[3]
        yield inner["post_attention_layernorm"], names[3]
        for linear in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield attention._modules[linear], "Linear"
        for linear in ("gate_proj", "up_proj", "down_proj"):
            yield mlp._modules[linear], "Linear"


@functools.lru_cache(maxsize=256)
def _is_own(kind: Any, home: str, forward: Any, call: Any) -> bool:
    """Whether a class and its `forward` are those of transformers or torch; asked again where either is replaced."""
    if kind.__module__ != home and not kind.__module__.startswith(("torch.nn.modules.", "transformers.activations")):
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


def _only_looks_on(hook: Any) -> bool:
    """Whether a hook changes nothing: one of another call of ours that runs this very model in torch, or those that
    transformers leaves in a model which was asked for its hidden states once."""
    module = str(getattr(getattr(hook, "func", hook), "__module__", ""))
    return module.startswith("medusa_apar.") or module == "transformers.utils.output_capturing"


def odd_scale(model: Any) -> str | None:
    """Whether layers of a model built like Llama differ in what the compiled step has one number for."""
    decoder = model.model
    scales, small = set(), {decoder.norm.variance_epsilon}
    for layer in decoder.layers:
        scales.add(layer.self_attn.scaling)
        small |= {layer.input_layernorm.variance_epsilon, layer.post_attention_layernorm.variance_epsilon}
    if len(scales) > 1 or len(small) > 1:
        return "its layers differ in how they scale"
    return None if decoder.embed_tokens.max_norm is None else "its embeddings are normalised"


def odd_shape(model: Any) -> str | None:
    """Which weights of a model built like Llama have other sizes than its config says; None where all agree."""
    config, decoder = model.config, model.model
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    layers = decoder.layers[: config.num_hidden_layers]
    dim = layers[0].self_attn.head_dim
    shapes = {
        "self_attn.q_proj": (heads * dim, hidden),
        "self_attn.k_proj": (kv_heads * dim, hidden),
        "self_attn.v_proj": (kv_heads * dim, hidden),
        "self_attn.o_proj": (hidden, heads * dim),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    for layer in layers:
        for path, shape in shapes.items():
            if tuple(layer.get_submodule(path).weight.shape) != shape:
                return f"a {path} is of another size than its config says"
    if tuple(decoder.norm.weight.shape) != (hidden,) or decoder.embed_tokens.weight.shape[1:] != (hidden,):
        return "its embeddings are of another size than its config says"
    if model.lm_head.weight.shape[1] != hidden:
        return "its unembedding is of another size than its config says"
    if dim % 32 or hidden % 16 or inner % 16:
        return "its sizes are no multiples of 16 (heads of 32)"
    return None
