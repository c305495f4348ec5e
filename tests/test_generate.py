"""Promise 1 with forking off: the whole output equals `model.generate(do_sample=False)`, fp32, any model, any trees."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import medusa_apar
from medusa_apar import DraftTree
from medusa_apar.events import StepFinished
from medusa_apar.heads import HydraHeads, MedusaHeads
from tests.support.drafters import RecallHeads
from tests.support.models import CONFIGS, CONTROL, VOCAB, forking_model, tiny_model
from tests.support.prompts import prompts

LIMIT = 24
TREES = {
    "chain": DraftTree([(0,), (0, 0), (0, 0, 0)]),
    "star": DraftTree([(rank,) for rank in range(7)]),
    "likeliest": DraftTree.likeliest(20),
    "ragged": DraftTree([(2,), (2, 1), (0,), (2, 1, 3), (0, 0), (2, 1, 0)]),
}


def assert_same(model, inputs, apar, **options):
    expected = model.generate(**inputs, do_sample=False, **{"max_new_tokens": LIMIT, **options})
    actual = model.generate(**inputs, do_sample=False, custom_generate=apar, **{"max_new_tokens": LIMIT, **options})
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("family", CONFIGS)
def test_equals_transformers_on_every_family(family, rows):
    model = tiny_model(family, seed=1)
    inputs = prompts(rows, 9, seed=rows, ragged=True)
    assert_same(model, inputs, medusa_apar.attach(model))
    for heads in (MedusaHeads.random(model, 3, seed=rows), HydraHeads.random(model, 3, seed=rows, aux_layers=(1,))):
        assert_same(model, inputs, medusa_apar.attach(model, heads))


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("budget", [1, 5, 64])
@pytest.mark.parametrize("kind", [MedusaHeads, HydraHeads])
def test_equals_transformers_with_any_tree_and_budget(tree, budget, kind):
    model = tiny_model("mistral", seed=3)
    heads = kind.random(model, num_heads=4)
    inputs = prompts(3, 9, ragged=True)
    assert_same(model, inputs, medusa_apar.attach(model, heads, draft_tree=TREES[tree], budget=budget))


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"min_length": 20, "eos_token_id": list(range(2, 40))},
        {"min_new_tokens": 5, "eos_token_id": list(range(2, 40))},
        {"bad_words_ids": [[7], [9, 11], [12]]},
        {"no_repeat_ngram_size": 2},
        {"eos_token_id": [2, 7, 11, 30, 31, 32, 33, 34, 35, 36]},
        {"suppress_tokens": list(range(5, 30))},
        {"forced_eos_token_id": 5},
        {"max_new_tokens": 1},
        {"max_new_tokens": None, "max_length": 17},
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [1, 3])
def test_equals_transformers_under_processors_and_limits(options, rows):
    model = tiny_model("llama", seed=5)
    reference = medusa_apar.attach(model).generate(
        **prompts(rows, 9, ragged=True), max_new_tokens=LIMIT, do_sample=False, return_dict_in_generate=True
    )
    heads = RecallHeads(model, reference.paragraph_tree)
    assert_same(model, prompts(rows, 9, ragged=True), medusa_apar.attach(model, heads), **options)


def test_drafts_are_accepted_and_save_steps():
    model = tiny_model("llama", seed=5, eos=-50.0)
    inputs = prompts(1, 9)
    plain = medusa_apar.attach(model, speculation="off").generate(
        **inputs, max_new_tokens=LIMIT, do_sample=False, return_dict_in_generate=True
    )
    heads = RecallHeads(model, plain.paragraph_tree, wrong_every=100)
    fast = medusa_apar.attach(model, heads).generate(
        **inputs, max_new_tokens=LIMIT, do_sample=False, return_dict_in_generate=True
    )
    assert plain.stats.steps == LIMIT and plain.stats.accepted_lengths == {1: LIMIT}
    assert fast.stats.steps < LIMIT / 2
    assert sum(length * count for length, count in fast.stats.accepted_lengths.items()) >= LIMIT
    assert plain.stats.final_slots == fast.stats.final_slots == 0
    assert plain.stats.peak_slots == 9 + LIMIT - 1


def test_forking_off_never_shows_a_control_token():
    model = forking_model(1)
    apar = medusa_apar.attach(model, None, CONTROL)
    inputs = prompts(2, 6)
    expected = model.generate(
        **inputs, max_new_tokens=LIMIT, do_sample=False, suppress_tokens=[CONTROL.fork_id, CONTROL.child_id]
    )
    out = model.generate(
        **inputs, max_new_tokens=LIMIT, do_sample=False, custom_generate=apar, fork=False, return_dict_in_generate=True
    )
    assert torch.equal(out.sequences, expected)
    assert out.stats.forks == 0


def test_scores_and_logits_are_transformers_own():
    model = tiny_model("llama", seed=5, eos=-50.0)
    inputs = prompts(2, 9, ragged=True)
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "repetition_penalty": 1.2,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    expected = model.generate(**inputs, **options)
    actual = medusa_apar.attach(model, MedusaHeads.random(model)).generate(**inputs, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    for ours, theirs in ((actual.scores, expected.scores), (actual.logits, expected.logits)):
        assert len(ours) == len(theirs) == 12
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), atol=1e-4, rtol=1e-4)


def test_output_is_transformers_class_and_model_is_left_as_it_was():
    from transformers.generation import GenerateDecoderOnlyOutput

    model = tiny_model()
    before = model.config._attn_implementation
    out = medusa_apar.attach(model).generate(**prompts(1, 5), max_new_tokens=3, return_dict_in_generate=True)
    assert isinstance(out, GenerateDecoderOnlyOutput)
    assert model.config._attn_implementation == before
    assert out["stats"].generated_tokens == 3 and len(out.paragraph_tree) == 1


def test_an_exception_in_mid_run_leaves_the_model_usable():
    model = tiny_model()
    apar = medusa_apar.attach(model)
    expected = model.generate(**prompts(1, 5), max_new_tokens=6, do_sample=False)

    def explode(event):
        if isinstance(event, StepFinished):
            raise RuntimeError("consumer failed")

    with pytest.raises(RuntimeError, match="consumer failed"):
        apar.generate(**prompts(1, 5), max_new_tokens=6, do_sample=False, events=explode)
    assert torch.equal(model.generate(**prompts(1, 5), max_new_tokens=6, do_sample=False), expected)


def test_a_path_ends_at_the_context_length():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=20)).eval()
    out = medusa_apar.attach(model, MedusaHeads.random(model)).generate(
        **prompts(1, 5), max_new_tokens=100, do_sample=False, return_dict_in_generate=True
    )
    assert out.sequences.shape == (1, 20)
    assert out.paragraph_tree[0].trunk.finish_reason == "length"


def test_custom_generate_folder():
    from pathlib import Path

    model = tiny_model("llama", seed=2)
    inputs = prompts(2, 7, ragged=True)
    folder = Path(medusa_apar.__file__).parent
    heads = MedusaHeads.random(model)
    out = model.generate(
        **inputs, custom_generate=str(folder), trust_remote_code=True, heads=heads, max_new_tokens=9, do_sample=False
    )
    assert torch.equal(out, model.generate(**inputs, max_new_tokens=9, do_sample=False))
