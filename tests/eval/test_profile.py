"""Where the time goes, on a tiny model: what is counted, not how long it took."""

import pytest
import torch

import medusa_apar
from medusa_apar.eval import profile
from medusa_apar.eval.prompts import Prompt
from medusa_apar.eval.quantisation import compare
from medusa_apar.heads import MedusaHeads
from medusa_apar.runtimes.cpu import library
from tests.support.models import CONTROL, forking_model
from tests.support.tokenizers import tiny_tokenizer


@pytest.fixture
def apar():
    model, tokenizer = forking_model(3), tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return medusa_apar.attach(model, MedusaHeads.random(model, 2), CONTROL, tokenizer=tokenizer)


def test_phases_make_up_the_whole_and_the_compiled_code_splits_its_own(apar):
    asked = [Prompt("1", "", "abcdef"), Prompt("2", "", "ghij")]
    found = profile.attribution(apar, asked, 24)
    assert set(found["phases"]) == {"plan", "forest", "forward", "verify", "commit", "draft", "count"}
    assert sum(found["phases"].values()) == pytest.approx(found["attributed"] * found["seconds"])
    assert 0.5 < found["attributed"] <= 1 and found["rows_per_step"] >= 1
    costs = profile.curve(apar, rows=(1, 4), slots=20)
    assert list(costs["rows"]) == [1, 4] and list(costs["draft"]) == [1, 2, 4, 8] and costs["prefill"] > 0
    text = profile.table(found, costs, apar.runtime.facts.kind)
    assert "| forward |" in text and "| rows | 1 | 4 |" in text


def test_the_curve_gives_every_slot_back(apar, monkeypatch):
    pools = []
    step = type(apar.runtime).step

    def watched(self, forest, pool, reads, choice):
        pools.append(pool)
        return step(self, forest, pool, reads, choice)

    monkeypatch.setattr(type(apar.runtime), "step", watched)
    profile.curve(apar, rows=(1, 6), slots=20)
    assert len(set(map(id, pools))) == 1 and pools[0].in_use == 20


def test_phases_of_the_compiled_code():
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads)).eval()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    apar = medusa_apar.attach(model, quantize="int8", tokenizer=tokenizer)
    found = profile.attribution(apar, [Prompt("1", "", "abcdef")], 8)
    inside = {f"forward: {name}" for name in library.PHASES}
    assert inside < set(found["phases"]) and all(found["phases"][name] > 0 for name in inside)
    assert not apar.runtime.profile


def test_equal_answers_and_tokens_before_a_difference():
    found = compare([[1, 2, 3, 4], [5, 6], [7]], [[1, 2, 9], [5, 6], [8]])
    assert found == {"equal_answers": pytest.approx(1 / 3), "tokens_before_a_difference": pytest.approx(4 / 7)}
