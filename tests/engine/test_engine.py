"""What an engine promises of every request: it is added once, leaves nothing behind, and tells of itself alone."""

import gc
import weakref

import pytest
import torch

from medusa_apar.drafting.options import Speculation
from medusa_apar.engine.engine import Engine
from medusa_apar.engine.options import EngineOptions
from medusa_apar.events.recording import Recording
from medusa_apar.events.reporter import Reporter
from medusa_apar.runtimes.pick import pick_runtime
from tests.support.engine_runs import alone, long_parts, parts, prompt, request, run
from tests.support.models import VOCAB, forking_model


def test_an_idle_engine_looks_at_the_weights_anew_and_lets_go_of_the_model():
    model = forking_model(9, "wide_llama")
    for runtime in ("cpu", "torch"):
        runtime = pick_runtime(model, runtime, None, "auto")
        theirs = model.config._attn_implementation
        with Engine(model, runtime) as engine:
            assert engine.step() == []
            engine.add(request("a", prompt(0)))
            engine.step()
            engine.abort("a")
            assert model.config._attn_implementation == theirs
            with torch.no_grad():
                model.lm_head.weight.mul_(-1)
            (one,) = run(engine, request("b", prompt(0)))
        assert one.text_ids == alone(prompt(0), (model, runtime))


def test_a_request_is_added_once():
    one = request("a", prompt(0))
    with Engine(*parts()) as engine, Engine(*parts()) as another:
        engine.add(one)
        with pytest.raises(ValueError, match="has been added before"):
            another.add(one)
        while engine.unfinished:
            engine.step()
        with pytest.raises(ValueError, match="has been added before"):
            engine.add(one)


def test_nothing_is_kept_of_requests_that_have_ended():
    events = []
    with Engine(*parts(), options=EngineOptions(pool_slots=150, speculation=Speculation())) as engine:
        for n in range(24):
            engine.add(request(str(n), prompt(n), watcher=Reporter(events.append)))
        for n in (3, 9, 20):
            engine.step()
            engine.abort(str(n))
        while engine.unfinished:
            engine.step()
        held = (engine.ledger._slots, engine.ledger._evicted, engine.speculator._proposals, engine._requests)
        held += (engine._watches, engine.reporters._requests, engine.reporters.failed, engine.scheduler._refed)
        assert [len(each) for each in held] == [0] * len(held)


@pytest.mark.parametrize(
    ("changes", "ids", "message"),
    [
        ({"score_from": 6}, prompt(0), "score_from=6 leaves no token"),
        ({"score_from": 1}, [7], "score_from=1 leaves no token"),
        ({"score_from": 5}, prompt(0, 300), "The prompt has 300 tokens, but the model's context ends at 256"),
        ({}, [5, VOCAB], f"the prompt holds {VOCAB}, but the model's vocabulary has ids from 0 to {VOCAB - 1}"),
    ],
)
def test_what_would_harm_others_is_refused(changes, ids, message):
    with Engine(*parts()) as engine, pytest.raises(ValueError, match=message):
        engine.add(request("a", ids, **changes))


@pytest.mark.parametrize("name", ["budget", "pool_slots", "max_prefill_rows", "max_requests", "max_waiting"])
def test_options_of_an_engine_are_numbers_that_make_sense(name):
    with pytest.raises(ValueError, match=f"{name} is -1, must be"):
        EngineOptions(**{name: -1})


@pytest.mark.parametrize(
    "options", [{}, {"max_prefill_rows": 70}, {"max_prefill_rows": 8, "pool_slots": 2540}], ids=str
)
@pytest.mark.parametrize("beside", [0, 2])
def test_a_scored_text_is_scored_whole_whatever_is_preempted_or_runs_beside_it(options, beside):
    """Alone, in pieces that no row is scored of, and under a pool that takes its slots away when it is half scored."""
    model, runtime = long_parts()
    text = prompt(3, 2500)
    with torch.no_grad():
        expected = model(torch.tensor([text])).logits[0, :-1].log_softmax(-1)[599:]
    scored = request("scored", text, score_from=600, fork=False, limit=1, priority=1)
    plain = {"limit": 200, "fork": False, "eos_ids": frozenset()}
    others = [request(str(n), prompt(n), **plain) for n in range(beside)]
    with Engine(model, runtime, options=EngineOptions(**options)) as engine:
        engine.scheduler.needs.share = 0.05  # so that all are let in
        engine.add(scored)
        engine.step()
        run(engine, *others)
    assert (scored.stats.preemptions > 0) == ("pool_slots" in options and beside > 0)
    told = scored.text_scores
    assert scored.error is None and len(told.logprobs) == len(told.chosen) == 1900
    assert told.logprobs == pytest.approx(expected[range(1900), text[600:]].tolist(), abs=0.2)
    for one in others:
        assert one.text_ids == alone(one.prompt_ids, (model, runtime), **plain)


def test_logprobs_are_those_of_the_models_own_distribution():
    model, _ = parts()
    with Engine(*parts()) as engine:
        (one,) = run(engine, request("a", prompt(0), logprobs=3, seed=4))
    compared = 0
    for thread in one.tree.threads:
        told = one.logprobs.get(thread, [])
        ids = thread.path_ids + thread.token_ids
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        first = len(thread.path_ids)
        for place, its in enumerate(told):
            row = expected[first + place - 1]
            assert its.logprob == pytest.approx(float(row[ids[first + place]]), abs=1e-4)
            assert [token for token, _ in its.top] == row.topk(3).indices.tolist()
            compared += 1
    assert compared > 20


def test_outputs_carry_events_of_their_own_request_alone():
    watched, other = request("watched", prompt(0), events=True), request("other", prompt(1))
    events = []
    with Engine(*parts()) as engine:
        for one in (watched, other):
            engine.add(one)
        while engine.unfinished:
            for output in engine.step():
                events += output.events
                assert output.request_id == "watched" or not output.events
    recording = Recording.of(events)
    assert list(recording.rows) == ["watched"]
    text = [(thread.index, index) for thread, index in recording.text()]
    assert text == [(thread.index, index) for thread, index in watched.text]


def test_no_step_tells_of_requests_that_did_not_change():
    events = []
    reporter = Reporter(events.append)
    its = [request(str(n), prompt(n), watcher=reporter, limit=10 + 10 * n) for n in range(3)]
    with Engine(*parts()) as engine:
        run(engine, *its)
    lengths = {}
    for event in events:
        for named, length in getattr(event, "text_lengths", ()):
            assert length > lengths.get(named, 0)
            lengths[named] = length
    assert lengths == {one.id: len(one.text) for one in its}


@pytest.mark.parametrize("runtime", ["torch", "cpu"])
@pytest.mark.parametrize("broken", [False, True])
def test_a_closed_engine_gives_its_keys_and_values_back_whoever_still_knows_it(runtime, broken):
    """A web framework may keep the routes of a server that has ended, and with them its engine."""
    model, _ = parts()
    engine = Engine(model, pick_runtime(model, runtime, None, "auto"), options=EngineOptions(prefix_cache=True))
    run_some = [request(str(n), prompt(n)) for n in range(3)]
    for one in run_some:
        engine.add(one)
    for _ in range(4):
        engine.step()
    if broken:
        engine.runtime = None
        with pytest.raises(AttributeError):
            engine.step()
    pool = engine.ledger.pool
    held = [weakref.ref(store) for stores in (pool.keys, pool.values) for store in stores.values()]
    assert held and all(its() is not None for its in held)
    engine.close()
    gc.collect()
    assert [its for its in held if its() is not None] == []
    engine.ledger.check()
    engine.close()
