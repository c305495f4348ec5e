"""Answers that heads are trained on, and models for their ids."""

import json
import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, FORK, CHILD, EOS = 47, 43, 44, 45


def small_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


RECORD = {
    "prompt_ids": [1, 2, 3, 4],
    "threads": [
        {"parent": -1, "fork_index": 0, "token_ids": [5, 6, FORK, 7, 8, FORK, 9, EOS]},
        {"parent": 0, "fork_index": 2, "token_ids": [CHILD, 10, FORK, 11, EOS]},
        {"parent": 0, "fork_index": 5, "token_ids": [CHILD, 12, 13]},  # cut by a limit
        {"parent": 1, "fork_index": 2, "token_ids": [CHILD, 14, EOS]},
    ],
}


def a_model_that_counts(layers=0):
    """A model that prefers token t+1 after token t: its heads can learn to count further. Layers add nothing."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=layers, num_attention_heads=1, eos_token_id=EOS
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    model.lm_head.weight.copy_(model.model.embed_tokens.weight.roll(1, 0) * 0.3)
    return model


def counting_answers(path):
    """21 answers that count, each with a child that goes on counting where the trunk did."""
    draw, lines = random.Random(0), []
    for _ in range(21):
        start = draw.randrange(40)
        trunk, child = ([(start + i) % 40 for i in range(length)] for length in (50, 30))
        threads = [
            {"parent": -1, "fork_index": 0, "token_ids": [*trunk[:3], FORK, *trunk[3:], EOS]},
            {"parent": 0, "fork_index": 3, "token_ids": [CHILD, *child]},
        ]
        lines.append(json.dumps({"prompt_ids": [start, start], "threads": threads}))
    path.write_text("\n".join(lines))
    return path


def held_out_lines(out):
    """What a training run's log says of held-out answers."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "held_out"]
