"""Tokens chosen by the kernel are those that are chosen row by row on the host."""

import pytest
import torch

import medusa_apar
from medusa_apar import DraftTree
from medusa_apar.verify.device_verify import DeviceVerify
from tests.support.drafters import RecallHeads
from tests.support.models import CONTROL, forking_model
from tests.support.prompts import prompts


def run(model, heads=None, attention="triton", **generate):
    apar = medusa_apar.attach(model, heads, CONTROL, attention=attention, runtime="torch", budget=12)
    return apar.generate(
        **prompts(2, 6, seed=2, ragged=True), max_new_tokens=8, return_dict_in_generate=True, **generate
    )


# transformers itself adds temperature, top-k and top-p of a sampling call as processors.
SERVED = [
    {"do_sample": False},
    {"do_sample": False, "fork": False},
    {"do_sample": True, "seed": 5, "top_k": 0},
    {"do_sample": True, "seed": 9, "top_k": 20, "top_p": 0.9, "temperature": 0.7},
    {
        **{"do_sample": False, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        **{"min_new_tokens": 6, "sequence_bias": [[[7], 1.0]]},
    },
]


@pytest.fixture
def launches(monkeypatch):
    count = []
    run = DeviceVerify.run
    monkeypatch.setattr(DeviceVerify, "run", lambda *args: count.append(1) or run(*args))
    return count


@pytest.mark.parametrize("options", SERVED)
def test_the_kernel_chooses_the_same_tokens(launches, options):
    model = forking_model(11)
    plain = run(model, attention="sdpa", **options)
    assert not launches
    heads = RecallHeads(model, plain.paragraph_tree)
    ours = run(model, heads, **options)
    assert len(launches) == ours.stats.steps
    assert torch.equal(ours.sequences, plain.sequences)
    assert max(ours.stats.accepted_lengths) >= 2


def test_what_is_asked_path_by_path_goes_row_by_row(launches):
    model = forking_model(11)
    for options in ({"no_repeat_ngram_size": 2}, {"output_scores": True}):
        options |= {"do_sample": False}
        assert torch.equal(run(model, **options).sequences, run(model, attention="sdpa", **options).sequences)
    assert not launches


def test_typical_acceptance_is_the_kernels_too(launches):
    """What is drafted shows in it, so both draft alike: all of a small tree, by heads that count no calls."""
    model = forking_model(11)
    options = {"do_sample": True, "seed": 5, "top_k": 0, "max_new_tokens": 8, "return_dict_in_generate": True}
    remembered = run(model, attention="sdpa", do_sample=True, seed=5, top_k=0).paragraph_tree
    outs = []
    for attention in ("sdpa", "triton"):
        apar = medusa_apar.attach(
            *(model, RecallHeads(model, remembered, wrong_every=10**9), CONTROL),
            **{"draft_tree": DraftTree.likeliest(4), "budget": 200, "acceptance": "typical"},
            **{"attention": attention, "runtime": "torch"},
        )
        outs.append(apar.generate(**prompts(2, 6, seed=2, ragged=True), **options))
    assert len(launches) == outs[1].stats.steps  # over masks the host chooses row by row
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert outs[0].stats.accepted_lengths == outs[1].stats.accepted_lengths
