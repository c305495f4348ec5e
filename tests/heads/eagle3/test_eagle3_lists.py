"""An untuned model that forks by rule at its list items, with an EAGLE-3 drafter: its text, and what rescoring says."""

from dataclasses import replace

import pytest
import torch

import medusa_apar
from medusa_apar.heads import Eagle3Heads
from tests.support.eagle3_files import LAYOUTS, checkpoint
from tests.support.list_writer import FAMILIES, list_prompts, list_writer
from tests.support.models import VOCAB, tiny_model
from tests.support.prompts import prompts
from tests.support.tokenizers import ListTokenizer


def drafter_of(model):
    layout = replace(LAYOUTS["with an embedding of its own"], ids=(2, 2, 2), where_ids="top")
    sizes = {"hidden": model.config.hidden_size, "vocab": VOCAB, "head_dim": 32, "feed": 48}
    return Eagle3Heads.from_state(*checkpoint(layout, 1, **sizes), model)


def run(model, heads, inputs, **options):
    apar = medusa_apar.attach(model, heads, tokenizer=ListTokenizer(), fork="lists", budget=40)
    # Without the penalty the tiny model repeats its titles.
    arguments = {"max_new_tokens": 64, "do_sample": False, "return_dict_in_generate": True} | options
    return apar.generate(**inputs, **arguments)


@pytest.mark.parametrize("family", FAMILIES)
def test_lists_are_the_same_with_a_drafter_and_so_is_what_rescoring_says(family):
    model, inputs = list_writer(family), list_prompts(3)
    plain = run(model, None, inputs, repetition_penalty=1.1)
    out = run(model, drafter_of(model), inputs, repetition_penalty=1.1)
    assert out.stats.forks == plain.stats.forks >= 3 and out.stats.drafted["heads"] > 0
    assert torch.equal(out.sequences, plain.sequences)
    mine, theirs = (run(model, heads, inputs, rescore=True) for heads in (drafter_of(model), None))
    assert mine.stats.agreement == theirs.stats.agreement is not None


@pytest.mark.parametrize("family", ["llama3", "qwen3", "gpt_oss"])
def test_families_that_people_have_run_with_lists_a_drafter_and_rescoring(family):
    """Random weights write no lists: what is there is exact, and whole under the same options."""
    model, inputs = tiny_model(family, 4), prompts(2, 6, seed=5, ragged=True)
    out = run(model, drafter_of(model), inputs, rescore=True)
    assert torch.equal(out.sequences, run(model, None, inputs, rescore=True).sequences)
    assert out.stats.agreement == 1.0 and out.stats.drafted["heads"] > 0
