"""The engine's own promises: the queue, fairness, long prompts in pieces, and failures that stay with their request."""

from functools import cache

import pytest
import torch
from transformers import LlamaConfig, RepetitionPenaltyLogitsProcessor

from medusa_apar.drafting.options import Speculation
from medusa_apar.drafting.step_cost import StepCost
from medusa_apar.engine.admission import QueueFull
from medusa_apar.engine.engine import Engine
from medusa_apar.engine.options import EngineOptions
from medusa_apar.events.recording import Recording
from medusa_apar.events.reporter import Reporter
from medusa_apar.runtimes.pick import pick_runtime
from medusa_apar.threads.fork_policy import ControlTokenForks, NoForks
from medusa_apar.threads.fork_rule import ForkRule
from medusa_apar.threads.request import Request, RequestOptions, Status
from tests.support.models import CONTROL, EOS, VOCAB, WIDE, forking_model, random_model, tiny_model

LIMIT = 32


@cache
def parts(seed=5):
    """Model and runtime; of seed 13 the first prompt's answer has dozens of threads."""
    model = forking_model(seed, "wide_llama")
    return model, pick_runtime(model, "auto", None, "auto")


@cache
def long_parts():
    """A model with room for long prompts, whose answers do not end by themselves."""
    config = LlamaConfig(**WIDE | {"max_position_embeddings": 8192, "num_hidden_layers": 1}, eos_token_id=EOS)
    model = random_model(config, 3, scale=3.0)
    return model, pick_runtime(model, "auto", None, "auto")


def prompt(n, length=6):
    return [5 + (7 * n + 3 * k) % (VOCAB - 6) for k in range(length)]


def request(name, ids, limit=LIMIT, fork=True, **changes):
    policy = ControlTokenForks() if fork else NoForks()
    how = {"eos_ids": frozenset({EOS}), "policy": policy, "rule": ForkRule.of(CONTROL, fork=fork)}
    return Request(name, ids, RequestOptions(max_new_tokens=limit, **how | changes))


def run(engine, *its):
    for one in its:
        engine.add(one)
    while engine.unfinished:
        engine.step()
    engine.ledger.check()
    assert engine.ledger.pool.in_use == 0
    return its


def alone(ids, its=None, **changes):
    with Engine(*(parts() if its is None else its)) as engine:
        return run(engine, request("alone", ids, **changes))[0].text_ids


def test_a_queue_of_64_goes_through_a_pool_for_two_in_the_order_it_came():
    its = [request(str(n), prompt(n), limit=24) for n in range(64)]
    order = []
    with Engine(*parts(), options=EngineOptions(pool_slots=2 * (6 + 24 + 24 + 6))) as engine:
        for one in its:
            engine.add(one)
        while engine.unfinished:
            engine.step()
            order += [one.arrival for one in its if one.stats.steps and one.arrival not in order]
    assert order == list(range(64))
    assert all(one.status is Status.FINISHED for one in its)
    assert engine.stats.preemptions == sum(one.stats.preemptions for one in its) <= 64
    assert engine.stats.peak_threads > 1
    for n in (0, 1, 30, 63):
        assert its[n].text_ids == alone(prompt(n), limit=24)


def test_a_waiting_request_of_a_better_priority_goes_first():
    its = [request(str(n), prompt(n), priority=5 - n % 3) for n in range(6)]
    with Engine(*parts(), options=EngineOptions(max_requests=1)) as engine:
        for one in its:
            engine.add(one)
        assert [one.arrival for one in engine.scheduler.waiting()] == [2, 5, 1, 4, 0, 3]
        order = []
        while engine.unfinished:
            order += [output.request_id for output in engine.step() if output.finish_reason]
    assert order == ["2", "5", "1", "4", "0", "3"]


def test_too_many_waiting_requests_and_what_can_never_fit_are_refused_with_the_numbers():
    with Engine(*parts(), options=EngineOptions(pool_slots=80, max_waiting=2)) as engine:
        with pytest.raises(ValueError, match="a prompt of 6 tokens and max_new_tokens=90 may need 192 slots"):
            engine.add(request("a", prompt(0), limit=90))
        with pytest.raises(ValueError, match="The prompt has 300 tokens, but the model's context ends at 256"):
            engine.add(request("b", prompt(0, 300)))
        engine.add(request("c", prompt(0)))
        with pytest.raises(ValueError, match="a request named 'c' is unfinished"):
            engine.add(request("c", prompt(0)))
        engine.add(request("d", prompt(1)))
        engine.add(request("one that could run at once", prompt(1)))
        with pytest.raises(QueueFull, match="2 requests are waiting already"):
            engine.add(request("e", prompt(2)))
        engine.step()
        engine.abort("nobody")
    with pytest.raises(RuntimeError, match="closed"):
        engine.add(request("f", prompt(0)))


def test_a_plain_answer_gets_its_row_in_every_step_beside_one_with_many_threads():
    """Under a pool that is too small for all threads, too."""
    free = run(Engine(*parts(13)), request("wide", prompt(0), 100))[0]
    assert len(free.tree.threads) > 8
    for slots in (None, 6 + 200 + 6 + 12):
        wide, plain = request("wide", prompt(0), 100), request("plain", prompt(1), 40, fork=False)
        with Engine(*parts(13), options=EngineOptions(pool_slots=slots)) as engine:
            engine.add(wide)
            engine.step()
            engine.add(plain)
            most = 0
            while not plain.done:
                before = len(plain.text_ids)
                engine.step()
                assert len(plain.text_ids) == before + 1
                most = max(most, len(wide.live))
            while engine.unfinished:
                engine.step()
            assert most > 4 and wide.text_ids == free.text_ids


def test_a_long_prompt_joins_running_requests_without_stopping_them():
    model, runtime = long_parts()
    long = prompt(9, 4000)
    its = [request(str(n), prompt(n), limit=200, fork=False, eos_ids=frozenset()) for n in range(8)]
    with Engine(model, runtime, options=EngineOptions(max_prefill_rows=64)) as engine:
        for one in its:
            engine.add(one)
        engine.step()
        joined = request("long", long, limit=4, fork=False, eos_ids=frozenset())
        engine.add(joined)
        steps = 0
        while not joined.text_ids:
            before, fed = [len(one.text_ids) for one in its], engine.stats.forward_tokens
            engine.step()
            steps += 1
            assert [len(one.text_ids) for one in its] == [length + 1 for length in before]
            assert engine.stats.forward_tokens - fed <= 8 + 64
        assert steps == -(-4000 // 64)
        while engine.unfinished:
            engine.step()
    assert joined.text_ids == alone(long, (model, runtime), limit=4, fork=False, eos_ids=frozenset())


def test_a_step_with_prefill_is_predicted_to_take_twice_a_decode_steps_time_at_most():
    cost = StepCost(((1, 6.0), (24, 30.0), (64, 70.0)))
    for speculation in (Speculation(), None):
        options = EngineOptions(speculation=speculation, step_cost=cost)
        engine = Engine(*parts(), options=options)
        expected = max(n for n in range(1, 300) if cost.rows(24 + n)[-1] <= 2 * cost.rows(24)[-1])
        assert engine.scheduler.max_prefill_rows == expected
        engine.close()
    assert Engine(*parts(), options=EngineOptions(budget=24)).scheduler.max_prefill_rows == 24  # no costs


def raising_at(step):
    """A processor that raises at its so manieth call."""
    calls = []

    def processor(input_ids, scores):
        calls.append(1)
        if len(calls) == step:
            raise LookupError(f"call {step}")
        return scores

    return processor


def raising_consumer(event):
    if event.step == 7:
        raise LookupError("of the consumer")


def stop_raises(request):
    if len(request.text) == 5:
        raise LookupError("of the criterion")
    return False


def never_again(point):
    raise LookupError("of fork_if")


FAILURES = {
    "processor": lambda: {"processors": (raising_at(7),)},
    "consumer": lambda: {"watcher": Reporter(raising_consumer)},
    "criterion": lambda: {"stop": stop_raises},
    "fork_if": lambda: {"fork_if": never_again},
    "no token": lambda: {"processors": (lambda ids, scores: torch.full_like(scores, -torch.inf),)},
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_ends_its_request_alone(kind):
    bad = request("bad", prompt(0), **FAILURES[kind]())
    others = [request(str(n), prompt(n)) for n in range(1, 4)]
    others[1] = request("2", prompt(2), processors=(RepetitionPenaltyLogitsProcessor(1.3),))
    with Engine(*parts()) as engine:
        for one in (others[0], bad, *others[1:]):
            engine.add(one)
        told = {}
        while engine.unfinished:
            for output in engine.step():
                if output.finish_reason is not None:
                    told[output.request_id] = output
            engine.ledger.check()
        assert engine.ledger.pool.in_use == 0
    assert bad.status is Status.FAILED and told["bad"].finish_reason == "error"
    expected = ValueError if kind == "no token" else LookupError
    assert isinstance(told["bad"].error, expected)
    assert others[0].text_ids == alone(prompt(1)) and others[2].text_ids == alone(prompt(3))
    assert others[1].text_ids == alone(prompt(2), processors=(RepetitionPenaltyLogitsProcessor(1.3),))


def test_an_abort_within_a_prefill_and_between_steps_changes_nothing_for_others():
    model, runtime = long_parts()
    its = [request(str(n), prompt(n), limit=60, fork=False, eos_ids=frozenset()) for n in range(2)]
    with Engine(model, runtime, options=EngineOptions(max_prefill_rows=16)) as engine:
        engine.add(its[0])
        engine.step()
        engine.add(request("long", prompt(9, 500)))
        engine.add(its[1])
        for _ in range(4):
            engine.step()
        held = engine.ledger.pool.in_use
        assert held > 60
        engine.abort("long")
        engine.ledger.check()
        assert engine.ledger.pool.in_use == held - 64
        while engine.unfinished:
            engine.step()
    for n, one in enumerate(its):
        assert one.text_ids == alone(prompt(n), (model, runtime), limit=60, fork=False, eos_ids=frozenset())


class Aborts:
    """Has an engine abort a request in the middle of a step."""

    def __init__(self, engine, named):
        self.engine, self.named = engine, named

    def __call__(self, *arguments):
        self.engine.abort(self.named)
        return arguments[1] if len(arguments) > 1 else False


@pytest.mark.parametrize("victim", ["itself", "other", "waiting"])
@pytest.mark.parametrize("way", ["consumer", "processor", "stop", "fork_if"])
def test_an_abort_from_within_a_step_ends_with_it(way, victim):
    with Engine(*parts(), options=EngineOptions(max_requests=3)) as engine:
        aborts = Aborts(engine, victim)
        changes = {
            "consumer": lambda: {"watcher": Reporter(lambda event: aborts() if event.step == 4 else None)},
            "processor": lambda: {"processors": (aborts,)},
            "stop": lambda: {"stop": lambda its: len(its.text) > 2 and aborts()},
            "fork_if": lambda: {"fork_if": lambda point: aborts() or True},
        }
        its = [request("itself", prompt(0), **changes[way]()), request("other", prompt(1)), request("third", prompt(2))]
        its.append(request("waiting", prompt(3)))
        for one in its:
            engine.add(one)
        told = {}
        while engine.unfinished:
            for output in engine.step():
                if output.finish_reason is not None:
                    told[output.request_id] = output.finish_reason
            engine.ledger.check()
        assert engine.ledger.pool.in_use == 0
    for one in its:
        assert one.error is None and (one.status is Status.ABORTED) == (one.id == victim)
        assert (told[one.id] == "aborted") == (one.id == victim)
    for n, one in enumerate(its):
        if one.id not in (victim, "itself"):
            assert one.text_ids == alone(prompt(n))


def test_a_pass_that_fails_gives_back_what_was_booked_for_it(monkeypatch):
    model, runtime = parts()
    engine = Engine(model, runtime, options=EngineOptions(speculation=Speculation()))
    engine.add(request("a", prompt(0)))
    for _ in range(3):
        engine.step()
    before, step = engine.ledger.pool.in_use, type(runtime).step

    def failing(*arguments):
        step(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(runtime), "step", failing)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.ledger.check()
    assert engine.ledger.pool.in_use == before
    with pytest.raises(RuntimeError, match="has broken in a step"):
        engine.step()
    engine.close()
    assert engine.stats.final_slots == 0
    with pytest.raises(RuntimeError, match="is closed"):
        engine.step()


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


def test_aborts_and_scored_texts_do_not_make_admission_reckless():
    with Engine(*parts(), options=EngineOptions(pool_slots=150)) as engine:
        for n in range(30):
            engine.add(request(f"x{n}", prompt(n)))
            engine.step()
            engine.abort(f"x{n}")
            run(engine, request(f"s{n}", prompt(n, 9), score_from=3))
        its = run(engine, *(request(str(n), prompt(n), fork=False, eos_ids=frozenset()) for n in range(12)))
        assert engine.stats.preemptions <= len(its)


def test_admission_goes_by_what_an_answer_held_and_not_by_what_it_wrote():
    """Threads give their slots back when they end."""
    with Engine(*parts(), options=EngineOptions(pool_slots=400)) as engine:
        for n in range(4):
            one, before, most = request(str(n), prompt(n)), engine.scheduler.needs.share, 0
            engine.add(one)
            while engine.unfinished:
                most = max(most, engine.ledger.pool.live)
                engine.step()
            held = (max(most - len(one.prompt_ids), 0) + 1) / one.max_new_tokens
            written = sum(len(thread.token_ids) for thread in one.tree.threads) / one.max_new_tokens
            assert engine.scheduler.needs.share == pytest.approx(0.9 * before + 0.1 * held)
            assert held <= written
        assert not engine.scheduler.needs._peaks


def test_answers_of_one_token_teach_that_all_of_their_limit_is_needed():
    with Engine(*parts(), options=EngineOptions(pool_slots=400)) as engine:
        run(engine, *(request(str(n), prompt(n), limit=1, fork=False) for n in range(40)))
        assert engine.scheduler.needs.share == pytest.approx(1.0)


def test_a_preempted_answer_waits_for_what_it_had():
    with Engine(*parts(), options=EngineOptions(pool_slots=400)) as engine:
        one = request("one", prompt(3), fork=False, eos_ids=frozenset())
        engine.add(one)
        for _ in range(20):
            engine.step()
        needs = engine.scheduler.needs
        needs.share = 0.05
        had = sum(map(engine.ledger.cached, one.tree.threads))
        engine.scheduler._preempt(one)
        assert had - 2 <= needs.expected(one) <= had


def test_a_large_limit_does_not_keep_others_waiting():
    model, steps = tiny_model("gpt2"), []
    gpt2 = model, pick_runtime(model, "auto", None, "auto")
    for limit in (200, 100_000):  # its positions end at 256
        with Engine(*gpt2, options=EngineOptions(pool_slots=1000)) as engine:
            run(engine, *(request(str(n), prompt(n), limit, fork=False, eos_ids=frozenset()) for n in range(8)))
            steps.append(engine.stats.steps)
    assert steps[1] < 2 * steps[0]


def test_a_better_priority_is_not_preempted_for_a_worse_one():
    with Engine(*parts(), options=EngineOptions(pool_slots=150)) as engine:
        engine.scheduler.needs.share = 0.05  # so that too many are let in
        its = [request(str(n), prompt(n), fork=False, eos_ids=frozenset(), priority=9) for n in range(4)]
        for one in its:
            engine.add(one)
        engine.step()
        urgent = request("urgent", prompt(5), fork=False, eos_ids=frozenset())
        run(engine, urgent)
        assert urgent.stats.preemptions == 0 and engine.stats.preemptions > 0


def test_a_processor_with_state_is_refused_where_two_requests_share_it():
    class Counter:
        def __init__(self):
            self.calls = 0

        def __call__(self, input_ids, scores):
            self.calls += 1
            return scores

    shared = Counter()
    its = [request(str(n), prompt(n), fork=False, processors=(shared,)) for n in range(2)]
    with Engine(*parts()) as engine:
        run(engine, *its)
        assert all("Counter keeps state" in str(one.error) for one in its)
        assert run(engine, request("alone", prompt(0), fork=False, processors=(shared,)))[0].error is None


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
