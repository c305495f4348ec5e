"""Tiny random models of many families, and the ids that they share."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from medusa_apar.threads.control_tokens import ControlTokens

VOCAB, EOS, FORK, CHILD = 61, 2, 3, 4
CONTROL = ControlTokens(FORK, CHILD)
LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
IDS = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0}

# Heads of 32 dimensions: the CPU runtime can run it.
WIDE = LLAMA_LIKE | {"hidden_size": 96, "intermediate_size": 112, "num_attention_heads": 6, "head_dim": 32}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**LLAMA_LIKE, **IDS),
    "wide_llama": lambda: LlamaConfig(**WIDE, **IDS),
    # Rope as Llama 3's, whose long waves are stretched.
    "llama3": lambda: LlamaConfig(**LLAMA_LIKE, **IDS, rope_parameters=LLAMA3_ROPE),
    # Windows shorter than the text: masked by path position, or the test fails.
    "mistral": lambda: MistralConfig(**LLAMA_LIKE, **IDS, sliding_window=7),
    "qwen2": lambda: Qwen2Config(**LLAMA_LIKE, **IDS),
    "qwen3": lambda: Qwen3Config(**LLAMA_LIKE, **IDS, head_dim=8),
    "gemma2": lambda: Gemma2Config(**LLAMA_LIKE, **IDS, head_dim=8, sliding_window=6),
    "gemma3": lambda: Gemma3TextConfig(
        **LLAMA_LIKE, **IDS, head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda: Phi3Config(**LLAMA_LIKE, **IDS),
    "gpt_neox": lambda: GPTNeoXConfig(
        **{key: value for key, value in LLAMA_LIKE.items() if key != "num_key_value_heads"}, **IDS
    ),
    "olmo2": lambda: Olmo2Config(**LLAMA_LIKE, **IDS),
    # Attention sinks, mixture of experts.
    "gpt_oss": lambda: GptOssConfig(
        **LLAMA_LIKE, **IDS, head_dim=8, sliding_window=6, num_local_experts=4, num_experts_per_tok=2
    ),
    "gpt2": lambda: GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=256, **IDS),
}


def tiny_model(family: str = "llama", seed: int = 0, scale: float = 3.0, **bias: float) -> PreTrainedModel:
    """Random weights, scaled up so that the text varies and ties do not occur. `bias` nudges "fork" and "eos"."""
    return random_model(CONFIGS[family](), seed, scale, **bias)


def random_model(config: PretrainedConfig, seed: int, scale: float, **bias: float) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    if bias:
        head = torch.nn.Linear(model.config.hidden_size, VOCAB, bias=True)
        head.weight.data = model.get_output_embeddings().weight.data.clone()
        head.bias.data.zero_()
        head.bias.data[FORK], head.bias.data[EOS] = bias.get("fork", 0.0), bias.get("eos", 0.0)
        model.set_output_embeddings(head)
    return model


def forking_model(seed: int, family: str = "llama") -> PreTrainedModel:
    """Forks often, deep, and ends some of its threads."""
    return tiny_model(family, seed, scale=6.0, fork=0.9, eos=0.4)


_SIZES = WIDE | {"num_hidden_layers": 3, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": EOS}

# What the CPU runtime runs.
COMPILED = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "llama, 5 queries a head": lambda: LlamaConfig(
        **{**_SIZES, "num_attention_heads": 5, "num_key_value_heads": 1, "hidden_size": 160}
    ),
    "llama, no groups": lambda: LlamaConfig(**{**_SIZES, "num_key_value_heads": 6, "head_dim": 64}),
    "mistral": lambda: MistralConfig(**_SIZES, sliding_window=7),
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "heads of 96": lambda: LlamaConfig(**{**_SIZES, "head_dim": 96, "num_attention_heads": 2}),
    "heads of 128": lambda: LlamaConfig(**{**_SIZES, "head_dim": 128, "num_attention_heads": 2}),
    "llama, biases": lambda: LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True),
    "qwen3": lambda: Qwen3Config(**_SIZES),
    "smollm3": lambda: SmolLM3Config(**_SIZES, no_rope_layer_interval=2, pad_token_id=0),
    "granite": lambda: GraniteConfig(
        **_SIZES, embedding_multiplier=3.0, residual_multiplier=0.6, attention_multiplier=0.1, logits_scaling=2.0
    ),
    "phi3": lambda: Phi3Config(**_SIZES, pad_token_id=0, sliding_window=9),
    "phi3, partly turned": lambda: Phi3Config(
        **{**_SIZES, "head_dim": 64},
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    "olmo2": lambda: Olmo2Config(**_SIZES),
    "gemma2": lambda: Gemma2Config(**_SIZES, sliding_window=6, query_pre_attn_scalar=50, pad_token_id=0),
    "gemma2, tight caps": lambda: Gemma2Config(
        **_SIZES, sliding_window=6, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, pad_token_id=0
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_SIZES,
        sliding_window=5,
        pad_token_id=0,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gemma3, two kinds": lambda: Gemma3TextConfig(
        **{**_SIZES, "num_hidden_layers": 2},
        sliding_window=5,
        pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "qwen2, windows": lambda: Qwen2Config(**_SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1),
}


def model_of(name="llama", seed=0, **bias):
    """A random model of a kind that the CPU runtime runs."""
    model = random_model(COMPILED[name](), seed, 6.0, **bias)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 and float(parameter.abs().max()) == 0:  # biases that a fresh model has at zero
                parameter.normal_(std=0.1)
    return model
