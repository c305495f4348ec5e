"""Presence and frequency penalties: OpenAI's definition, of each thread's own path, wherever tokens are chosen."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper

import medusa_apar
from medusa_apar import PresenceFrequencyLogitsProcessor
from medusa_apar.verify.control_processor import ControlTokensLogitsProcessor
from tests.support.drafters import RecallHeads
from tests.support.models import CONTROL, forking_model
from tests.support.oracles import assert_chosen_tokens_are_the_models
from tests.support.prompts import prompts

penalties = st.floats(-2, 2, width=32)


@settings(deadline=None)
@given(st.lists(st.integers(0, 11), max_size=20), st.integers(0, 25), penalties, penalties, st.booleans())
def test_it_is_openais_definition(path, prompt_length, presence, frequency, free):
    """Of tokens behind the prompt alone; one that the model cannot write (11) costs nothing."""
    logits = torch.randn(1, 11, generator=torch.Generator().manual_seed(len(path)))
    process = PresenceFrequencyLogitsProcessor(prompt_length, presence, frequency, (3, 11) if free else ())
    before, scores = logits.clone(), process(torch.tensor([path], dtype=torch.long), logits)
    for token in range(11):
        count = 0 if free and token == 3 else path[prompt_length:].count(token)
        expected = float(logits[0, token]) - frequency * count - presence * (count > 0)
        assert float(scores[0, token]) == pytest.approx(expected, abs=1e-5)
    assert torch.equal(logits, before) and scores.dtype == logits.dtype


@pytest.mark.parametrize("runtime", ["torch", "cpu"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 7, "temperature": 0.3, "top_k": 0}], ids=str)
def test_threads_count_what_their_own_path_holds(options, runtime):
    """Of rows padded by more and less: a child counts its ancestors' tokens up to their fork, and its own."""
    model = forking_model(24, "wide_llama")
    inputs = prompts(2, 6, seed=2, ragged=True)
    options = {"do_sample": False, "max_new_tokens": 24, "return_dict_in_generate": True} | options
    asked = options | {"presence_penalty": 0.8, "frequency_penalty": 0.5}
    first = medusa_apar.attach(model, None, CONTROL, runtime=runtime).generate(**inputs, **asked)
    assert first.stats.forks > 0
    drafted = medusa_apar.attach(model, RecallHeads(model, first.paragraph_tree), CONTROL, runtime=runtime)
    out = drafted.generate(**inputs, **asked)
    assert torch.equal(out.sequences, first.sequences) and max(out.stats.accepted_lengths) > 1
    for tree in out.paragraph_tree:
        own = PresenceFrequencyLogitsProcessor(tree.trunk.num_forced, 0.8, 0.5, CONTROL.ids)
        rule = ControlTokensLogitsProcessor(CONTROL, tree.trunk.num_forced)
        spec = LogitsProcessorList([own, rule, *([TemperatureLogitsWarper(0.3)] if "seed" in options else [])])
        assert_chosen_tokens_are_the_models(model, [tree], options.get("seed"), spec)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_what_is_no_penalty_is_refused(name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} is no number")):
        PresenceFrequencyLogitsProcessor(3, **{name: value})


def test_nor_is_a_negative_length():
    with pytest.raises(ValueError, match="prompt_length=-1 must be 0 or more"):
        PresenceFrequencyLogitsProcessor(-1)
