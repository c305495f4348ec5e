"""The whole decoder over the attention kernels, token for token what it is over dense masks."""

import pytest
import torch

import medusa_apar
from medusa_apar.heads import HydraHeads
from tests.tiny import CONTROL, RecallHeads, assert_threads_are_plain, forking_model, prompts, tiny_model

FAMILIES = ("llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_oss", "gpt2", "phi3")


def run(model, attention, heads=None, rows=2, limit=16, length=6, **options):
    apar = medusa_apar.attach(model, heads, CONTROL, attention=attention, runtime="torch", **options)
    inputs = prompts(rows, length, seed=rows, ragged=True)
    return apar.generate(**inputs, max_new_tokens=limit, do_sample=False, return_dict_in_generate=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_decode_the_same_over_kernels_and_masks(family):
    model = tiny_model(family, fork=0.9, eos=0.2) if family != "gpt_oss" else tiny_model(family)
    heads = HydraHeads.random(model)
    ours = run(model, "triton", heads, rows=1, limit=8, budget=8)
    assert torch.equal(ours.sequences, run(model, "sdpa", heads, rows=1, limit=8, budget=8).sequences)


def test_threads_drafts_and_batches_decode_the_same(monkeypatch):
    """Over paths of several chunks, which threads share."""
    model = forking_model(11)
    plain = run(model, "sdpa", length=80)
    heads = RecallHeads(model, plain.paragraph_tree)
    monkeypatch.setattr("medusa_apar.triton_attention.CHUNK", 64)
    ours = run(model, "triton", heads, length=80, budget=24)
    assert torch.equal(ours.sequences, plain.sequences)
    assert ours.stats.forks >= 2 and max(ours.stats.accepted_lengths) >= 3
    assert_threads_are_plain(model, ours.paragraph_tree)


def test_the_kernels_are_what_runs(monkeypatch):
    """Else the tests above compare masks with masks."""

    def broken(*args, **kwargs):
        raise RuntimeError("the kernel was called")

    model = tiny_model()
    apar = medusa_apar.attach(model, attention="triton", runtime="torch")
    monkeypatch.setattr("medusa_apar.triton_attention.tree_attention", broken)
    with pytest.raises(RuntimeError, match="the kernel was called"):
        apar.generate(**prompts(1, 4), max_new_tokens=2)
