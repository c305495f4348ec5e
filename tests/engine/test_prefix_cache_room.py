"""A prefix cache in little room, and through random histories: it keeps nobody waiting and changes no text."""

from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper

from medusa_apar.drafting.options import Speculation
from medusa_apar.engine.engine import Engine
from medusa_apar.engine.options import EngineOptions
from medusa_apar.kv import prefix_cache
from medusa_apar.threads.request import Status
from tests.support.warm_engines import BACKENDS, COST, LIMIT, backend, checked, cold, prompt, request, run, shared


def test_it_is_warm_again_after_eviction():
    with shared(pool_slots=130) as engine:
        first = run(engine, request("first", prompt(1), fork=False))
        for n in range(2, 6):
            run(engine, request("other", prompt(n), fork=False))
        again = run(engine, request("again", prompt(1), fork=False))
        assert again.stats.cached_tokens < 39 and again.text_ids == first.text_ids
        assert run(engine, request("warm", prompt(1), fork=False)).stats.cached_tokens == 39
        assert engine.stats.preemptions == 0 and engine.stats.cached_slots > 30


def test_a_full_cache_keeps_nobody_waiting():
    """What is cached counts as free: as many run at once as in an engine without."""
    peaks = []
    for on in (True, False):
        with Engine(*backend("cpu"), options=EngineOptions(pool_slots=200, prefix_cache=on)) as engine:
            for n in range(8):
                run(engine, request(str(n), prompt(n), fork=False, cache_salt="other"))
            assert engine.stats.cached_slots > 100 or not on
            its = [request(f"{n} again", prompt(n), fork=False) for n in range(4)]
            run(engine, *its)
            peaks.append((engine.stats.steps, engine.stats.peak_threads, engine.stats.peak_slots))
    assert peaks[0] == peaks[1]


def test_a_long_beginning_that_many_share_is_held_once_and_lets_more_in():
    """Each needs what it adds, so that a pool for two prompts serves eight at once."""
    ids = prompt(2, 120)
    its = [request(str(n), [*ids, 5 + n], fork=False, eos_ids=frozenset()) for n in range(8)]
    with shared(pool_slots=120 + 8 * 25 + 40) as engine:
        run(engine, request("first", ids, fork=False))
        run(engine, *its)
        assert engine.stats.peak_threads == 8 and engine.stats.preemptions == 0
    for one in its:
        assert one.text_ids == cold("cpu", one.prompt_ids, fork=False, eos_ids=frozenset()).text_ids


@cache
def alone(name, ids, how, seed, fork, limit):
    return tuple(cold(name, list(ids), fork=fork, limit=limit, seed=seed, processors=PROCESSORS[how]).text_ids)


PROCESSORS = {"greedy": (), "warm": (TemperatureLogitsWarper(0.8),)}
LONGEST = 70  # tokens of a prompt
MOST = LONGEST + LIMIT + LIMIT + 2 * 3


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_every_text_is_a_cold_engines(data):
    """Prompts that begin as earlier ones and their threads do, forks, aborts, preemptions, small pools, salts."""
    draw = data.draw
    name = draw(st.sampled_from(BACKENDS))
    model, runtime = backend(name)
    options = EngineOptions(
        speculation=draw(st.sampled_from([None, Speculation()])),
        step_cost=COST,
        budget=draw(st.sampled_from([None, 6])),
        pool_slots=draw(st.none() | st.integers(MOST, MOST + 60)),
        max_prefill_rows=draw(st.sampled_from([None, 1, 5, 30])),
        max_requests=draw(st.sampled_from([None, 2])),
        prefix_cache=True,
    )
    count = draw(st.integers(1, 7))
    asked = [
        {
            "of": draw(st.integers(0, 6)),  # which of the earlier ones it begins as, and which thread
            "thread": draw(st.integers(0, 9)),
            "until": draw(st.floats(0, 1)),
            "more": draw(st.lists(st.integers(5, 8), max_size=6)),
            "how": draw(st.sampled_from(sorted(PROCESSORS))),
            "fork": draw(st.booleans()),
            "limit": draw(st.sampled_from([1, 5, LIMIT])),
            "salt": draw(st.sampled_from(["", "a"])),
            "steps": draw(st.integers(0, 30)),  # before the next joins
            "aborted": draw(st.integers(0, 5)) == 0,
        }
        for _ in range(count)
    ]
    its = []
    with pytest.MonkeyPatch.context() as patch, Engine(model, runtime, None, options) as engine:
        patch.setattr(prefix_cache, "_AT_ONCE", draw(st.sampled_from([1, 64])))
        engine.scheduler.needs.share = draw(st.sampled_from([1.0, 0.05]))  # of little an engine lets in too many
        for number, how in enumerate(asked):
            ids = prompt(number, 20)
            if its:
                earlier = its[how["of"] % len(its)][0]
                thread = earlier.tree.threads[how["thread"] % len(earlier.tree.threads)]
                path = thread.ancestor_ids() + thread.tokens
                ids = path[: round(how["until"] * len(path))]
            ids = [*ids[: LONGEST - 7], *how["more"]] or [9]
            sampled = {"seed": None if how["how"] == "greedy" else 3, "processors": PROCESSORS[how["how"]]}
            one = request(str(number), ids, how["fork"], how["limit"], cache_salt=how["salt"], **sampled)
            engine.add(one)
            its.append((one, (name, tuple(ids), how["how"], sampled["seed"], how["fork"], how["limit"])))
            for _ in range(how["steps"]):
                if engine.unfinished:
                    engine.step()
                    checked(engine)
            if how["aborted"]:
                engine.abort(one.id)
                checked(engine)
        run(engine)
    assert engine.ledger.pool.in_use == 0
    for one, known in its:
        expected = list(alone(*known))
        assert one.error is None and one.stats.cached_tokens < len(one.prompt_ids)
        if one.status is Status.ABORTED:
            expected = expected[: len(one.text_ids)]
        assert one.text_ids == expected


def test_an_engine_that_broke_or_is_closed_in_mid_run_keeps_nothing(monkeypatch):
    model, runtime = backend("cpu")
    step = type(runtime).step
    for breaks in (False, True):
        engine = shared()
        run(engine, request("before", prompt(1)))
        for n in range(3):
            engine.add(request(str(n), [*prompt(1), n], cache_salt=str(n // 2)))
        engine.step()
        assert engine.stats.cached_slots > 0
        if breaks:
            monkeypatch.setattr(type(runtime), "step", lambda *arguments: step(*arguments) and 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.step()
            engine.ledger.check()
        engine.close()
        assert engine.ledger.pool.in_use == engine.stats.cached_slots == engine.stats.final_slots == 0
