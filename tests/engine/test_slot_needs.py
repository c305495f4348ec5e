"""Admission looks ahead to the moment when all running answers together hold the most slots."""

from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from medusa_apar.engine.engine import Engine
from medusa_apar.engine.options import EngineOptions
from medusa_apar.engine.slot_needs import Course, SlotNeeds, peak
from medusa_apar.runtimes.pick import pick_runtime
from medusa_apar.threads.fork_policy import NoForks
from medusa_apar.threads.fork_rule import ForkRule
from medusa_apar.threads.request import Request, RequestOptions
from tests.support.models import CONTROL, VOCAB, forking_model

LIMIT = 40


@cache
def parts():
    model = forking_model(5, "wide_llama")
    return model, pick_runtime(model, "auto", None, "auto")


def plain(name, length, limit):
    """A request that writes all of its limit in one thread."""
    ids = [5 + (7 * len(name) + 3 * k) % (VOCAB - 6) for k in range(length)]
    return Request(
        name, ids, RequestOptions(max_new_tokens=limit, policy=NoForks(), rule=ForkRule.of(CONTROL, fork=False))
    )


@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 60), st.integers(1, 40), st.integers(0, 120)),
        min_size=1,
        max_size=8,
    )
)
def test_the_peak_is_that_of_every_moment(courses):
    """Looked for in sixtieths of a step; the sum only rises between two ends, so none of these lies above."""
    made = [Course(*map(float, course)) for course in courses]
    most = 0.0
    for moment in range(max(course[2] for course in courses) * 60 + 1):
        now = moment / 60
        most = max(
            most,
            sum(c.at_once + (c.growth * now / c.left if now <= c.left else c.growth - c.freed) for c in made),
        )
    assert peak(made) == pytest.approx(most)


def test_no_requests_need_no_slots():
    assert peak([]) == 0.0


@example([(1, 40, 0), (22, 40, 0), (1, 2, 3), (1, 27, 0)], 11, False)  # one of two tokens tells of one of forty
@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, LIMIT), st.integers(0, 12)), min_size=2, max_size=12),
    st.integers(0, 120),
    st.booleans(),
)
def test_answers_that_write_all_of_their_limit_are_never_preempted(asked, more, prefix_cache):
    """What they will hold is known then, whenever they come, however much room there is."""
    options = EngineOptions(pool_slots=96 + more, prefix_cache=prefix_cache, speculation=None)
    with Engine(*parts(), options=options) as engine:
        for number, (length, limit, steps) in enumerate(asked):
            engine.add(plain(f"{number:03}", length, limit))
            for _ in range(steps):
                engine.step()
        while engine.unfinished:
            engine.step()
        assert engine.stats.preemptions == engine.scheduler.thread_preemptions == 0
        engine.ledger.check()


@pytest.mark.parametrize("limit", [1, 2, 3, 40])
def test_an_answer_of_all_of_its_limit_has_needed_all(limit):
    """However short: what is learned from short answers is expected of long ones."""
    options = EngineOptions(prefix_cache=False, speculation=None)
    with Engine(*parts(), options=options) as engine:
        for number in range(3):
            engine.add(plain(f"{number:03}", 6, limit))
        while engine.unfinished:
            engine.step()
        assert engine.scheduler.needs.share == pytest.approx(1.0) == engine.scheduler.needs.written


def test_answers_at_different_places_share_room_that_is_too_small_for_all_their_ends():
    """Three at a time fit to their ends; begun a third of an answer apart, more of them run at once."""
    options = EngineOptions(pool_slots=3 * (6 + LIMIT) + 30, prefix_cache=False, speculation=None)
    at_once = []
    with Engine(*parts(), options=options) as engine:
        slack = engine.scheduler.budget.rows
        for number in range(12):
            engine.add(plain(f"{number:03}", 6, LIMIT))
            for _ in range(LIMIT // 4):
                engine.step()
                at_once.append(len(engine.scheduler.running))
        while engine.unfinished:
            engine.step()
        assert engine.stats.preemptions == 0
        assert max(at_once) > (options.pool_slots - slack) // (6 + LIMIT)


def test_an_answer_that_writes_more_than_was_expected_still_grows():
    needs = SlotNeeds(share=0.1, written=0.1)
    one = plain("one", 6, 100)
    one.live = [(one.tree.trunk, 50)]
    course = needs.course(one, held=56)
    assert course.at_once == 0 and course.growth >= 8 and course.left > 0 and course.freed == 56 + course.growth
