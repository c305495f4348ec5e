"""What a request asks of the chooser: exact with guesses and without, with forks, and nothing to those beside it."""

import json
from dataclasses import replace
from functools import cache

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
from tests.support.models import CONTROL, EOS, FORK, VOCAB, forking_model, tiny_model
from tests.support.oracles import assert_chosen_tokens_are_the_models
from tests.support.prompts import prompts
from tests.support.tokenizers import json_tokenizer

LIMIT = 40
BIAS = {EOS: -3.0, 9: 4.5, FORK: 2.0, 30: -100.0, 31: 1.0}
RUNTIMES = ("torch", "cpu", "launch")


@cache
def model_of(seed=24):
    return forking_model(seed, "wide_llama")


def attached(model, heads, where, **options):
    apar = medusa_apar.attach(model, heads, CONTROL, runtime="cpu" if where == "cpu" else "torch", **options)
    if where == "launch":
        apar.runtime.verify = reference.verify
    return apar


def ids(row=0, seed=2):
    return prompts(3, 6, seed=seed)["input_ids"][row].tolist()


def request(apar, sampling, name="own", row=0, **options):
    return apar.request(name, ids(row), sampling=sampling, **{"max_new_tokens": LIMIT} | options)


def answered(apar, *requests):
    """Beside each other; the engine's stats, too."""
    with apar.engine() as engine:
        for one in requests:
            engine.add(one)
        while engine.unfinished:
            for output in engine.step():
                assert output.error is None, output.error
        engine.ledger.check()
        assert engine.ledger.pool.in_use == 0
        return engine.stats


def written(where, sampling, model=None, **options):
    """A request's answer, with guesses that come true the second time: the text is the same, and so is the reason."""
    model = model_of() if model is None else model
    plain = request(attached(model, None, where), sampling, **options)
    answered(attached(model, None, where), plain)
    apar = attached(model, RecallHeads(model, [plain.tree]), where)
    drafted, beside = request(apar, sampling, **options), request(apar, Sampling(), "beside", row=1)
    stats = answered(apar, drafted, beside)
    assert max(stats.accepted_lengths) > 1
    assert (drafted.text_ids, drafted.finish_reason) == (plain.text_ids, plain.finish_reason)
    alone = request(apar, Sampling(), "beside", row=1)
    answered(apar, alone)
    assert beside.text_ids == alone.text_ids
    return drafted


@pytest.mark.parametrize("where", RUNTIMES)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.4, seed=7)], ids=["greedy", "sampled"])
def test_biases_and_held_back_ends_are_chosen_as_the_processors_say(sampling, where):
    """Each token of each thread, `[Fork]` among them."""
    own = replace(sampling, logit_bias=BIAS, min_tokens=15, stop_token_ids=(11, 12))
    its = written(where, own)
    assert len(its.tree.threads) > 1 and len(its.text_ids) >= 15
    processors = [
        SequenceBiasLogitsProcessor({(token,): value for token, value in BIAS.items()}),
        MinTokensLogitsProcessor(6, 15, [EOS], CONTROL),
        MinTokensLogitsProcessor(6, 15, [11, 12], CONTROL, in_children=True),
        ControlTokensLogitsProcessor(CONTROL, 6),
        *([TemperatureLogitsWarper(0.4)] if sampling.seed is not None else []),
    ]
    seed = sampling.seed
    assert assert_chosen_tokens_are_the_models(model_of(), [its.tree], seed, LogitsProcessorList(processors)) > 20


def test_a_bias_of_100_is_as_good_as_an_order():
    forced = request(attached(model_of(), None, "torch"), Sampling(logit_bias={17: 100}), fork=False)
    banned = request(attached(model_of(), None, "torch"), Sampling(logit_bias={17: -100, EOS: 100}), fork=False)
    answered(attached(model_of(), None, "torch"), forced, banned)
    assert forced.text_ids == [17] * LIMIT and banned.text_ids == [EOS]


def test_biases_keep_to_the_compiled_code_and_to_the_launch():
    """None of it needs Python to be asked path by path."""
    apar = attached(model_of(), None, "torch")
    with apar.engine() as engine:
        own = request(apar, Sampling(logit_bias=BIAS, min_tokens=5, stop_token_ids=(7,), ignore_eos=True))
        plain = request(apar, Sampling(ignore_eos=True, stop_token_ids=(7,)), "plain")
        engine.add(own)
        engine.add(plain)
        assert own.sampler.recipe is not None and own.sampler.on_device
        assert plain.sampler.plain


@pytest.mark.parametrize("least", [1, 7, 20, LIMIT])
@pytest.mark.parametrize("seed", [5, 24])
def test_no_answer_is_shorter_than_was_asked_for(seed, least):
    """And one whose threads did not want to end before is the one without the wish."""
    model = model_of(seed)
    for row in range(3):
        apar = attached(model, None, "torch")
        ends = {"logit_bias": {EOS: 2.0}}
        free, own = (request(apar, Sampling(min_tokens=n, **ends), str(n), row) for n in (0, least))
        answered(apar, free, own)
        text = own.text_ids[:-1] if own.text_ids[-1] == EOS else own.text_ids
        assert len(text) >= least
        if len(free.tree.trunk.token_ids) - len(free.tree.trunk.children) > least:
            assert own.text_ids == free.text_ids


@pytest.mark.parametrize("where", RUNTIMES)
def test_an_answer_that_ignores_its_end_ends_by_its_limit(where):
    """Children end all the same, and so everything behind them is read."""
    ends = {"logit_bias": {EOS: 3.0}}
    its = written(where, Sampling(ignore_eos=True, **ends))
    assert (len(its.text_ids), its.finish_reason) == (LIMIT, "length")
    assert EOS in its.tree.trunk.token_ids[:-1]
    children = its.tree.threads[1:]
    assert any(thread.finish_reason == "stop" for thread in children)
    for thread in children:
        assert EOS not in thread.token_ids[:-1]
        assert (thread.finish_reason == "stop") == (EOS in thread.token_ids)
    free = request(attached(model_of(), None, where), Sampling(**ends))
    answered(attached(model_of(), None, where), free)
    assert free.finish_reason == "stop" and its.text_ids[: len(free.text_ids)] == free.text_ids


@pytest.mark.parametrize("where", RUNTIMES)
def test_an_answer_ends_before_the_first_stop_token_that_is_read(where):
    """In whichever thread it stands; whatever was guessed, and decided behind it."""
    free = written(where, Sampling())
    assert len(free.tree.threads) > 2 and free.text_ids.count(free.text_ids[0]) < LIMIT
    threads = set()
    for token in sorted(set(free.text_ids)):
        place = free.text_ids.index(token)
        its = request(
            attached(model_of(), RecallHeads(model_of(), [free.tree]), where), Sampling(stop_token_ids=(token,))
        )
        answered(attached(model_of(), RecallHeads(model_of(), [free.tree]), where), its)
        assert (its.text_ids, its.finish_reason) == (free.text_ids[:place], "stop")
        threads.add(free.text[place][0].index)
    assert len(threads) > 1


def test_an_end_token_among_stop_tokens_still_leads_a_child_back():
    apar = attached(model_of(), None, "torch")
    ends = {"logit_bias": {EOS: 3.0}}
    free = request(apar, Sampling(**ends), "free")
    same = request(apar, Sampling(stop_token_ids=(EOS,), **ends), "same")
    ignored = request(apar, Sampling(stop_token_ids=(EOS,), ignore_eos=True, **ends), "ignored")
    answered(apar, free, same, ignored)
    assert free.text_ids[-1] == EOS and free.finish_reason == "stop"
    assert any(thread.finish_reason == "stop" for thread in free.tree.threads[1:])
    assert same.text_ids == ignored.text_ids == free.text_ids[:-1]
    assert same.finish_reason == ignored.finish_reason == "stop"


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(logit_bias=BIAS),
        Sampling(logit_bias={EOS: 3.0}, min_tokens=1),
        Sampling(logit_bias={EOS: 3.0}, ignore_eos=True),
        Sampling(temperature=0.5, seed=3, stop_token_ids=(12, 13)),
    ],
    ids=["biased", "held back", "ignoring", "stopped"],
)
def test_every_limit_is_the_unlimited_run_cut_short(sampling):
    whole = written("torch", sampling)
    apar = attached(model_of(), RecallHeads(model_of(), [whole.tree]), "torch")
    its = [request(apar, sampling, str(limit), max_new_tokens=limit) for limit in range(1, LIMIT)]
    answered(apar, *its)
    for limit, one in enumerate(its, 1):
        assert one.text_ids == whole.text_ids[:limit]


# Structured output.

SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer"},
        "b": {"enum": ["ab", "true", "12"]},
        "c": {"type": "array", "maxItems": 2},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}


@cache
def json_model():
    return tiny_model("wide_llama", 5, eos=1.0)


def guided(apar, sampling=None, name="own", row=0, limit=90, schema=SCHEMA, **options):
    sampling = replace(sampling or Sampling(), guide=Guide.json_schema(schema))
    return request(apar, sampling, name, row, max_new_tokens=limit, **options)


@pytest.mark.parametrize("where", RUNTIMES)
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.5, top_k=20, seed=3)], ids=["greedy", "sampled"]
)
def test_a_guided_answer_is_one_text_of_its_schema_whatever_was_guessed(sampling, where):
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    model, tokenizer = json_model(), json_tokenizer()
    apar = attached(model, None, where, tokenizer=tokenizer)
    plain = [guided(apar, sampling, str(row), row) for row in range(3)]
    answered(apar, *plain)
    heads = RecallHeads(model, [one.tree for one in plain], wrong_every=2)
    apar = attached(model, heads, where, tokenizer=tokenizer)
    drafted = [guided(apar, sampling, str(row), row) for row in range(3)]
    beside = [request(apar, Sampling(), f"beside {row}", row) for row in range(3)]
    stats = answered(apar, *drafted, *beside)
    assert max(stats.accepted_lengths) > 1 and stats.forks > 0
    for row, (one, other) in enumerate(zip(drafted, plain, strict=True)):
        assert one.text_ids == other.text_ids and len(one.tree.threads) == 1
        if one.finish_reason == "stop":
            parsed = json.loads(tokenizer.decode(one.text_ids, skip_special_tokens=True))
            assert isinstance(parsed["a"], int) and parsed["b"] in ("ab", "true", "12")
            assert list(parsed) == [name for name in SCHEMA["properties"] if name in parsed]
        alone = request(apar, Sampling(), "alone", row)
        answered(apar, alone)
        assert beside[row].text_ids == alone.text_ids
    assert any(one.finish_reason == "stop" for one in drafted)


def test_a_guided_answer_is_plain_transformers_under_its_processor():
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    model, tokenizer = json_model(), json_tokenizer()
    apar = attached(model, None, "cpu", tokenizer=tokenizer)
    own = guided(apar)
    answered(apar, own)
    grammar = compiled(Guide.json_schema(SCHEMA), tokenizer, VOCAB, [EOS])
    rule = ControlTokensLogitsProcessor(CONTROL, 6, fork=False)
    processors = LogitsProcessorList([GuideLogitsProcessor(grammar, 6), rule])
    plain = model.generate(
        torch.tensor([ids()]), max_new_tokens=90, do_sample=False, logits_processor=processors, use_cache=True
    )
    assert own.text_ids == plain[0, 6:].tolist()


def test_a_guide_that_fails_fails_alone(monkeypatch):
    """Its parser may give up in the middle."""
    pytest.importorskip("llguidance", reason="the extra `structured` is not installed")
    tokenizer = json_tokenizer()
    for where in RUNTIMES:
        apar = attached(json_model(), None, where, tokenizer=tokenizer)
        broken, whole = guided(apar, name="broken"), guided(apar, name="whole")
        its = broken.options.processors[0]
        monkeypatch.setattr(its, "_read", [9])  # not where its matcher is
        with apar.engine() as engine:
            engine.add(broken)
            engine.add(whole)
            outputs = [output for _ in range(99) for output in engine.step()]
        (failed,) = [output for output in outputs if output.error is not None]
        assert failed.request_id == "broken" and "the guide cannot follow the text" in str(failed.error)
        alone = guided(apar)
        answered(apar, alone)
        assert whole.text_ids == alone.text_ids
