"""Bytes and products are counted from shapes: held against what was packed, and against the forests that really ran."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, Qwen2Config

import medusa_apar
from medusa_apar.eval.roofline import Counts, Shapes
from medusa_apar.heads import MedusaHeads
from medusa_apar.models.chat import encode
from tests.support.models import CONTROL, forking_model
from tests.support.tokenizers import tiny_tokenizer

SIZES = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def nbytes(*tensors):
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def chatting(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config, Phi3Config])  # biases; layers that are fused
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_shapes_give_the_bytes_that_were_packed(config, kind, monkeypatch):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SIZES, **HEADS, pad_token_id=0)).eval()
    model = model.bfloat16() if kind == "bfloat16" else model
    quantize = kind if kind == "int8" else None
    apar = medusa_apar.attach(model, quantize=quantize, runtime="cpu", tokenizer=chatting(tiny_tokenizer()))
    found = []  # bytes of a slot, step by step: a pool's memory goes with its engine
    step = type(apar.runtime).step

    def watched(self, forest, pool, *rest):
        result = step(self, forest, pool, *rest)
        found.append(nbytes(*pool.keys.values(), *pool.values.values(), *pool.scales.values()) / pool.capacity)
        return result

    monkeypatch.setattr(type(apar.runtime), "step", watched)
    output = apar.generate(**encode(apar.tokenizer, "abcd"), max_new_tokens=4, return_dict_in_generate=True)
    packed, shapes = apar.runtime._packed, Shapes.of(model, kind)
    matrices = [matrix for layer in packed.layers for matrix in layer.matrices] + [packed.unembedding]
    norms = [norm for layer in packed.layers for norm in layer.norms] + [packed.norm]
    assert shapes.weight_bytes == nbytes(*norms) + sum(nbytes(m.panels, m.scales, m.bias) for m in matrices)
    assert kind != "int8" or any(m.scales is not None for m in matrices)
    assert shapes.slot_bytes == found[-1]
    # A row alone multiplies every weight once, and its query and its weights with as many slots as its path has.
    one = Counts(1, 1, 1, 3, 3)
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    assert shapes.macs(one) == weights + 2 * 4 * 32 * 3 * 2
    counts = Counts.of(output.recording)
    assert counts.steps == output.stats.steps and counts.rows == output.stats.forward_tokens
    assert shapes.read_bytes(counts) == counts.steps * shapes.weight_bytes + counts.slots * shapes.slot_bytes


@pytest.mark.parametrize("options", [{}, {"max_threads": 2}, {"fork": False}])
def test_recordings_tell_of_every_row_and_slot(monkeypatch, options):
    """Threads, drafts, drafted forks and threads that wait: as the forests say that ran."""
    model = forking_model(3)
    heads = MedusaHeads.random(model, 2)
    apar = medusa_apar.attach(model, heads, CONTROL, tokenizer=chatting(tiny_tokenizer()), budget=12)
    ran = []
    step = type(apar.runtime).step

    def watched(self, forest, pool, *rest):
        verified = len(forest.arrays[3])
        ran.append((1, len(forest), verified, int((forest.arrays[1] + 1).sum()), pool.in_use))
        return step(self, forest, pool, *rest)

    monkeypatch.setattr(type(apar.runtime), "step", watched)
    inputs = encode(apar.tokenizer, "ask c")
    output = apar.generate(**inputs, max_new_tokens=40, do_sample=False, return_dict_in_generate=True, **options)
    assert Counts.of(output.recording) == tuple(map(sum, zip(*ran, strict=True)))
    assert (output.stats.forks > 0) == options.get("fork", True) and output.stats.drafted["heads"] > 0
    assert not output.stats.forks or output.stats.drafted["forks"] > 0
