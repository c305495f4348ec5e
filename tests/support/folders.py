"""Saved models and adapters, as `load` takes them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.support.models import CHILD, FORK, VOCAB, forking_model
from tests.support.tokenizers import WORDS, save_tokenizer, tiny_tokenizer

PROMPT = torch.tensor([[1, FORK, CHILD, 9, 17]])  # for a model of words


def forking_folder(folder: Path, family: str = "llama") -> Path:
    """A saved model that forks, its tokenizer and its control ids: what `load` takes."""
    model = forking_model(3, family)
    biased = model.get_output_embeddings()
    plain = torch.nn.Linear(biased.in_features, VOCAB, bias=False)  # a Llama folder has no bias to keep
    plain.weight.data = biased.weight.data.clone()
    plain.weight.data[FORK] *= 3
    model.set_output_embeddings(plain)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "apar_config.json").write_text(json.dumps({"fork_token_id": FORK, "child_token_id": CHILD}))
    return folder


def own_code(folder):
    """Makes a Llama's folder one whose classes lie in the folder."""
    (folder / "own_llama.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n\n\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "own_llama.OwnConfig", "AutoModelForCausalLM": "own_llama.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own_llama", "auto_map": auto}))
    return folder


def lora_of(base, folder, **options):
    """A random adapter, every trained number of it other than the base's; returns its logits before any merging."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(torch.randn_like(parameter))
    tuned.save_pretrained(folder)
    with torch.no_grad():
        return tuned(PROMPT).logits


def word_model(seed=0):
    """A Llama with the vocabulary of `save_tokenizer`."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def word_folder(folder):
    """A saved `word_model` and its tokenizer."""
    word_model().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def word_adapter(base, folder):
    """A LoRA with both control rows, naming its base relative to itself; returns it and its logits before merging."""
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj"],
        trainable_token_indices=[FORK, CHILD],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "trainable_tokens" in name:
                parameter.normal_()
    tuned.save_pretrained(folder)
    ids = {"fork_token_id": FORK, "child_token_id": CHILD, "base": f"../{base.name}"}
    (folder / "apar_config.json").write_text(json.dumps(ids))
    with torch.no_grad():
        return folder, tuned(PROMPT).logits
