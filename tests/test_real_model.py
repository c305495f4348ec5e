"""The main job on the real model: SmolLM2 with the shipped weights, exact thread by thread."""

import json

import pytest
import torch

import medusa_apar
from medusa_apar.commands.demo import QUESTION
from medusa_apar.eval.check import differences
from medusa_apar.models.chat import encode
from medusa_apar.verify.control_processor import ControlTokensLogitsProcessor
from tests.support.oracles import assert_chosen_tokens_are_the_models

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def answer(smollm2):
    inputs = encode(smollm2.tokenizer, QUESTION)
    return smollm2.generate(**inputs, max_new_tokens=192, do_sample=False, return_dict_in_generate=True)


def test_answers_with_threads_and_accepted_drafts(answer):
    (tree,) = answer.paragraph_tree
    assert len(tree.threads) >= 3
    assert answer.stats.tokens_per_step > 2
    assert max(answer.stats.accepted_lengths) >= 2
    assert answer.stats.final_slots == 0


def test_every_thread_is_plain_greedy_decoding(smollm2, answer):
    """Each token is the likeliest behind its path, in one forward pass a thread; one thread is generated as well."""
    (tree,) = answer.paragraph_tree
    rule = ControlTokensLogitsProcessor(smollm2.control_token_ids, tree.trunk.num_forced)
    assert assert_chosen_tokens_are_the_models(smollm2.model, [tree], process=rule) >= 192
    thread = tree.threads[1]
    path = torch.tensor([thread.path_ids])
    plain = smollm2.model.generate(
        input_ids=path,
        attention_mask=torch.ones_like(path),
        max_new_tokens=len(thread.token_ids),
        do_sample=False,
        logits_processor=[rule],
    )
    assert len(thread.token_ids) > 10
    assert thread.token_ids == plain[0, path.shape[1] :].tolist()


def test_the_medusa_heads_beside_the_hydra_heads_draft_the_same_answer(smollm2, answer):
    medusa = medusa_apar.load("smollm2-135m", heads="medusa")
    assert (medusa.heads.kind, smollm2.heads.kind) == ("medusa", "hydra")
    inputs = encode(smollm2.tokenizer, QUESTION)
    out = medusa.generate(**inputs, max_new_tokens=192, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences, answer.sequences)
    assert out.stats.steps < sum(out.stats.accepted_lengths.values()) and max(out.stats.accepted_lengths) >= 2


def test_without_forks_it_is_transformers_generate(smollm2):
    inputs = encode(smollm2.tokenizer, "Write one sentence about the sea.")
    control = smollm2.control_token_ids
    plain = smollm2.model.generate(
        **inputs, max_new_tokens=48, do_sample=False, suppress_tokens=[control.fork_id, control.child_id]
    )
    ours = smollm2.model.generate(**inputs, max_new_tokens=48, do_sample=False, custom_generate=smollm2, fork=False)
    assert torch.equal(ours, plain)


def test_sampling_is_the_same_with_heads_and_without(smollm2):
    inputs = encode(smollm2.tokenizer, QUESTION)
    bare = medusa_apar.attach(smollm2.model, None, smollm2.control_token_ids)
    options = {"max_new_tokens": 48, "do_sample": True, "temperature": 0.8, "top_p": 0.95, "seed": 7}
    assert torch.equal(smollm2.generate(**inputs, **options), bare.generate(**inputs, **options))


def test_int8_threads_are_what_the_rounded_weights_choose_alone(smollm2):
    """Bit by bit: no tie is allowed, and the heads are rounded too."""
    rounded = medusa_apar.attach(smollm2.model, smollm2.heads, smollm2.control_token_ids, quantize="int8")
    inputs = encode(smollm2.tokenizer, QUESTION)
    out = rounded.generate(**inputs, max_new_tokens=192, do_sample=False, return_dict_in_generate=True)
    assert rounded.runtime.facts.kind == "int8" and out.stats.steps < out.stats.generated_tokens / 2
    counts = {"threads": 0, "tokens": 0}
    assert differences(rounded, out.paragraph_tree[0], counts) == []
    assert counts["threads"] >= 3 and counts["tokens"] >= 192


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "kind": {"enum": ["cat", "dog", "bird"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 30},
        "likes": {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "kind", "age", "likes"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 5}], ids=["greedy", "sampled"])
def test_an_answer_in_json_keeps_to_its_schema(smollm2, sampling):
    """Beside one that forks; and it is the one without guesses."""
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    question = "Describe a pet as JSON: its name, its kind, its age and what it likes."
    prompt = encode(smollm2.tokenizer, question)["input_ids"][0].tolist()
    chosen = medusa_apar.Sampling(**sampling, guide=medusa_apar.Guide.json_schema(SCHEMA))
    texts = []
    bare = medusa_apar.attach(smollm2.model, None, smollm2.control_token_ids, tokenizer=smollm2.tokenizer)
    for one in (smollm2, bare):
        guided = one.request("guided", prompt, sampling=chosen, max_new_tokens=120)
        beside = one.request("beside", prompt, max_new_tokens=60)
        with one.engine() as engine:
            engine.add(guided)
            engine.add(beside)
            while engine.unfinished:
                for output in engine.step():
                    assert output.error is None
        assert guided.finish_reason == "stop"
        texts.append(guided.text_ids)
    assert texts[0] == texts[1]
    pet = json.loads(smollm2.tokenizer.decode(texts[0], skip_special_tokens=True))
    assert list(pet) == SCHEMA["required"] and pet["kind"] in SCHEMA["properties"]["kind"]["enum"]
    assert len(pet["name"]) <= 20 and 0 <= pet["age"] <= 30 and 1 <= len(pet["likes"]) <= 3
    assert all(isinstance(liked, str) and len(liked) <= 20 for liked in pet["likes"])
