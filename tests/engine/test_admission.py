"""Who may join an engine and who waits: the queue, priorities, fairness, and long prompts in pieces."""

import pytest

from medusa_apar.drafting.options import Speculation
from medusa_apar.drafting.step_cost import StepCost
from medusa_apar.engine.admission import QueueFull
from medusa_apar.engine.engine import Engine
from medusa_apar.engine.options import EngineOptions
from medusa_apar.runtimes.pick import pick_runtime
from medusa_apar.threads.request import Status
from tests.support.engine_runs import alone, long_parts, parts, prompt, request, run
from tests.support.models import tiny_model


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
            held = max(most - len(one.prompt_ids), 0) + 1
            share = held / (one.max_new_tokens - 1)
            assert engine.scheduler.needs.share == pytest.approx(0.9 * before + 0.1 * share)
            assert held <= sum(len(thread.token_ids) for thread in one.tree.threads)
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
