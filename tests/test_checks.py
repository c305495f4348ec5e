"""Bad input: one clear sentence, the right exception, nothing half done."""

import json

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BloomConfig,
    DogeConfig,
    DynamicCache,
    LlamaConfig,
    MambaConfig,
    Qwen3NextConfig,
    T5Config,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import medusa_apar
from medusa_apar import ControlTokens, DraftTree
from medusa_apar.heads import MedusaHeads
from medusa_apar.runtimes.attention import BACKENDS, current_forest
from medusa_apar.triton_kernels.tree_attention import INTERPRETED
from tests.support.models import CONTROL, VOCAB, forking_model, tiny_model
from tests.support.prompts import prompts


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def untouched(model):
    """Generation as such must not have begun: no forward pass of the model may run."""

    def explode(*args):
        raise AssertionError("work was done before the input was refused")

    return model.register_forward_pre_hook(explode)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"num_beams": 3}, NotImplementedError, "beam"),
        ({"num_beams": 2, "do_sample": True}, NotImplementedError, "beam"),
        ({"penalty_alpha": 0.6, "top_k": 4}, NotImplementedError, "contrastive"),
        ({"guidance_scale": 1.5}, NotImplementedError, "guidance_scale"),
        ({"prompt_lookup_num_tokens": 3}, NotImplementedError, "assisted"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, NotImplementedError, "output_hidden_states"),
        ({"past_key_values": DynamicCache()}, NotImplementedError, "past_key_values"),
        ({"stop_strings": ["x"]}, ValueError, "tokenizer"),
    ],
    ids=str,
)
def test_unsupported_generation_is_refused_before_any_work(model, options, error, sentence):
    apar = medusa_apar.attach(model)
    handle = untouched(model)
    try:
        with pytest.raises(error, match=sentence) as raised:
            apar.generate(**prompts(1, 5), max_new_tokens=4, **options)
        assert "\n" not in str(raised.value)
    finally:
        handle.remove()


def test_assistant_model_and_embeddings_are_refused(model):
    apar = medusa_apar.attach(model)
    with pytest.raises(NotImplementedError, match="assistant_model"):
        apar.generate(**prompts(1, 5), assistant_model=model)
    with pytest.raises(NotImplementedError, match="inputs_embeds"):
        apar.generate(inputs_embeds=torch.zeros(1, 3, 32), max_new_tokens=4)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "empty"),
        ({"input_ids": torch.ones(2, 4).long(), "attention_mask": torch.tensor([[1] * 4, [0] * 4])}, "empty"),
        ({"input_ids": torch.full((1, 256), 7)}, "context"),
        ({"input_ids": torch.tensor([[7, VOCAB + 4, 60]])}, f"hold {VOCAB + 4}, .* from 0 to {VOCAB - 1}"),
        ({"input_ids": torch.tensor([[7, 60, -3]])}, f"hold -3, .* from 0 to {VOCAB - 1}"),
        ({"input_ids": torch.tensor([[7, -1, VOCAB]])}, "hold -1, "),
        ({"input_ids": torch.ones(1, 4)}, "torch.float32, but token ids are integers"),
    ],
    ids=["no tokens", "all masked", "too long", "id too high", "id negative", "ids of both kinds", "no integers"],
)
def test_bad_prompts(model, inputs, sentence):
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    apar = medusa_apar.attach(model)
    handle = untouched(model)
    try:
        with pytest.raises(ValueError, match=sentence):
            apar.generate(**inputs, max_new_tokens=4)
    finally:
        handle.remove()


def test_a_mask_of_another_shape(model):
    inputs = {"input_ids": torch.full((1, 5), 7), "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])}
    with pytest.raises(ValueError, match=r"attention_mask has the shape \(1, 6\), but input_ids have \(1, 5\)"):
        medusa_apar.attach(model).generate(**inputs, max_new_tokens=4)


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 4.0}
SWITCHING = {
    "longrope": (80, LONG | {"original_max_position_embeddings": 20}),
    "dynamic": (20, {"rope_type": "dynamic", "factor": 4.0}),
}


def cuts(caplog):
    return [record.message for record in caplog.records if "stopped at" in record.message]


@pytest.mark.parametrize("rope", SWITCHING)
@pytest.mark.parametrize("rows", [1, 3])
def test_an_answer_that_ends_at_a_rotary_switch_says_so(caplog, rope, rows):
    """Up to there it is transformers'; one that ends before is as ever."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    longest, parameters = SWITCHING[rope]
    sizes |= {"max_position_embeddings": longest, "rope_parameters": parameters | {"rope_theta": 10000.0}}
    config = LlamaConfig(vocab_size=VOCAB, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    apar = medusa_apar.attach(model, MedusaHeads.random(model))
    inputs, options = prompts(rows, 6), {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(**inputs, max_new_tokens=14, **options)
    assert torch.equal(apar.generate(**inputs, max_new_tokens=14, **options), expected)
    assert not cuts(caplog)
    assert torch.equal(apar.generate(**inputs, max_new_tokens=40, **options), expected)
    (sentence,) = cuts(caplog)
    assert "stopped at 20 tokens, prompt included, before max_new_tokens" in sentence
    assert "rotary scaling" in sentence and "\n" not in sentence
    with pytest.raises(ValueError, match="The prompt has 20 tokens, but .* 20"):
        apar.generate(**prompts(1, 20), max_new_tokens=4)


def test_a_thread_that_ends_at_the_last_position_says_so(caplog):
    model = forking_model(24, "gpt2")
    model.config.n_positions = model.config.max_position_embeddings = 24
    apar = medusa_apar.attach(model, None, CONTROL)
    out = apar.generate(**prompts(1, 6, seed=2), max_new_tokens=60, do_sample=False)
    (sentence,) = cuts(caplog)
    assert "stopped at 24 tokens" in sentence and "positions end there" in sentence and out.shape[1] > 24
    apar.generate(**prompts(1, 6, seed=2), max_new_tokens=5, do_sample=False)
    assert len(cuts(caplog)) == 1


def test_a_pool_too_small(model):
    with pytest.raises(ValueError, match="pool_slots=12 is too small"):
        medusa_apar.attach(model, pool_slots=12).generate(**prompts(1, 5), max_new_tokens=10)
    enough = medusa_apar.attach(model, MedusaHeads.random(model), pool_slots=15)
    assert enough.generate(**prompts(1, 5), max_new_tokens=10, do_sample=False).shape[1] <= 15


def test_heads_of_another_model(model):
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=VOCAB, hidden_size=48, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4)
    )
    with pytest.raises(ValueError, match="48.*32"):
        medusa_apar.attach(model, MedusaHeads.random(other))


def test_another_model_than_the_attached_one(model):
    with pytest.raises(ValueError, match="another model"):
        tiny_model().generate(**prompts(1, 5), custom_generate=medusa_apar.attach(model), max_new_tokens=3)


def test_control_tokens_missing(model, tmp_path):
    with pytest.raises(ValueError, match="missing from the model"):
        medusa_apar.attach(model, apar=(5, VOCAB))
    with pytest.raises(FileNotFoundError, match="apar_config.json"):
        medusa_apar.attach(model, apar=tmp_path)
    (tmp_path / "apar_config.json").write_text('{"fork_token_id": 3}')
    with pytest.raises(ValueError, match="child_token_id"):
        medusa_apar.attach(model, apar=tmp_path)
    with pytest.raises(ValueError, match="different"):
        ControlTokens(3, 3)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32])
def test_control_tokens_of_numpy_can_be_written(kind):
    control = ControlTokens(kind(3), kind(4), kind(2))
    assert json.loads(json.dumps(control.as_config())) == ControlTokens(3, 4, 2).as_config()


@pytest.mark.parametrize("options", [{"budget": 0}, {"max_threads": 0}, {"pool_slots": -1}, {"max_depth": -1}], ids=str)
def test_limits_must_be_positive(model, options):
    with pytest.raises(ValueError, match="positive"):
        medusa_apar.attach(model, None, CONTROL, **options)


def test_unknown_backend_and_too_deep_a_tree(model):
    with pytest.raises(ValueError, match="flash"):
        medusa_apar.attach(model, attention="flash")
    with pytest.raises(ValueError, match="2 deep but there are 1"):
        medusa_apar.attach(model, MedusaHeads.random(model, num_heads=1), draft_tree=DraftTree([(0,), (0, 0)]))


def test_attention_that_a_pool_cannot_serve_is_refused_at_attach():
    small = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
    model = AutoModelForCausalLM.from_config(DogeConfig(**small, num_attention_heads=4, num_key_value_heads=2))
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="DogeForCausalLM cannot"):
        medusa_apar.attach(model.eval())
    assert model.config._attn_implementation == before


def test_models_that_cannot_work():
    small = {"vocab_size": 20, "num_hidden_layers": 1}
    encoder_decoder = AutoModelForSeq2SeqLM.from_config(
        T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    recurrent = AutoModelForCausalLM.from_config(MambaConfig(**small, hidden_size=8, state_size=4))
    hybrid = AutoModelForCausalLM.from_config(
        Qwen3NextConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            linear_num_key_heads=1,
            linear_num_value_heads=1,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=0,
            layer_types=["linear_attention", "full_attention"],
        )
    )
    alibi = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=20, hidden_size=8, n_layer=1, n_head=2))
    headless = AutoModel.from_config(
        LlamaConfig(**small, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1)
    )
    for model, sentence in (
        (encoder_decoder, "encoder-decoder"),
        (recurrent, "recurrent"),
        (hybrid, "recurrent"),
        (alibi, "AttentionInterface"),
        (headless, "not a causal language model"),
    ):
        with pytest.raises(ValueError, match=sentence):
            medusa_apar.attach(model)


@pytest.mark.skipif(torch.cuda.is_available() or INTERPRETED, reason="they run here")
def test_kernels_are_refused_where_they_do_not_run():
    with pytest.raises(ValueError, match="attention='triton' cannot be had: Triton's kernels do not run on cpu"):
        medusa_apar.attach(tiny_model(), attention="triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("argument", ["position_bias", "indices", "block_indices", "sinks"])
def test_no_backend_ignores_what_would_change_its_result(backend, argument):
    """Whatever a layer hands over beside queries, keys and values, a forward pass of four tokens may not show it."""
    attend = ALL_ATTENTION_FUNCTIONS[f"medusa_apar_{backend}"]
    with current_forest(object()), pytest.raises(NotImplementedError, match=f"Linear attends with {argument}"):
        attend(torch.nn.Linear(1, 1), None, None, None, None, **{argument: torch.zeros(1)})
