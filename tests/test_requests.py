"""Requests of a hook's own engine are answered as its `generate` answers rows."""

from dataclasses import replace

import pytest
import torch

import medusa_apar
from medusa_apar import AnswerOptions, Guide, Sampling
from medusa_apar.events import StepStarted
from medusa_apar.heads import HydraHeads
from tests.support.models import CONTROL, VOCAB, forking_model
from tests.support.prompts import prompts
from tests.support.tokenizers import tiny_tokenizer


@pytest.fixture(scope="module")
def apar():
    model = forking_model(24)
    return medusa_apar.attach(model, HydraHeads.random(model), CONTROL, tokenizer=tiny_tokenizer())


def answered(apar, *requests, **options):
    with apar.engine(**options) as engine:
        for request in requests:
            engine.add(request)
        while engine.unfinished:
            for output in engine.step():
                assert output.error is None
    return [request.text_ids for request in requests]


ASKED = ("fork", "fork_if", "max_threads", "max_depth", "stop_strings")  # of a request, and not of its sampling


@pytest.mark.parametrize(
    ("sampling", "generate"),
    [
        (Sampling(), {}),
        (Sampling(repetition_penalty=1.3), {"repetition_penalty": 1.3}),
        (Sampling(presence_penalty=0.8, frequency_penalty=0.3), {"presence_penalty": 0.8, "frequency_penalty": 0.3}),
        (Sampling(logit_bias={7: 1.5, 2: -4}), {"sequence_bias": {(7,): 1.5, (2,): -4.0}}),
        (Sampling(min_tokens=9), {"min_new_tokens": 9, "fork": "off"}),
        (None, {"fork": "off"}),
        (None, {"max_threads": 1, "max_depth": 1}),
        (None, {"stop_strings": ["d"]}),
        (None, {"fork_if": lambda point: point.forks < 1}),
    ],
    ids=[
        "greedy",
        "penalised",
        "penalised by counts",
        "biased",
        "held back",
        "no forks",
        "few threads",
        "stop strings",
        "fork_if",
    ],
)
def test_the_text_is_generates_own(apar, sampling, generate):
    inputs = prompts(3, 6, seed=2)
    rows = apar.generate(**inputs, max_new_tokens=30, do_sample=False, **generate)[:, 6:].tolist()
    asked = {name: value for name, value in generate.items() if name in ASKED}
    requests = [
        apar.request(str(row), ids, max_new_tokens=30, sampling=sampling, **asked)
        for row, ids in enumerate(inputs["input_ids"].tolist())
    ]
    for row, text in zip(rows, answered(apar, *requests, max_requests=2), strict=True):
        assert text == row[: len(text)] and set(row[len(text) :]) <= {apar.model.generation_config.pad_token_id}


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")
def test_warpers_are_those_of_transformers_in_its_order(apar):
    sampling = Sampling(temperature=0.7, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
    config = apar.model.generation_config.__class__(
        do_sample=True, temperature=0.7, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.2
    )
    theirs = apar.model._get_logits_processor(config)
    ours = sampling.processors(9)
    assert [type(its) for its in ours] == [type(its) for its in theirs]
    ids, scores = torch.randint(5, VOCAB, (1, 9)), torch.randn(1, VOCAB)
    actual, expected = scores.clone(), scores.clone()
    for mine, other in zip(ours, theirs, strict=True):
        actual, expected = mine(ids, actual), other(ids, expected)
    assert torch.equal(actual, expected)
    # Ours comes where transformers has its user's: before the warpers.
    counted = replace(sampling, presence_penalty=0.5).processors(9)
    theirs = apar.model._get_logits_processor(config, logits_processor=[counted[1]])
    assert counted[1].prompt_length == 9 and [type(its) for its in counted] == [type(its) for its in theirs]


def test_a_seed_names_the_sample_whatever_runs_beside_it(apar):
    def request(name, seed):
        return apar.request(name, [7, 8, 9, 10], sampling=Sampling(temperature=0.9, seed=seed))

    (alone,) = answered(apar, request("a", 3))
    beside = answered(apar, request("a", 3), request("b", 4), request("c", 3))
    assert beside[0] == beside[2] == alone != beside[1]


def test_a_text_is_encoded_by_the_tokenizer(apar):
    first, second = answered(apar, apar.request("a", "abc"), apar.request("b", apar.tokenizer("abc")["input_ids"]))
    assert first == second


def asked(apar, **sampling):
    return apar.request("a", [7], max_new_tokens=8, sampling=Sampling(**sampling))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda apar: Sampling(temperature=-1), "temperature=-1 must be 0, or from 1e-06 on"),
        (lambda apar: Sampling(temperature=1e-39), "temperature=1e-39 must be 0, or from 1e-06 on"),
        (lambda apar: Sampling(temperature=float("nan")), "temperature=nan must be 0, or from 1e-06 on"),
        (lambda apar: Sampling(top_p=0), "top_p=0 must be above 0"),
        (lambda apar: Sampling(presence_penalty=2.1), "presence_penalty=2.1 is not a number from -2 to 2"),
        (lambda apar: Sampling(frequency_penalty=float("nan")), "frequency_penalty=nan is not a number from -2 to 2"),
        (lambda apar: Sampling(logit_bias={7: 100.5}), "logit_bias has 100.5 for token 7"),
        (lambda apar: Sampling(logit_bias={7: float("nan")}), "logit_bias has nan for token 7"),
        (lambda apar: Sampling(logit_bias={7: "1"}), "logit_bias has '1' for token 7"),
        (lambda apar: Sampling(min_tokens=-1), "min_tokens=-1 must be a whole number, 0 or more"),
        (lambda apar: Sampling(min_tokens=1.5), "min_tokens=1.5 must be a whole number, 0 or more"),
        (lambda apar: Sampling(guide=Guide(), min_tokens=1), "min_tokens and ignore_eos cannot be had with a guide"),
        (lambda apar: Sampling(guide=Guide(), ignore_eos=True), "min_tokens and ignore_eos cannot be had with a guide"),
        (lambda apar: asked(apar, stop_token_ids=(CONTROL.child_id,)), "stop_token_ids name a control token"),
        (lambda apar: asked(apar, min_tokens=9), "min_tokens=9 are more than max_new_tokens=8"),
        *(
            (lambda apar, token=token: asked(apar, stop_token_ids=(7, token)), f"stop_token_ids names {token}, but")
            for token in (-1, VOCAB, VOCAB + 1, 2**31)
        ),
        *(
            (lambda apar, token=token: asked(apar, logit_bias={token: 1}), f"logit_bias names {token}, but the model")
            for token in (-1, VOCAB, VOCAB + 1, 2**31, 7.5)
        ),
        (lambda apar: asked(apar, logit_bias={"7": 1}), "logit_bias names '7', but the model's vocabulary has ids"),
        (lambda apar: apar.request("a", []), "The prompt is empty"),
        (lambda apar: apar.request("a", [VOCAB]), f"the prompt holds {VOCAB}"),
        (lambda apar: apar.request("a", [7], max_new_tokens=0), "max_new_tokens is 0"),
        (lambda apar: apar.request("a", [7], max_threads=0), "max_threads"),
        (lambda apar: apar.request("a", [7], fork="sometimes"), "fork is 'sometimes'"),
        (lambda apar: apar.request("a", [7], logprobs=-1), "logprobs is -1"),
        (lambda apar: apar.engine(max_requests=0), "max_requests is 0"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(apar, make, message):
    with pytest.raises(ValueError, match=message):
        make(apar)


def test_events_come_with_outputs_or_go_to_a_consumer(apar):
    events = []
    told = apar.request("told", [7, 8, 9], events=events.append, max_new_tokens=8)
    carried = apar.request("carried", [7, 8, 9], events=True, max_new_tokens=8)
    with apar.engine() as engine:
        engine.add(told)
        engine.add(carried)
        outputs = [output for _ in range(50) for output in engine.step()]
    own = [event for output in outputs for event in output.events]
    assert {output.request_id for output in outputs if output.events} == {"carried"}
    assert [type(event) for event in own] == [type(event) for event in events]


@pytest.mark.parametrize("least", [0, 3, 12])
def test_a_stop_string_waits_for_the_least_tokens(apar, least):
    free = apar.request("free", [7, 8, 9, 10], fork="off", max_new_tokens=40)
    text = apar.tokenizer.decode(answered(apar, free)[0])
    mark = text[20]
    own = apar.request("own", [7, 8, 9, 10], fork="off", stop_strings=mark, sampling=Sampling(min_tokens=least))
    (found,) = answered(apar, own)
    assert apar.tokenizer.decode(found) == text[: text.index(mark, least) + 1]


def test_without_speculation_a_request_has_the_same_text_token_by_token(apar):
    """Also beside one that guesses: neither is told of the other's wish."""
    told = {"off": [], "on": []}
    (_, ids) = prompts(2, 6, seed=2)["input_ids"].tolist()
    how = {"max_new_tokens": 30, "fork": "off"}
    off = apar.request("off", ids, events=told["off"].append, speculation=False, **how)
    on = apar.request("on", ids, events=told["on"].append, **how)
    texts = answered(apar, off, on, budget=24)
    drafted = {
        name: [len(its.token_ids) for event in events if isinstance(event, StepStarted) for its in event.drafted]
        for name, events in told.items()
    }
    assert texts[0] == texts[1] == answered(apar, apar.request("alone", ids, **how))[0]
    assert not any(drafted["off"]) and len(drafted["off"]) == len(texts[0]) and any(drafted["on"])


@pytest.mark.parametrize("speculation", [False, True])
def test_heads_are_asked_where_a_request_wants_guesses(apar, speculation):
    asked = []
    with apar.engine(budget=24) as engine:
        engine.add(apar.request("one", [7, 8, 9], max_new_tokens=12, fork="off", speculation=speculation))
        while engine.unfinished:
            engine.step()
            asked.append(engine.speculator.last_draft is not None)
        assert any(asked) == speculation and engine.stats.undrafted_steps == 0


def test_options_that_requests_share_are_changed_for_one_of_them(apar):
    shared, ids = AnswerOptions(max_new_tokens=12, fork="off", logprobs=1), [7, 8, 9]
    whole = apar.request("whole", ids, shared)
    short = apar.request("short", ids, shared, max_new_tokens=4)
    named = apar.request("named", ids, max_new_tokens=12, fork="off")
    texts = answered(apar, whole, short, named)
    assert texts[0] == texts[2] and texts[1] == texts[0][:4] and len(texts[1]) == 4
    assert [len(one.logprobs) for one in (whole, short, named)] == [1, 1, 0]
    with pytest.raises(TypeError, match="max_tokens"):
        apar.request("a", ids, shared, max_tokens=4)
