"""How likely the base finds an answer: each token by hand, seams apart from the rest, nothing scored twice."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medusa_apar import attach
from medusa_apar.eval.quality_base import SCORES, SEAM, BaseScores, Scores, seam_places
from medusa_apar.job import Job
from medusa_apar.models.chat import encode
from tests.support.byte_chat import byte_model, byte_tokenizer


@pytest.mark.parametrize(
    ("begins", "parts", "places"),
    [
        (range(20), [[[5, 20]]], range(5, 13)),
        (range(20), [[[5, 8], [15, 20]]], [5, 6, 7, 15, 16, 17, 18, 19]),  # a child of its own between
        (range(20), [[[5, 8]], [[8, 10]]], [5, 6, 7, 8, 9]),
        ([0, 4, 6], [[[5, 9]]], [2]),  # the second began before the thread
        (range(20), [[]], []),
        (range(20), [], []),
    ],
)
def test_seams_are_a_threads_first_tokens(begins, parts, places):
    assert seam_places(list(begins), parts) == set(places)


@given(st.lists(st.integers(0, 60), max_size=30).map(sorted), st.lists(st.integers(0, 60), max_size=6, unique=True))
def test_a_seam_has_so_many_tokens_of_its_thread(begins, edges):
    edges = sorted(edges)[: len(edges) // 2 * 2]
    parts = [[[first, last]] for first, last in zip(edges[::2], edges[1::2], strict=True)]
    found = seam_places(begins, parts)
    for [[first, last]] in parts:
        own = [place for place, begin in enumerate(begins) if first <= begin < last]
        assert [place for place in own if place in found] == own[:SEAM]
    assert len(found) <= SEAM * len(parts)


def test_means_of_seams_and_of_the_rest():
    scores = Scores([0, 1, 2], [-1.0, -2.0, -6.0])
    whole = {"likelihood": -3.0}
    assert scores.likelihood([[[1, 2]]]) == whole | {"likelihood_seam": -2.0, "likelihood_rest": -3.5}
    assert scores.likelihood([]) == whole | {"likelihood_seam": None, "likelihood_rest": -3.0}
    assert scores.likelihood([[[0, 9]]]) == whole | {"likelihood_seam": -3.0, "likelihood_rest": None}
    assert Scores([], []).likelihood([[[0, 9]]])["likelihood"] is None


@pytest.fixture
def base():
    return attach(byte_model(), tokenizer=byte_tokenizer(), speculation="off")


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path, "test", {})


def test_each_token_is_scored_behind_prompt_and_answer(base, job, tmp_path):
    [found] = BaseScores(tmp_path, base).score(job, [("What?", "a é 😀b")])
    ids = encode(base.tokenizer, "What?")["input_ids"][0].tolist()
    expected = []
    for token in base.tokenizer("a é 😀b", add_special_tokens=False)["input_ids"]:
        with torch.no_grad():
            logits = base.model(torch.tensor([ids])).logits[0, -1]
        expected.append(float(logits.log_softmax(-1)[token]))
        ids.append(token)
    assert found.logprobs == pytest.approx(expected, abs=1e-4) and len(expected) == 10
    assert found.begins == [0, 1, 2, 2, 3, 4, 4, 4, 4, 5]  # bytes of a character begin where it does


def test_an_empty_answer_has_no_scores(base, job, tmp_path):
    assert BaseScores(tmp_path, base).score(job, [("What?", "")]) == [Scores([], [])]


def test_an_answer_is_scored_once(base, job, tmp_path):
    pairs = [("What?", "a"), ("What?", "b"), ("What?", "a"), ("Who?", "a")]
    first = BaseScores(tmp_path, base).score(job, pairs)
    lines = (tmp_path / SCORES).read_text().splitlines()
    assert len(lines) == 3 and first[0] == first[2] != first[3]
    (tmp_path / SCORES).write_text("\n".join(lines[:2]) + "\n" + lines[2][:20])  # killed in mid-line
    assert BaseScores(tmp_path, base).score(job, pairs) == first
    assert len((tmp_path / SCORES).read_text().splitlines()) == 3
    again = BaseScores(tmp_path, base)
    again.model = None  # or it would be asked
    assert again.score(job, pairs) == first


def test_another_bases_scores_are_not_taken(base, job, tmp_path):
    before = BaseScores(tmp_path, base).score(job, [("What?", "a b c")])
    with torch.no_grad():
        base.model.model.norm.weight.mul_(2)
    assert BaseScores(tmp_path, base).score(job, [("What?", "a b c")]) != before
    assert len({json.loads(line)["base"] for line in (tmp_path / SCORES).read_text().splitlines()}) == 2
