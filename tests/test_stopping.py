"""Stopping criteria of the call's own act as in plain transformers, on the reading order."""

import time

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation import ConfidenceCriteria, EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

import medusa_apar
from medusa_apar.heads import MedusaHeads
from tests.support.drafters import RecallHeads
from tests.support.models import CONTROL, EOS, forking_model, tiny_model
from tests.support.prompts import prompts

GREEDY = {"do_sample": False, "max_new_tokens": 16}
SCORES = {"return_dict_in_generate": True, "output_scores": True}


class Longer(MaxLengthCriteria):
    """Of another type than transformers' own, which stays."""


class Ends(EosTokenCriteria):
    pass


class Unsure(StoppingCriteria):
    """Where the model's own choice was unlikely."""

    def __call__(self, input_ids, scores, **kwargs):
        assert isinstance(scores, tuple) and all(step.shape == scores[0].shape for step in scores)
        assert len(scores) == input_ids.shape[1] - 6 and len(scores[0]) == len(input_ids)
        chances = scores[-1].softmax(-1).gather(1, input_ids[:, -1:])[:, 0]
        return chances < 0.0314


CRITERIA = {
    "shorter": lambda ids: MaxLengthCriteria(12),
    "longer": lambda ids: MaxLengthCriteria(6 + 30),
    "at the prompt": lambda ids: MaxLengthCriteria(3),
    "a subclass, shorter": lambda ids: Longer(12),
    "a subclass, longer": lambda ids: Longer(6 + 30),
    "an end token": lambda ids: EosTokenCriteria(ids[5]),
    "end tokens": lambda ids: EosTokenCriteria([ids[9], ids[5]]),
    "a subclass for end tokens": lambda ids: Ends(ids[5]),
    "the model's end token": lambda ids: EosTokenCriteria(EOS),
    "no end token of the model's": lambda ids: EosTokenCriteria(60),
    "no time": lambda ids: MaxTimeCriteria(1e-9),
    "much time": lambda ids: MaxTimeCriteria(1e9),
    "time from long ago": lambda ids: MaxTimeCriteria(10, time.time() - 11),
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", CRITERIA)
def test_criteria_are_plain_transformers(name, rows):
    """The model ends soon by itself, if it may."""
    model, inputs = tiny_model(seed=5, eos=10.0), prompts(rows, 6, ragged=True)
    text = model.generate(**inputs, **GREEDY | {"eos_token_id": 60})[0, 6:].tolist()
    assert EOS in text[:12] or rows > 1

    def run(hook):
        criteria = StoppingCriteriaList([CRITERIA[name](text)])
        return model.generate(**inputs, **GREEDY, stopping_criteria=criteria, custom_generate=hook)

    tree = medusa_apar.attach(model).generate(**inputs, **GREEDY, return_dict_in_generate=True).paragraph_tree
    for heads in (None, MedusaHeads.random(model), RecallHeads(model, tree)):
        assert torch.equal(run(medusa_apar.attach(model, heads)), run(None))


@pytest.mark.parametrize("criterion", [ConfidenceCriteria(0.0314), Unsure()], ids=lambda value: type(value).__name__)
def test_criteria_see_the_scores_so_far(criterion):
    model, inputs = tiny_model(seed=5, eos=-50.0), prompts(1, 6)
    options = GREEDY | SCORES | {"repetition_penalty": 1.3, "stopping_criteria": [criterion]}
    expected = model.generate(**inputs, **options | {"stopping_criteria": StoppingCriteriaList([criterion])})
    assert 1 < len(expected.scores) < 16
    actual = medusa_apar.attach(model, MedusaHeads.random(model)).generate(**inputs, **options)
    assert torch.equal(actual.sequences, expected.sequences) and len(actual.scores) == len(expected.scores)


@pytest.mark.parametrize("options", [{}, {"return_dict_in_generate": True}, {"output_scores": True}], ids=str)
def test_criteria_see_no_scores_where_transformers_shows_none(options):
    seen = []

    def look(input_ids, scores, **kwargs):
        seen.append(scores)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    model = tiny_model(seed=5, eos=-50.0)
    for hook in (None, medusa_apar.attach(model)):
        model.generate(**prompts(1, 6), **GREEDY, **options, stopping_criteria=[look], custom_generate=hook)
    assert seen == [None] * 32


@pytest.mark.parametrize("rows", [1, 2])
def test_with_threads_criteria_see_text_and_scores_in_reading_order(rows):
    model, inputs = forking_model(24), prompts(rows, 6, seed=2)
    options = {"do_sample": False, "max_new_tokens": 30, **SCORES}
    apar = medusa_apar.attach(model, None, CONTROL)
    whole = apar.generate(**inputs, **options)
    assert whole.stats.forks > 0
    seen = {}

    def look(input_ids, scores, **kwargs):
        seen[tuple(input_ids[0].tolist())] = torch.stack([step[0] for step in scores])
        return torch.zeros(len(input_ids), dtype=torch.bool)

    heads = RecallHeads(model, whole.paragraph_tree)
    out = medusa_apar.attach(model, heads, CONTROL).generate(**inputs, **options, stopping_criteria=[look])
    assert torch.equal(out.sequences, whole.sequences)
    for row in range(rows):
        length = len(list(out.paragraph_tree[row].reading_order()))
        for end in range(1, min(length, 30) + 1):
            shown = seen[tuple(whole.sequences[row, : 6 + end].tolist())]
            expected = torch.stack([step[row] for step in whole.scores[:end]])
            torch.testing.assert_close(shown, expected, atol=1e-4, rtol=1e-4)
    stop = int(whole.sequences[0, 6 + 10])
    first = whole.sequences[0, 6:].tolist().index(stop) + 1
    for criterion in (EosTokenCriteria(stop), MaxLengthCriteria(6 + first)):
        cut = apar.generate(**inputs, **options, stopping_criteria=[criterion]).sequences
        assert torch.equal(cut[0, : 6 + first], whole.sequences[0, : 6 + first])
        assert cut.shape[1] == 6 + first if rows == 1 else (cut[0, 6 + first :] == 0).all()
