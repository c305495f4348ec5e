"""Failures stay with their request, aborts may come from anywhere, and a broken step gives back what was booked."""

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from medusa_apar.drafting.options import Speculation
from medusa_apar.engine.engine import Engine
from medusa_apar.engine.options import EngineOptions
from medusa_apar.events.reporter import Reporter
from medusa_apar.threads.request import Status
from tests.support.engine_runs import alone, long_parts, parts, prompt, request, run


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
