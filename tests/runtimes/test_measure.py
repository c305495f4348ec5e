"""The measured cost of a step: only that it is measured, sane and kept; no figure is asserted."""

import json
from dataclasses import replace

import pytest
import torch

import medusa_apar
from medusa_apar.drafting.step_cost import StepCost
from medusa_apar.heads import HydraHeads
from medusa_apar.models import hub
from medusa_apar.runtimes import measure
from tests.support.models import tiny_model
from tests.support.prompts import prompts


@pytest.fixture
def attached(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDUSA_APAR_CACHE", str(tmp_path))
    model = tiny_model()
    return medusa_apar.attach(model, HydraHeads.random(model))


def known(apar):
    return measure.known_cost(apar.model, apar.runtime, apar.heads, apar.options.draft_tree)


def test_more_rows_never_cost_less_and_the_model_is_left_as_it_was(attached):
    before = attached.generate(**prompts(1, 5), max_new_tokens=6, do_sample=False)
    cost = known(attached)
    assert [size for size, _ in cost.curve] == list(measure.ROWS["cpu"])
    assert [size for size, _ in cost.drafts] == list(measure.THREADS)
    for curve in (cost.curve, cost.drafts):
        costs = [milliseconds for _, milliseconds in curve]
        assert costs == sorted(costs) and costs[0] > 0
    assert torch.equal(attached.generate(**prompts(1, 5), max_new_tokens=6, do_sample=False), before)


def test_what_another_build_of_compiled_code_cost_says_nothing(attached, monkeypatch):
    known(attached)
    asked = []
    monkeypatch.setattr(measure, "measure", lambda *_: asked.append(1) or StepCost(((1, 1.0),)))
    known(attached)
    assert not asked
    attached.runtime.facts = replace(attached.runtime.facts, build="another")
    assert known(attached) == StepCost(((1, 1.0),)) and asked


def test_it_is_measured_once_for_each_model(attached, monkeypatch):
    first = known(attached)
    monkeypatch.setattr(measure, "measure", lambda *_: pytest.fail("it had been measured"))
    assert known(attached) is first
    measure._measured.clear()
    assert known(attached) == first  # from the file
    kept = json.loads((hub.cache_dir() / measure.FILE).read_text())
    assert len(kept) == 1 and next(iter(kept)).startswith("LlamaForCausalLM float32 on ")


def test_a_damaged_file_is_measured_anew(attached):
    path = hub.cache_dir() / measure.FILE
    path.write_text("{half of a")
    assert known(attached).curve
    assert len(json.loads(path.read_text())) == 1


def test_other_models_have_other_costs(attached):
    known(attached)
    other = tiny_model("qwen2")
    known(medusa_apar.attach(other, HydraHeads.random(other)))
    assert len(json.loads((hub.cache_dir() / measure.FILE).read_text())) == 2


def test_a_model_with_long_steps_is_measured_coarsely(attached, monkeypatch):
    """Every size once would take a large model a minute on a CPU, before its first token."""
    monkeypatch.setattr(measure, "LONGEST", 0.0)
    fed = []
    forward = attached.runtime.step
    monkeypatch.setattr(
        attached.runtime, "step", lambda forest, *more: fed.append(len(forest)) or forward(forest, *more)
    )
    cost = known(attached)
    assert [size for size, _ in cost.curve] == [1, 8, 32]
    assert sum(fed) < 2 * measure.FEW_SLOTS + sum((1, 8, 32))


def test_costs_between_and_beyond_what_was_measured():
    cost = StepCost(((1, 10.0), (3, 14.0), (4, 20.0)), ((1, 1.0),))
    assert cost.rows(6).tolist() == [10.0, 12.0, 14.0, 20.0, 24.0, 28.0]
    assert cost.drafting(5) == 1.0 and StepCost(((1, 1.0),)).drafting(5) == 0.0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_first_call_measures_by_itself(monkeypatch, tmp_path, family):
    """Models with few positions too."""
    monkeypatch.setenv("MEDUSA_APAR_CACHE", str(tmp_path))
    monkeypatch.setattr("medusa_apar.engine.engine.known_cost", measure.known_cost)
    model = tiny_model(family)
    apar = medusa_apar.attach(model, HydraHeads.random(model))
    inputs = prompts(1, 5)
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(apar.generate(**inputs, max_new_tokens=12, do_sample=False), expected)
    assert (tmp_path / measure.FILE).exists()
