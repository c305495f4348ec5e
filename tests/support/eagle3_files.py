"""Random EAGLE-3 checkpoints in the layouts found in the wild: keys and shapes are public, weights are ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from tests.support.models import LLAMA3_ROPE


@dataclass(frozen=True)
class Layout:
    """How a checkpoint is written."""

    layers: int = 1
    states: int = 3
    draft_vocab: int | None = 12  # None: the whole vocabulary
    absolute: bool = False  # d2t holds ids, not what is to be added
    flags: bool = True  # t2d is there
    embedding: bool = False
    unembedding: bool = True
    midlayer: bool = True
    prefix: str = ""
    norms: tuple[str, ...] = ()  # of "q", "input", "state"
    bias: bool = False
    speculators: bool = False
    where_ids: str | None = None  # "top", "eagle_config" or None: absent
    ids: tuple[int, ...] = (1, 2, 4)
    target: int | None = None  # the base's width where it is another
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_theta": 10000.0})
    more: dict[str, Any] = field(default_factory=dict)


LAYOUTS = {
    "its authors'": Layout(),
    "with an embedding of its own": Layout(embedding=True, flags=False, where_ids="top"),
    "under eagle_config": Layout(
        where_ids="eagle_config", ids=(2, 3, 5), norms=("input",), more={"norm_before_fc": True}
    ),
    "speculators'": Layout(speculators=True, midlayer=False, where_ids="top", embedding=True),
    "vLLM's names": Layout(prefix="model.", midlayer=False, flags=False),
    "ids in d2t": Layout(absolute=True),
    "whole vocabulary": Layout(draft_vocab=None),
    "the base's unembedding": Layout(draft_vocab=None, unembedding=False),
    "two layers": Layout(layers=2, midlayer=False),
    "five states": Layout(states=5, ids=(1, 2, 3, 4, 5), where_ids="top"),
    "Qwen3's norms": Layout(
        norms=("q",), bias=True, rope={"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    ),
    "biases": Layout(bias=True),
    "a norm for each state": Layout(norms=("state",), target=16, more={"fc_norm": True}),
    "scaled rope": Layout(
        rope={"rope_theta": 5e5, "rope_scaling": {name: x for name, x in LLAMA3_ROPE.items() if name != "rope_theta"}}
    ),
    "norm before the residual": Layout(more={"norm_before_residual": True, "norm_output": True}),
}
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FEED, VOCAB = 24, 4, 2, 8, 40, 40


def checkpoint(
    layout: Layout,
    seed: int = 0,
    hidden: int = HIDDEN,
    vocab: int = VOCAB,
    head_dim: int = HEAD_DIM,
    feed: int = FEED,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State dict and config of a drafter so wide."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    def norm(size: int) -> torch.Tensor:
        return 1 + random(size)

    target = layout.target or hidden
    state: dict[str, torch.Tensor] = {"norm.weight": norm(hidden), "fc.weight": random(hidden, layout.states * target)}
    for index in range(layout.layers):
        wide = hidden if index else 2 * hidden
        layer = {
            "input_layernorm.weight": norm(hidden),
            "post_attention_layernorm.weight": norm(hidden),
            "self_attn.q_proj.weight": random(heads * head_dim, wide),
            "self_attn.k_proj.weight": random(kv_heads * head_dim, wide),
            "self_attn.v_proj.weight": random(kv_heads * head_dim, wide),
            "self_attn.o_proj.weight": random(hidden, heads * head_dim),
            "mlp.gate_proj.weight": random(feed, hidden),
            "mlp.up_proj.weight": random(feed, hidden),
            "mlp.down_proj.weight": random(hidden, feed),
        }
        if not index:
            layer["hidden_norm.weight"] = norm(hidden)
        if layout.bias:
            sizes = heads * head_dim, kv_heads * head_dim, kv_heads * head_dim
            layer |= {f"self_attn.{name}_proj.bias": random(size) for name, size in zip("qkv", sizes, strict=True)}
        if "q" in layout.norms:
            layer |= {"self_attn.q_norm.weight": norm(head_dim), "self_attn.k_norm.weight": norm(head_dim)}
        place = "midlayer" if layout.midlayer else f"layers.{index}"
        state |= {f"{place}.{name}": tensor for name, tensor in layer.items()}
    if "input" in layout.norms:
        state["input_norm.weight"] = norm(layout.states * target)
    if "state" in layout.norms:
        state |= {f"fc_norm.{index}.weight": norm(target) for index in range(layout.states)}
    if layout.embedding:
        state["embed_tokens.weight"] = random(vocab, hidden)
    if layout.unembedding:
        state["lm_head.weight"] = random(layout.draft_vocab or vocab, hidden)
    if layout.draft_vocab is not None:
        ids = torch.randperm(vocab, generator=generator)[: layout.draft_vocab].sort().values
        name = "draft_id_to_target_id" if layout.prefix else "d2t"
        state[name] = ids if layout.absolute else ids - torch.arange(len(ids))
        if layout.flags:
            state["t2d"] = torch.zeros(vocab, dtype=torch.bool).index_fill_(0, ids, True)
    state = {
        key if key in ("d2t", "t2d", "lm_head.weight") else layout.prefix + key: value for key, value in state.items()
    }
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": feed,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,  # a lie: the tensors count
        "num_hidden_layers": 7,  # likewise
        "head_dim": head_dim,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        **layout.rope,
    }
    ids = {"eagle_aux_hidden_state_layer_ids": list(layout.ids)}
    if layout.target is not None:
        sizes["target_hidden_size"] = layout.target
    if layout.speculators:
        config = {
            "speculators_model_type": "eagle3",
            "transformer_layer_config": sizes,
            "draft_vocab_size": layout.draft_vocab,
        }
    else:
        config = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": layout.draft_vocab, **sizes}
    if layout.where_ids == "top":
        config |= ids
    elif layout.where_ids == "eagle_config":
        config["eagle_config"] = ids | {"use_aux_hidden_state": True}
    return state, config | layout.more
