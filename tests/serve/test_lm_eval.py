"""The example with lm-evaluation-harness, which runs in an environment of its own: `make test-lm-eval` makes it."""

import json
from pathlib import Path

import pytest
import torch

from medusa_apar.models.hub import embedded_model_dir
from tests.support.examples import EXAMPLES, run_example
from tests.support.serving import running

PYTHON = Path(__file__).parents[2] / ".venv-lm-eval/bin/python"
QUESTIONS = [json.loads(line) for line in (EXAMPLES / "lm_eval/capitals.jsonl").read_text().splitlines()]


def log_prob(apar, question, choice):
    """What transformers alone gives a choice, in natural logs."""
    prompt, both = (apar.tokenizer(text)["input_ids"] for text in (question, f"{question} {choice}"))
    assert both[: len(prompt)] == prompt
    with torch.no_grad():
        scores = apar.model(torch.tensor([both])).logits[0].log_softmax(-1)
    return sum(float(scores[place - 1, both[place]]) for place in range(len(prompt), len(both)))


@pytest.mark.real
@pytest.mark.skipif(not PYTHON.exists(), reason="lm-eval's environment is absent: make test-lm-eval makes it")
def test_the_example_scores_as_transformers_does(tmp_path, smollm2):
    with running(lambda: smollm2) as its:
        where = {"MODEL": "tiny", "TOKENIZER": str(embedded_model_dir()), "OPENAI_BASE_URL": f"{its.url}/v1"}
        told = run_example("lm_eval.sh", tmp_path, python=PYTHON, **where)
    right = 0
    for asked in QUESTIONS:
        scores = [log_prob(smollm2, f"The capital of {asked['country']} is", choice) for choice in asked["choices"]]
        right += asked["choices"][scores.index(max(scores))] == asked["capital"]
    (written,) = (tmp_path / "lm-eval-results").rglob("results_*.json")
    results = json.loads(written.read_text())["results"]["capitals"]
    assert results["acc,none"] == pytest.approx(right / len(QUESTIONS)) and right > len(QUESTIONS) / 2
    assert "capitals" in told
