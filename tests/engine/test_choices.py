"""What a request asks of the chooser: exact with guesses and without, with forks, and nothing to those beside it."""

import json
from dataclasses import replace
from functools import cache
from importlib.util import find_spec

import pytest
import torch
from transformers import LogitsProcessorList, SequenceBiasLogitsProcessor, TemperatureLogitsWarper

import medusa_apar
from medusa_apar import Guide, Sampling
from medusa_apar.triton_kernels import reference
from medusa_apar.verify.control_processor import ControlTokensLogitsProcessor
from medusa_apar.verify.guides import GuideLogitsProcessor, compiled
from medusa_apar.verify.min_tokens import MinTokensLogitsProcessor
from tests.support.drafters import RecallHeads
from tests.support.models import CONTROL, EOS, FORK, VOCAB, forking_model
from tests.support.oracles import assert_chosen_tokens_are_the_models
from tests.support.prompts import prompts
from tests.support.tokenizers import json_tokenizer

LIMIT = 40
RUNTIMES = ("torch", "cpu", "launch")
# With the first prompt: an answer of 11 tokens whose two children end before it does, and one of 32 with four threads.
ENDING, LONG = {EOS: 1.0, FORK: 0.7}, {EOS: 1.0}


@cache
def model():
    return forking_model(11, "wide_llama")


def attached(heads=None, where="torch", **options):
    apar = medusa_apar.attach(model(), heads, CONTROL, runtime="cpu" if where == "cpu" else "torch", **options)
    if where == "launch":
        apar.runtime.verify = reference.verify
    return apar


def recalling(*requests, **options):
    return attached(RecallHeads(model(), [one.tree for one in requests]), **options)


def ids(number=0):
    return prompts(1, 6, seed=number)["input_ids"][0].tolist()


def request(apar, sampling, name="own", number=0, **options):
    return apar.request(name, ids(number), sampling=sampling, **{"max_new_tokens": LIMIT} | options)


def answered(apar, *requests):
    """Beside each other; the engine's stats."""
    with apar.engine() as engine:
        for one in requests:
            engine.add(one)
        while engine.unfinished:
            for output in engine.step():
                assert output.error is None, output.error
        engine.ledger.check()
        assert engine.ledger.pool.in_use == 0
        return engine.stats


def written(where, sampling, **options):
    """A request's answer; with guesses that come true and another request beside it, it is the one without, and so is
    the other's."""
    apar = attached(where=where, speculation="off")
    plain, alone = request(apar, sampling, **options), request(apar, Sampling(), "beside", 1)
    answered(apar, plain)
    answered(apar, alone)
    apar = recalling(plain, where=where)
    drafted, beside = request(apar, sampling, **options), request(apar, Sampling(), "beside", 1)
    assert max(answered(apar, drafted, beside).accepted_lengths) > 1
    assert (drafted.text_ids, drafted.finish_reason) == (plain.text_ids, plain.finish_reason)
    assert beside.text_ids == alone.text_ids
    return drafted


@pytest.mark.parametrize("where", RUNTIMES)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.3, seed=7)], ids=["greedy", "sampled"])
def test_biases_and_held_back_ends_are_chosen_as_the_processors_say(sampling, where):
    """Each token of each thread."""
    bias = ENDING | {30: -100.0, 31: 0.1}
    its = written(where, replace(sampling, logit_bias=bias, min_tokens=15, stop_token_ids=(11, 12)))
    assert len(its.text_ids) >= 15 and (sampling.seed is not None or len(its.tree.threads) > 1)
    processors = [
        SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()}),
        MinTokensLogitsProcessor(6, 15, [EOS], CONTROL),
        MinTokensLogitsProcessor(6, 15, [11, 12], CONTROL, in_children=True),
        ControlTokensLogitsProcessor(CONTROL, 6),
        *([TemperatureLogitsWarper(0.3)] if sampling.seed is not None else []),
    ]
    assert_chosen_tokens_are_the_models(model(), [its.tree], sampling.seed, LogitsProcessorList(processors))


def test_a_bias_of_100_is_as_good_as_an_order():
    apar = attached()
    forced = request(apar, Sampling(logit_bias={17: 100}), "forced", fork=False)
    banned = request(apar, Sampling(logit_bias={17: -100, EOS: 100}), "banned", fork=False)
    answered(apar, forced, banned)
    assert forced.text_ids == [17] * LIMIT and banned.text_ids == [EOS]


def test_all_of_it_is_for_compiled_code_and_for_a_launch():
    """None of it needs Python to be asked path by path."""
    apar = attached()
    own = request(apar, Sampling(logit_bias=ENDING, min_tokens=5, stop_token_ids=(7,)))
    plain = request(apar, Sampling(ignore_eos=True, stop_token_ids=(7,)), "plain")
    with apar.engine() as engine:
        engine.add(own)
        engine.add(plain)
        assert own.sampler.recipe is not None and own.sampler.on_device and plain.sampler.plain


@pytest.mark.parametrize("least", [1, 14, LIMIT])
def test_no_answer_is_shorter_than_was_asked_for(least):
    """And one whose trunk did not want to end before is the one without the wish."""
    apar = attached()
    free, own = (
        [request(apar, Sampling(min_tokens=n, logit_bias=ENDING), f"{n} {k}", k) for k in range(8)] for n in (0, least)
    )
    answered(apar, *free, *own)
    assert min(len(one.text_ids) for one in free) < 14
    for asked, unasked in zip(own, free, strict=True):
        assert len(asked.text_ids) - (asked.text_ids[-1] == EOS) >= least
        trunk = unasked.tree.trunk
        if len(trunk.token_ids) - len(trunk.children) > least:
            assert asked.text_ids == unasked.text_ids


@pytest.mark.parametrize("where", RUNTIMES)
def test_an_answer_that_ignores_its_end_ends_by_its_limit(where):
    """Children end all the same, and so what stands behind them is read."""
    its = written(where, Sampling(ignore_eos=True, logit_bias=ENDING))
    assert (len(its.text_ids), its.finish_reason) == (LIMIT, "length")
    assert EOS in its.tree.trunk.token_ids[:-1]
    children = its.tree.threads[1:]
    assert any(thread.finish_reason == "stop" for thread in children)
    for thread in children:
        assert EOS not in thread.token_ids[:-1]
        assert (thread.finish_reason == "stop") == (EOS in thread.token_ids)
    free = request(attached(), Sampling(logit_bias=ENDING))
    answered(attached(), free)
    assert free.finish_reason == "stop" and its.text_ids[: len(free.text_ids)] == free.text_ids


@pytest.mark.parametrize("where", RUNTIMES)
def test_an_answer_ends_before_the_first_stop_token_that_is_read(where):
    """In whichever thread it stands; whatever was guessed, and decided, behind it."""
    free = written(where, Sampling(logit_bias=LONG))
    tokens = sorted(set(free.text_ids))
    apar = recalling(free, where=where)
    its = [request(apar, Sampling(logit_bias=LONG, stop_token_ids=(token,)), str(token)) for token in tokens]
    answered(apar, *its)
    places = [free.text_ids.index(token) for token in tokens]
    for place, one in zip(places, its, strict=True):
        assert (one.text_ids, one.finish_reason) == (free.text_ids[:place], "stop")
    assert len({free.text[place][0].index for place in places}) > 1


def test_an_end_token_among_stop_tokens_still_leads_a_child_back():
    apar = attached()
    free = request(apar, Sampling(logit_bias=ENDING), "free")
    same = request(apar, Sampling(logit_bias=ENDING, stop_token_ids=(EOS,)), "same")
    ignored = request(apar, Sampling(logit_bias=ENDING, stop_token_ids=(EOS,), ignore_eos=True), "ignored")
    answered(apar, free, same, ignored)
    assert free.text_ids[-1] == EOS and any(thread.finish_reason == "stop" for thread in free.tree.threads[1:])
    assert same.text_ids == ignored.text_ids == free.text_ids[:-1]
    assert free.finish_reason == same.finish_reason == ignored.finish_reason == "stop"


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(logit_bias=LONG, min_tokens=1),
        Sampling(logit_bias=ENDING, ignore_eos=True),
        Sampling(temperature=0.3, seed=3, logit_bias=LONG, stop_token_ids=(12, 13)),
    ],
    ids=["held back", "ignoring", "stopped"],
)
def test_every_limit_is_the_unlimited_run_cut_short(sampling):
    whole = written("torch", sampling)
    apar = recalling(whole)
    its = [request(apar, sampling, str(limit), max_new_tokens=limit) for limit in range(1, LIMIT)]
    answered(apar, *its)
    for limit, one in enumerate(its, 1):
        assert one.text_ids == whole.text_ids[:limit]


# Structured output.

SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 99},
        "b": {"enum": ["ab", "true", "12"]},
        "c": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}
needs_llguidance = pytest.mark.skipif(find_spec("llguidance") is None, reason="the extra `structured` is not installed")


def guided(apar, sampling=None, name="own", number=0, schema=SCHEMA):
    sampling = replace(sampling or Sampling(), guide=Guide.json_schema(schema))
    return request(apar, sampling, name, number, max_new_tokens=150)


@needs_llguidance
@pytest.mark.parametrize("where", RUNTIMES)
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.5, top_k=20, seed=3)], ids=["greedy", "sampled"]
)
def test_a_guided_answer_is_a_text_of_its_schema_whatever_was_guessed(sampling, where):
    tokenizer = json_tokenizer()
    apar = attached(where=where, tokenizer=tokenizer, speculation="off")
    plain = [guided(apar, sampling, str(number), number) for number in range(3)]
    alone = request(apar, Sampling(logit_bias=ENDING), "alone")
    answered(apar, *plain)
    answered(apar, alone)
    apar = recalling(*plain, where=where, tokenizer=tokenizer)
    drafted = [guided(apar, sampling, str(number), number) for number in range(3)]
    beside = request(apar, Sampling(logit_bias=ENDING), "beside")
    assert max(answered(apar, *drafted, beside).accepted_lengths) > 1
    assert beside.text_ids == alone.text_ids and len(beside.tree.threads) > 1
    for one, other in zip(drafted, plain, strict=True):
        assert one.text_ids == other.text_ids and len(one.tree.threads) == 1
        if one.finish_reason == "stop":
            parsed = json.loads(tokenizer.decode(one.text_ids, skip_special_tokens=True))
            assert 0 <= parsed["a"] <= 99 and parsed["b"] in ("ab", "true", "12")
            assert list(parsed) == [name for name in SCHEMA["properties"] if name in parsed]
    assert any(one.finish_reason == "stop" for one in drafted)


@needs_llguidance
def test_a_guided_answer_is_plain_transformers_under_its_processor():
    tokenizer = json_tokenizer()
    apar = attached(where="cpu", tokenizer=tokenizer)
    own = guided(apar)
    answered(apar, own)
    grammar = compiled(Guide.json_schema(SCHEMA), tokenizer, VOCAB, [EOS])
    processors = [GuideLogitsProcessor(grammar, 6), ControlTokensLogitsProcessor(CONTROL, 6, fork=False)]
    plain = model().generate(
        torch.tensor([ids()]),
        attention_mask=torch.ones(1, 6, dtype=torch.long),
        max_new_tokens=150,
        do_sample=False,
        logits_processor=LogitsProcessorList(processors),
    )
    assert own.text_ids == plain[0, 6:].tolist()


@needs_llguidance
def test_what_a_schema_leaves_no_choice_of_is_guessed():
    tokenizer, schema = json_tokenizer(), {"const": "qwertyuiopasdfghjkl"}
    steps = []
    for options in ({"speculation": "off"}, {}):
        apar = attached(tokenizer=tokenizer, **options)
        own = guided(apar, schema=schema)
        steps.append(answered(apar, own).steps)
        assert tokenizer.decode(own.text_ids, skip_special_tokens=True) == '"qwertyuiopasdfghjkl"'
    assert steps[1] < steps[0] / 2


@needs_llguidance
@pytest.mark.parametrize("where", RUNTIMES)
def test_a_guide_that_fails_fails_alone(where):
    """Its parser may give up in the middle."""
    apar = attached(where=where, tokenizer=json_tokenizer())
    broken, whole, alone = guided(apar, name="broken"), guided(apar, name="whole"), guided(apar, name="alone")
    broken.options.processors[0]._read = [9]  # not where its parser is
    with apar.engine() as engine:
        engine.add(broken)
        engine.add(whole)
        errors = {}
        while engine.unfinished:
            errors |= {output.request_id: output.error for output in engine.step() if output.error is not None}
    assert set(errors) == {"broken"} and "the guide cannot follow the text" in str(errors["broken"])
    answered(apar, alone)
    assert whole.text_ids == alone.text_ids
