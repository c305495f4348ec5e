"""The same logits as medusa-llm 0.1, the release that wrote the V1 files in the wild."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from medusa_apar.heads import MedusaHeads

medusa_model = pytest.importorskip("medusa.model.medusa_model", reason="medusa-llm 0.1", exc_type=ImportError)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_same_logits(tmp_path, monkeypatch, num_layers):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=41,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    monkeypatch.setattr(medusa_model.AutoTokenizer, "from_pretrained", lambda *_: None)
    theirs = medusa_model.MedusaModel(model, medusa_num_heads=3, medusa_num_layers=num_layers)
    with torch.no_grad():
        for parameter in theirs.medusa_head.parameters():
            parameter.normal_(std=0.3)
    torch.save(theirs.medusa_head.state_dict(), tmp_path / "medusa_lm_head.pt")

    ours = MedusaHeads.from_pretrained(tmp_path, model)
    assert (ours.num_heads, ours.num_layers) == (3, num_layers)
    input_ids = torch.randint(41, (1, 9))
    expected = theirs(input_ids)  # [heads, 1, T, vocabulary]
    with torch.no_grad():
        hidden_states = model.model(input_ids).last_hidden_state[0]
        torch.testing.assert_close(ours.logits(hidden_states), expected[:, 0])
