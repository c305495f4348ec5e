"""EAGLE-3 checkpoints as they are written, for every engine that reads one: the inverse of `files.py`.

    eagle3       its authors' names and config, which vLLM, SGLang and TensorRT-LLM read
    speculators  the same tensors in Red Hat's config, which names the base: `vllm serve FOLDER` starts from that alone

Both hold layer ids as vLLM understands them, which are the boundaries themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor

from .files import OWN_BOUNDARIES, Eagle3File

CHAIN = 3  # tokens that other engines draft at a time, one behind the other: most of their users' choice
LAYOUTS = ("eagle3", "speculators")
Layout = Literal["eagle3", "speculators"]
AUX_IDS = "eagle_aux_hidden_state_layer_ids"
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_SHAPE = (*_SIZES, "head_dim", "vocab_size", "rms_norm_eps", "hidden_act", "max_position_embeddings", "rope_parameters")


def state_dict(file: Eagle3File, layout: Layout = "eagle3") -> dict[str, Tensor]:
    """The tensors by their names: the authors call a single layer `midlayer`, speculators count. d2t holds offsets."""
    state: dict[str, Tensor] = {}
    single = len(file.layers) == 1 and layout == "eagle3"
    for index, layer in enumerate(file.layers):
        place = "midlayer" if single else f"layers.{index}"
        state |= {f"{place}.{name}": tensor for name, tensor in layer.items()}
    named = {
        "norm.weight": file.norm,
        "fc.weight": file.fc,
        "fc.bias": file.fc_bias,
        "input_norm.weight": file.input_norm,
        "embed_tokens.weight": file.embedding,
        "lm_head.weight": file.unembedding,
    }
    state |= {name: tensor for name, tensor in named.items() if tensor is not None}
    state |= {f"fc_norm.{index}.weight": tensor for index, tensor in enumerate(file.state_norms)}
    if file.token_map is not None:
        ids = file.token_map.cpu()
        state["d2t"] = ids - torch.arange(len(ids))
        state["t2d"] = torch.zeros(file.config.vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
    return state


def config(file: Eagle3File, layout: Layout, base: str) -> dict[str, Any]:
    """What `config.json` says in a layout.

    base: name of the model that the drafter was made for, "" where it is unknown.
    """
    return _speculators(file, base) if layout == "speculators" else _authors(file, base)


def model_type(file: Eagle3File) -> str:
    """The family whose layers the drafter has: norms of queries and keys are Qwen3's."""
    return "qwen3" if "self_attn.q_norm.weight" in file.layers[0] else "llama"


def _authors(file: Eagle3File, base: str) -> dict[str, Any]:
    architecture = "Eagle3Qwen3ForCausalLM" if model_type(file) == "qwen3" else "LlamaForCausalLMEagle3"
    return {
        "architectures": [architecture],
        **_layer_config(file),
        **_options(file),
        **_states(file),
        "base_model_name_or_path": base,
    }


def _speculators(file: Eagle3File, base: str) -> dict[str, Any]:
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": CHAIN,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": base, "architectures": []},
        },
        # vLLM takes this and some of what lies beside it; how many states there are it asks of this alone.
        "transformer_layer_config": _layer_config(file) | _states(file),
        **_options(file),
    }


def _options(file: Eagle3File) -> dict[str, Any]:
    """What both layouts say beside the layers' sizes."""
    found: dict[str, Any] = {
        "draft_vocab_size": file.draft_vocab_size,
        "norm_before_residual": file.norm_before_residual,
        "norm_output": file.norm_output,
        "norm_before_fc": file.input_norm is not None,
        "fc_norm": bool(file.state_norms),
        "tie_word_embeddings": False,
    }
    if file.boundaries is not None:
        found |= {AUX_IDS: list(file.boundaries), OWN_BOUNDARIES: list(file.boundaries)}
    if (target := getattr(file.config, "target_hidden_size", None)) is not None:
        found["target_hidden_size"] = target
    return found


def _states(file: Eagle3File) -> dict[str, Any]:
    """How many states are fused, and which, as vLLM and SGLang ask for it."""
    eagle: dict[str, Any] = {"use_aux_hidden_state": file.fc is not None}
    if file.boundaries is not None:
        eagle[AUX_IDS] = list(file.boundaries)
    return {"num_aux_hidden_states": file.num_states, "eagle_config": eagle}


def _layer_config(file: Eagle3File) -> dict[str, Any]:
    sizes = {name: getattr(file.config, name) for name in _SHAPE}
    rope = _rope(cast(Mapping[str, Any], file.config.rope_parameters))
    return {"model_type": model_type(file), "attention_bias": biased(file), **sizes, **rope}


def biased(file: Eagle3File) -> bool:
    """Whether any product of attention has a bias."""
    return any(name.endswith("_proj.bias") for layer in file.layers for name in layer)


def _rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Rope as transformers before version 5 reads it: an engine on such a one would take 10,000 for every base."""
    scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
    scaled = scaling.get("rope_type", "default") != "default"
    return {"rope_theta": parameters["rope_theta"], **({"rope_scaling": scaling} if scaled else {})}
