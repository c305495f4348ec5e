"""Every argument of `generate` and every field of its config is honoured, or refused by name, on every way in.

Tables say which: what the installed transformers has beyond them fails.
"""

import inspect
import re
from pathlib import Path

import pytest
import torch
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    WatermarkingConfig,
)

import medusa_apar
from medusa_apar import checks
from medusa_apar.heads import MedusaHeads
from tests.support.models import tiny_model
from tests.support.prompts import prompts
from tests.support.tokenizers import tiny_tokenizer

GREEDY = {"do_sample": False, "max_new_tokens": 12}
SAMPLED = {"do_sample": True, "top_k": 0}
DICT = {"return_dict_in_generate": True}
IDS = prompts(2, 6)["input_ids"]


def other(row_ids, scores):
    return scores.roll(1, -1)


def stop(input_ids, scores, **kwargs):
    return torch.full((len(input_ids),), input_ids.shape[1] >= 9)


# name -> what it is set to, with what goes along: the tokens are plain transformers', and not what they were without.
HONOURED = {
    "logits_processor": {"logits_processor": [other]},
    "stopping_criteria": {"stopping_criteria": [stop]},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda row, ids: [7 + row, 8 + row]},
    "generation_config": {"generation_config": GenerationConfig(max_new_tokens=5, eos_token_id=60)},
    "max_length": {"max_new_tokens": None, "max_length": 9},
    "max_new_tokens": {"max_new_tokens": 5},
    "min_length": {"min_length": 16, "eos_token_id": list(range(2, 40))},
    "min_new_tokens": {"min_new_tokens": 7, "eos_token_id": list(range(2, 40))},
    "max_time": {"max_time": 1e-9},
    "stop_strings": {"stop_strings": list("abcdefghijklm"), "tokenizer": tiny_tokenizer()},
    "do_sample": SAMPLED | {"temperature": 1e-6, "repetition_penalty": 1.5},
    "temperature": SAMPLED | {"temperature": 1e-6, "repetition_penalty": 1.5},
    "top_k": SAMPLED | {"top_k": 1, "repetition_penalty": 1.5},
    "top_p": SAMPLED | {"top_p": 1e-6, "repetition_penalty": 1.5},
    "min_p": SAMPLED | {"min_p": 1.0, "repetition_penalty": 1.5},
    "top_h": SAMPLED | {"top_h": 1e-6, "repetition_penalty": 1.5},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 5.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[token] for token in range(5, 40)]},
    "forced_bos_token_id": {"input_ids": IDS[:, :1], "attention_mask": None, "forced_bos_token_id": 7},
    "forced_eos_token_id": {"forced_eos_token_id": 5},
    "remove_invalid_values": {
        "logits_processor": [lambda ids, scores: scores.index_fill(1, torch.tensor(9), torch.inf)],
        "remove_invalid_values": True,
        "repetition_penalty": 1.5,
    },
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 5.0), "eos_token_id": [7, 8, 9]},
    "suppress_tokens": {"suppress_tokens": list(range(5, 40))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(5, 60))},
    "sequence_bias": {"sequence_bias": [[[7], 100.0]]},
    "eos_token_id": {"eos_token_id": list(range(5, 40))},
    "pad_token_id": {"eos_token_id": list(range(5, 20)), "pad_token_id": 44},
    "bos_token_id": {"input_ids": None, "attention_mask": None, "bos_token_id": 33},
}
# name -> what it is set to; transformers' plain decoding does not show it in the tokens, and nor do we.
WITHOUT_A_TRACE = {
    "use_cache": {"use_cache": False},
    "disable_compile": {"disable_compile": True},
    "renormalize_logits": {"renormalize_logits": True},
    # Of beams.
    "early_stopping": {"early_stopping": True},
    "length_penalty": {"length_penalty": 2.0},
    "diversity_penalty": {"diversity_penalty": 1.0},
    "num_beam_groups": {"num_beam_groups": 1},
    # Of caches that are refused, of assistants that are refused, of other ways to generate.
    "cache_config": {"cache_config": {"nbits": 4}},
    "max_cache_len": {"max_cache_len": 50},
    "num_assistant_tokens": {"num_assistant_tokens": 5},
    "num_assistant_tokens_schedule": {"num_assistant_tokens_schedule": "heuristic"},
    "assistant_confidence_threshold": {"assistant_confidence_threshold": 0.9},
    "assistant_lookbehind": {"assistant_lookbehind": 3},
    "target_lookbehind": {"target_lookbehind": 3},
    "assistant_ensemble_weight": {"assistant_ensemble_weight": 0.5},
    "max_matching_ngram_size": {"max_matching_ngram_size": 3},
    "speculation_type": {"speculation_type": "dflash"},
    "low_memory": {"low_memory": True},
    "continuous_batching_config": {"continuous_batching_config": ContinuousBatchingConfig()},
    # Of encoder-decoder models, and notes.
    "decoder_start_token_id": {"decoder_start_token_id": 9},
    "transformers_version": {"transformers_version": "4.0.0"},
    "_from_model_config": {"_from_model_config": True},
    "synced_gpus": {"synced_gpus": False},
}
# Shown elsewhere: what they are set to has no plain counterpart, or is the way in itself.
ELSEWHERE = {
    "inputs": "test_generate.py gives prompts",
    "streamer": "test_drop_in.py",
    "custom_generate": "the way in",
    "num_return_sequences": "test_drop_in.py",
    "typical_p": "test_sampling.py",
    "epsilon_cutoff": "test_sampling.py",
    "eta_cutoff": "test_sampling.py",
    "output_scores": "test_generate.py",
    "output_logits": "test_generate.py",
    "return_dict_in_generate": "test_generate.py",
}
# name -> what it is set to, with what goes along.
REFUSED = {
    "assistant_model": lambda model: {"assistant_model": tiny_model(seed=1)},
    "assistant_tokenizer": lambda model: {"assistant_tokenizer": tiny_tokenizer()},
    "synced_gpus": lambda model: {"synced_gpus": True},
    "negative_prompt_ids": lambda model: {"negative_prompt_ids": IDS},
    "negative_prompt_attention_mask": lambda model: {"negative_prompt_attention_mask": torch.ones_like(IDS)},
    "past_key_values": lambda model: {"past_key_values": DynamicCache()},
    "cache": lambda model: {"cache": DynamicCache()},
    "position_ids": lambda model: {"position_ids": torch.arange(6).expand(2, -1) + 3},
    "token_type_ids": lambda model: {"token_type_ids": torch.zeros_like(IDS)},
    "inputs_embeds": lambda model: {"inputs_embeds": model.get_input_embeddings()(IDS)},
    "num_beams": lambda model: {"num_beams": 2},
    "use_mtp": lambda model: {"use_mtp": True},
    "guidance_scale": lambda model: {"guidance_scale": 1.5},
    "watermarking_config": lambda model: {"watermarking_config": WatermarkingConfig()},
    "cache_implementation": lambda model: {"cache_implementation": "static"},
    "compile_config": lambda model: {"compile_config": CompileConfig()},
    "prefill_chunk_size": lambda model: {"prefill_chunk_size": 4},
    "token_healing": lambda model: {"token_healing": True},
    "is_assistant": lambda model: {"is_assistant": True},
    "prompt_lookup_num_tokens": lambda model: {"prompt_lookup_num_tokens": 3},
    "assistant_early_exit": lambda model: {"assistant_early_exit": 1},
    "penalty_alpha": lambda model: {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": lambda model: {"dola_layers": "low"},
    "constraints": lambda model: {"constraints": [object()], "num_beams": 2},
    "force_words_ids": lambda model: {"force_words_ids": [[7]], "num_beams": 2},
    "output_attentions": lambda model: DICT | {"output_attentions": True},
    "output_hidden_states": lambda model: DICT | {"output_hidden_states": True},
    "output_router_logits": lambda model: {"output_router_logits": 1},
    "labels": lambda model: {"labels": IDS},
    "temperature": lambda model: SAMPLED | {"temperature": float("inf")},
    "temperature of nan": lambda model: SAMPLED | {"temperature": float("nan")},
    "temperature of 0": lambda model: SAMPLED | {"temperature": 0.0},
    "top_p": lambda model: SAMPLED | {"top_p": 1.5},
    "top_p of nan": lambda model: SAMPLED | {"top_p": float("nan")},
    "top_k": lambda model: SAMPLED | {"top_k": -1},
    "min_p": lambda model: SAMPLED | {"min_p": 2.0},
    "top_h": lambda model: SAMPLED | {"top_h": 2.0},
    "typical_p": lambda model: SAMPLED | {"typical_p": 1.5},
    "epsilon_cutoff": lambda model: SAMPLED | {"epsilon_cutoff": 2.0},
    "eta_cutoff": lambda model: SAMPLED | {"eta_cutoff": -1.0},
    "temperature of a truth": lambda model: SAMPLED | {"temperature": True},
}
# Our own of which plain transformers has a processor.
PENALTIES = {"presence_penalty": 1.5, "frequency_penalty": 0.25}
FOLDER = str(Path(medusa_apar.__file__).parent)
WAYS = {
    "generate of the hook": lambda model, **options: medusa_apar.attach(model, _heads(model)).generate(**options),
    "the hook": lambda model, **options: model.generate(
        custom_generate=medusa_apar.attach(model, _heads(model)), **options
    ),
    "a folder": lambda model, **options: model.generate(
        custom_generate=FOLDER, trust_remote_code=True, heads=_heads(model), **options
    ),
}


def _heads(model):
    return MedusaHeads.random(model)


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=5, eos=-50.0)


def test_nothing_that_transformers_has_is_unknown():
    arguments = set(inspect.signature(inspect.unwrap(GenerationMixin.generate)).parameters) - {"self", "kwargs"}
    fields = set(vars(GenerationConfig())) | {"_from_model_config"}
    known = {*HONOURED, *WITHOUT_A_TRACE, *ELSEWHERE, *REFUSED}
    assert arguments | fields <= known, arguments | fields - known


def plain(model, options):
    options = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)} | GREEDY | options
    if "generation_config" in options:
        options = {name: value for name, value in options.items() if name not in GREEDY}
    return options


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", HONOURED)
def test_honoured(model, name, way):
    options = plain(model, HONOURED[name])
    expected = model.generate(**options)
    actual = WAYS[way](model, **options)
    assert torch.equal(actual, expected)
    assert not torch.equal(expected, model.generate(**plain(model, {})))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "more", [{}, {"do_sample": True, "top_k": 1, "logits_processor": [other]}], ids=["greedy", "sampled"]
)
def test_penalties_are_honoured(model, way, more):
    """They come behind the caller's own processors, and before the warpers of sampling."""
    options, own = plain(model, more), medusa_apar.PresenceFrequencyLogitsProcessor(6, **PENALTIES)
    expected = model.generate(**options | {"logits_processor": [*more.get("logits_processor", []), own]})
    assert torch.equal(WAYS[way](model, **options, **PENALTIES), expected)
    assert not torch.equal(expected, model.generate(**options))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [2.5, float("nan"), True, "1"], ids=str)
@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_beyond_the_apis_are_refused(model, name, value, way):
    with pytest.raises(ValueError, match=f"^{name}={re.escape(repr(value))} is not a number from -2 to 2"):
        WAYS[way](model, **plain(model, {name: value}))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", WITHOUT_A_TRACE)
def test_without_a_trace(model, name, way):
    options = plain(model, WITHOUT_A_TRACE[name])
    expected = model.generate(**plain(model, {}))
    assert torch.equal(model.generate(**options), expected) and torch.equal(WAYS[way](model, **options), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_before_any_work(model, name, way):
    options = plain(model, REFUSED[name](model))
    if "inputs_embeds" in options:
        options.pop("input_ids")
    ran = []
    handle = model.register_forward_pre_hook(lambda *args: ran.append(1))
    try:
        medusa_apar.attach(model, _heads(model))  # tries a few tokens, whatever is asked of a call
        tried = len(ran)
        with pytest.raises((ValueError, NotImplementedError)) as raised:
            WAYS[way](model, **options)
    finally:
        handle.remove()
    assert len(ran) == 2 * tried and _says(name.split()[0], str(raised.value)), str(raised.value)


@pytest.mark.parametrize("where", ["call", "config", "model"])
@pytest.mark.parametrize("value", ["0.5", [0.5], True], ids=str)
@pytest.mark.parametrize("name", checks._SAMPLING)
def test_what_is_no_number_is_refused_before_transformers_stumbles_over_it(name, value, where):
    model = tiny_model(seed=5)
    options = plain(model, SAMPLED | {"top_k": None})
    if where == "call":
        options[name] = value
    elif where == "config":
        options["generation_config"] = GenerationConfig()
        setattr(options["generation_config"], name, value)
    else:
        setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=f"^{name}={re.escape(repr(value))} is not "):
        medusa_apar.attach(model).generate(**options)


def _says(name, sentence):
    other_words = {
        "num_beams": "beam",
        "use_mtp": "assisted",
        "assistant_early_exit": "assisted",
        "prompt_lookup_num_tokens": "assisted",
        "penalty_alpha": "contrastive",
        "dola_layers": "dola",
        "constraints": "beam",
        "force_words_ids": "beam",
        "past_key_values": "cache",
        "token_healing": "healing",
    }
    return name in sentence or other_words.get(name, name) in sentence


@pytest.mark.parametrize("positions", [torch.arange(6)[None], torch.arange(6).expand(2, -1)], ids=["one", "two"])
def test_position_ids_that_change_nothing_are_taken(model, positions):
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    made = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    for own, attention_mask in ((positions, torch.ones_like(IDS)), (made, mask)):
        options = {"input_ids": IDS, "attention_mask": attention_mask, **GREEDY}
        out = medusa_apar.attach(model).generate(**options, position_ids=own)
        assert torch.equal(out, model.generate(**options))


def test_a_paged_cache_would_be_decoding_without_us(model):
    with pytest.raises(NotImplementedError, match="paged"):
        medusa_apar.attach(model).generate(IDS, cache_implementation="paged")
