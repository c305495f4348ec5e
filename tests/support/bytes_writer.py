"""A tiny random model that writes bytes of characters, forks between them, and ends: texts that are hard to stream."""

from __future__ import annotations

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import medusa_apar
from medusa_apar import MedusaApar
from tests.support.byte_chat import byte_tokenizer
from tests.support.models import CONTROL, EOS, FORK

LETTERS = "aé你😀\n "  # of one to four bytes


def ids_of(text: str) -> list[int]:
    """A token a byte."""
    return byte_tokenizer()(text, add_special_tokens=False)["input_ids"]


def bytes_writer(seed: int = 0, fork: float = 5.0, eos: float = 2.5) -> MedusaApar:
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    head = torch.nn.Linear(config.hidden_size, config.vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        head.bias[ids_of(LETTERS)] = 6.0
        head.bias[FORK], head.bias[EOS] = fork, eos
    model.set_output_embeddings(head)
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=0)
    return medusa_apar.attach(model, None, CONTROL, tokenizer=tokenizer)
