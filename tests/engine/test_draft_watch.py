"""Heads that guess no better than chance say so once; heads that are worth something never do."""

import torch

import medusa_apar
from medusa_apar.engine.draft_watch import ENOUGH
from medusa_apar.heads import MedusaHeads
from tests.support.drafters import RecallHeads
from tests.support.models import tiny_model
from tests.support.prompts import prompts

GREEDY = {"do_sample": False, "max_new_tokens": 16}


def drafted(apar, model, inputs, **options):
    out = apar.generate(**inputs, **GREEDY | options, return_dict_in_generate=True)
    return out.stats.drafted["heads"], out.stats.accepted["heads"]


def warnings(caplog):
    return [record.message for record in caplog.records if record.name == "medusa_apar.engine.draft_watch"]


def useless(model):
    """Heads that guess the first ids of the vocabulary, whatever comes."""
    heads = MedusaHeads.random(model)
    with torch.no_grad():
        for block in heads.blocks:
            block.weight.zero_()
            block.bias.zero_()
    heads.unembedding = torch.nn.Parameter(torch.zeros(len(block.weight), heads.vocab_size, heads.hidden_size))
    return heads


def test_bad_heads_warn_once_over_calls(caplog):
    model = tiny_model("wide_llama", seed=5, eos=-50.0)
    apar = medusa_apar.attach(model, useless(model), speculation="even")
    count = right = 0
    for seed in range(60):
        more = drafted(apar, model, prompts(1, 6, seed=seed))
        count, right = count + more[0], right + more[1]
        assert len(warnings(caplog)) == (count >= ENOUGH)
        if count > 2 * ENOUGH:
            break
    (sentence,) = warnings(caplog)
    assert count > 2 * ENOUGH and "guesses" in sentence and "layout" in sentence and "\n" not in sentence
    other = medusa_apar.attach(model, useless(model), speculation="even")
    for seed in range(60):
        drafted(other, model, prompts(1, 6, seed=seed))
    assert len(warnings(caplog)) == 2


def test_a_copy_of_the_hook_counts_with_it(caplog):
    model = tiny_model("wide_llama", seed=5, eos=-50.0)
    apar = medusa_apar.attach(model, useless(model), speculation="even")
    for seed in range(60):
        drafted(apar.speculating(apar.options.speculation), model, prompts(1, 6, seed=seed))
    assert len(warnings(caplog)) == 1


def test_good_heads_and_what_makes_good_heads_look_bad_say_nothing(caplog):
    model = tiny_model("wide_llama", seed=5, eos=-50.0)
    inputs = prompts(2, 6)
    tree = medusa_apar.attach(model).generate(**inputs, **GREEDY, return_dict_in_generate=True).paragraph_tree
    good = medusa_apar.attach(model, RecallHeads(model, tree))
    assert sum(drafted(good, model, inputs)[0] for _ in range(20)) > ENOUGH
    bad = medusa_apar.attach(model, useless(model), speculation="even")
    hot = {"do_sample": True, "temperature": 5.0, "top_k": 0}
    for options in ({"logits_processor": [lambda ids, scores: scores.roll(1, -1)]}, hot):
        assert sum(drafted(bad, model, prompts(1, 6, seed=seed), **options)[0] for seed in range(30)) > ENOUGH
    assert not warnings(caplog)
