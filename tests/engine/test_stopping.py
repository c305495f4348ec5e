"""Stopping criteria of the call's own act as in plain transformers, on the reading order."""

import time

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation import ConfidenceCriteria, EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

import medusa_apar
from medusa_apar.engine.stopping import CriteriaStop
from medusa_apar.heads import MedusaHeads
from medusa_apar.threads.request import Request, RequestOptions, Row
from tests.support.drafters import RecallHeads
from tests.support.models import CONTROL, EOS, forking_model, tiny_model
from tests.support.prompts import prompts

GREEDY = {"do_sample": False, "max_new_tokens": 16}
SCORES = {"return_dict_in_generate": True, "output_scores": True}


class Longer(MaxLengthCriteria):
    """A subclass is not transformers' own criterion, so it is asked."""


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


# `CriteriaStop`, asked without an engine.


class Shown:
    """A criterion that keeps what it is shown, as it was and as it is; it is never met."""

    def __init__(self):
        self.ids, self.held, self.scores = [], [], []

    def __call__(self, input_ids, scores, **kwargs):
        self.ids.append(input_ids.tolist())
        self.held.append(input_ids)
        self.scores.append(scores)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def write(row, inputs, texts, criteria, at_once, scores=None, limit=None) -> Request:
    """A row's request, to which its text was appended, some tokens at once, until it was done."""
    ids, text = inputs["input_ids"][row].tolist(), texts[row]
    options = RequestOptions(limit or len(text), stop=CriteriaStop(criteria, "cpu"), scores=scores is not None)
    prompt = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
    request = Request(str(row), prompt, options, row=Row(row, len(texts), ids))
    trunk = request.tree.trunk
    for first in range(0, len(text), at_once):
        trunk.tokens += text[first : first + at_once]
        if scores is not None:
            kept = request.scores.setdefault(trunk, [])
            kept += [step[row] for step in scores[first : first + at_once]]
        request.publish()
        if request.done:
            break
    return request


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("rows", [1, 3])
def test_criteria_are_shown_what_transformers_shows(rows, at_once):
    """Each row's own, at the row's place in a batch of that size; it is not taken back when the text grows on."""
    model, inputs, plain = tiny_model(seed=5, eos=-50.0), prompts(rows, 6, ragged=True), Shown()
    out = model.generate(
        **(inputs | {"do_sample": False, "max_new_tokens": 70, "repetition_penalty": 1.1} | SCORES),
        stopping_criteria=StoppingCriteriaList([plain]),
    )
    texts = out.sequences[:, 6:].tolist()
    for row in range(rows):
        ours = Shown()
        request = write(row, inputs, texts, [ours], at_once, out.scores)
        assert request.text_ids == texts[row] and request.finish_reason == "length"
        assert len(ours.ids) == len(plain.ids) == 70
        for mine, theirs in zip(ours.ids, plain.ids, strict=True):
            assert len(mine) == rows and mine[row] == theirs[row]
        assert ours.ids == [held.tolist() for held in ours.held]
        for mine, theirs in zip(ours.scores, plain.scores, strict=True):
            assert isinstance(mine, tuple) and len(mine) == len(theirs)
            for own, expected in zip(mine, theirs, strict=True):
                assert own.shape == expected.shape and torch.equal(own[row], expected[row])


def test_a_long_text_is_not_made_anew_for_every_token():
    text, shown = [5 + index % 50 for index in range(1000)], Shown()
    write(0, prompts(1, 6), [text], [shown], 1)
    assert len(shown.held) == 1000 and shown.scores == [None] * 1000
    assert len({held.untyped_storage().data_ptr() for held in shown.held}) < 12  # it doubles


@pytest.mark.parametrize("at_once", [1, 4])
def test_a_criterion_that_answers_for_the_batch_is_asked_for_the_row(at_once):
    inputs, stops = prompts(3, 6, ragged=True), torch.tensor([3, 12, 7])
    texts = [[5 + index for index in range(20)]] * 3
    criteria = [Shown(), lambda ids, scores: ids.shape[1] - 6 >= stops]
    requests = [write(row, inputs, texts, criteria, at_once) for row in range(3)]
    assert [len(request.text_ids) for request in requests] == stops.tolist()
    assert [request.finish_reason for request in requests] == ["stop"] * 3
    # Of a criterion and a limit at the same token the criterion is what is told.
    limited = [write(row, inputs, texts, criteria, at_once, limit=7) for row in range(3)]
    assert [request.finish_reason for request in limited] == ["stop", "length", "stop"]


def test_what_a_criterion_raises_is_raised():
    def fail(ids, scores):
        raise RuntimeError("in mid-run")

    with pytest.raises(RuntimeError, match="in mid-run"):
        write(0, prompts(1, 6), [[5, 6]], [fail], 1)
