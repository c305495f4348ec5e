"""`hf-compiled` is transformers' compiled generate: compiled once, in the warm-up, and nobody else's model."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from medusa_apar.eval import systems
from medusa_apar.loading import load
from medusa_apar.models.chat import encode
from medusa_apar.requests import Sampling
from tests.support.folders import forking_folder

ASKED, LIMIT, LONGEST = ("a", "ask b", "ask cde"), 20, 40
GREEDY = Sampling()


@pytest.fixture
def apar(tmp_path):
    torch._dynamo.reset()
    counters.clear()
    yield load(str(forking_folder(tmp_path / "model")), heads=None)
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_it_compiles_in_the_warm_up_only_and_says_the_same(apar, monkeypatch, backend):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(systems, "BACKEND", backend)
    plain, compiled, threads = (systems.make(name, apar, LONGEST) for name in ("hf", "hf-compiled", "threads"))
    inputs = [encode(apar.tokenizer, text) for text in ASKED]
    compiled.answer(inputs[0], 4, GREEDY)
    assert counters["stats"]["unique_graphs"] == 1
    for given in inputs:
        threads.answer(
            given, LIMIT, GREEDY
        )  # it has its own attention and linear layers in the same model, for a while
        answer, expected = compiled.answer(given, LIMIT, GREEDY), plain.answer(given, LIMIT, GREEDY)
        assert answer.ids == expected.ids and answer.steps == len(answer.ids) and answer.finish == expected.finish
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_the_shared_model_stays_as_it_was(apar, monkeypatch):
    monkeypatch.setattr(systems, "BACKEND", "eager")
    before = dict(vars(apar.model))
    options = apar.model.generation_config.to_dict()
    systems.make("hf-compiled", apar, LONGEST).answer(encode(apar.tokenizer, "ask a"), LIMIT, GREEDY)
    assert vars(apar.model) == before and apar.model.generation_config.to_dict() == options


def test_a_missing_compiler_is_said(apar, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="needs a C.. compiler, and there is no no-such-compiler"):
        systems.make("hf-compiled", apar, LONGEST)
