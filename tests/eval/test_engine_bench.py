"""The benchmark of requests in flight: every system answers all, and says what that took."""

import json

import pytest

import medusa_apar
from medusa_apar.eval import engine as bench
from medusa_apar.heads import HydraHeads
from tests.support.models import CONTROL, forking_model
from tests.support.tokenizers import tiny_tokenizer

PROMPTS = [[7, 8, 9 + n, 10] for n in range(5)]


@pytest.fixture(scope="module")
def apar():
    model = forking_model(24)
    return medusa_apar.attach(model, HydraHeads.random(model), CONTROL, tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("system", bench.SYSTEMS)
def test_all_prompts_are_answered_and_no_more_than_said_at_once(apar, system):
    alone = bench.measure(apar, system, PROMPTS, 1, 16)
    crowd = bench.measure(apar, system, PROMPTS, 3, 16)
    assert alone.requests == crowd.requests == 5 and alone.tokens == crowd.tokens > 0
    assert crowd.steps < alone.steps and crowd.peak_slots > alone.peak_slots
    assert 0 < crowd.first_token <= crowd.latency <= crowd.slowest


def test_figures_go_to_a_file(apar, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(medusa_apar, "load", lambda *_, **__: apar)
    monkeypatch.setattr(bench, "encode", lambda tokenizer, text: tokenizer(text, return_tensors="pt"))
    words = tmp_path / "prompts.jsonl"
    words.write_text("".join(json.dumps({"id": n, "prompt": "abc"}) + "\n" for n in range(2)))
    out = tmp_path / "new" / "engine.json"
    bench.main(["--in-flight", "1", "3", "--prompts", str(words), "--max-new-tokens", "8", "--out", str(out)])
    found = json.loads(out.read_text())["found"]
    assert [(its["system"], its["in_flight"]) for its in found] == [(s, n) for n in (1, 3) for s in bench.SYSTEMS]
    assert all(its["ratio"] == 1.0 for its in found if its["system"] == "plain")
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(found)
    with pytest.raises(SystemExit):
        bench.main(["--in-flight", "0"])
