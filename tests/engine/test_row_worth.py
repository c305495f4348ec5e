"""Which threads run beside so many others: never what they write, and less of it in vain where rows cost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medusa_apar.drafting.step_cost import StepCost
from medusa_apar.engine.engine import Engine
from medusa_apar.engine.row_worth import ChildLengths, chances, worth
from medusa_apar.engine.scheduler import Scheduler
from medusa_apar.runtimes.pick import pick_runtime
from medusa_apar.threads.fork_policy import ControlTokenForks
from medusa_apar.threads.fork_rule import ForkRule
from medusa_apar.threads.request import Request, RequestOptions
from tests.support.models import CHILD, CONTROL, EOS, FORK, forking_model

NEARLY_FREE = StepCost(((1, 10.0), (64, 10.1)))
DEAR = StepCost(((1, 1.0), (64, 64.0)))  # a row costs now what it will cost later


def request_with(lengths, trunk=20, limit=100):
    """A request whose trunk has forked at its tokens 2, 4, ...; lengths: (tokens, ended) of the children."""
    request = Request("r", [7, 8], RequestOptions(limit, frozenset({EOS}), rule=ForkRule(FORK, CHILD, 3)))
    tree = request.tree
    for number, (length, ended) in enumerate(lengths):
        tree.trunk.tokens += [9, FORK]
        child = tree.fork(tree.trunk, len(tree.trunk.tokens) - 1, number)
        child.tokens += [9] * length
        child.finish_reason = "stop" if ended else None
    tree.trunk.tokens += [9] * trunk
    request.publish()
    return request


def test_chances_are_those_of_lengths_drawn_at_random():
    """Each of the threads that are read before writes on for an exponentially distributed time."""
    request = request_with([(5, False), (30, False), (9, True), (20, False)], limit=120)
    mean = 22.0
    drawn = np.random.default_rng(0).exponential(mean, (40_000, len(request.live)))
    room = np.array([request.max_new_tokens - before for _, before in request.live])
    before = np.cumsum(np.pad(drawn[:, :-1], ((0, 0), (1, 0))), axis=1)
    assert chances(request, mean) == pytest.approx((before < room).mean(0), abs=0.01)
    assert chances(request, mean)[0] == 1.0 and len(set(chances(request, mean))) == 4


def test_what_stands_beyond_the_limit_has_no_chance():
    request = request_with([(5, False), (110, False), (20, False)], limit=100)
    assert chances(request, 10.0)[1:] == [0.0] * 3


def test_lengths_are_learned_from_children_that_end():
    known, draw = ChildLengths(), np.random.default_rng(1)
    for _ in range(60):
        known.learn(request_with([(int(draw.exponential(20)) + 1, True) for _ in range(4)]))
    assert known.mean(request_with([])) == pytest.approx(20.5, rel=0.3)
    # Children that are still writing are longer than those that have ended first.
    assert known.mean(request_with([(3, True)] * 3 + [(80, False)] * 5)) > 60


def test_answers_whose_children_are_all_cut_do_not_make_later_ones_endless():
    known = ChildLengths()
    for _ in range(5000):
        known.learn(request_with([(10, False)] * 3))
    long = known.mean(request_with([]))
    for _ in range(100):
        known.learn(request_with([(20, True)] * 3))
    assert long < 3000 and known.mean(request_with([])) < 30


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=20).map(lambda found: sorted(found, reverse=True)),
    st.integers(1, 9),
    st.floats(0, 50),
    st.floats(0.01, 5),
)
def test_no_other_number_of_rows_gives_more_for_the_time(found, rows, fixed, each):
    costs = fixed + each * np.arange(1, 40)
    count = worth(found, rows, costs)
    rates = [(rows + sum(found[:n])) / costs[rows + n - 1] for n in range(len(found) + 1)]
    assert rates[count] == pytest.approx(max(rates))


def test_two_neighbours_that_were_measured_at_different_moments_decide_nothing():
    smooth = StepCost(((1, 10.0), (16, 18.0), (24, 22.0), (32, 26.0)))
    jagged = StepCost(((1, 10.0), (16, 16.0), (24, 26.0), (32, 26.0)))
    for chance in (0.2, 0.8):
        assert worth([chance] * 6, 16, smooth.rows(64)) == worth([chance] * 6, 16, jagged.rows(64))


def test_certain_rows_run_wherever_a_step_has_a_cost_of_its_own():
    costs = DEAR.rows(32) + 5.0
    assert worth([1.0] * 8, 16, costs) == 8
    assert worth([0.1] * 8, 16, costs) == 0
    assert worth([0.1] * 8, 1, NEARLY_FREE.rows(32)) == 8


def test_a_thread_that_another_can_only_run_beside_is_worth_as_much():
    request = request_with([(5, False), (0, False)], trunk=0)  # the second child's [Fork] is the trunk's root
    found = {thread: chance for chance, thread in Scheduler(None, None)._chances(request, ())}
    first, second, trunk = found
    assert trunk is request.tree.trunk and found[trunk] == found[second] < found[first]
    assert found[trunk] > chances(request, 48.0)[-1]


def test_what_rows_are_worth_is_asked_once_a_step(monkeypatch):
    """And once more where requests have joined or left."""
    asked, worthy = [], Scheduler._worthy
    monkeypatch.setattr(Scheduler, "_worthy", lambda self, requests: asked.append(1) or worthy(self, requests))
    model = forking_model(13, "wide_llama")
    how = {"eos_ids": frozenset({EOS}), "policy": ControlTokenForks(), "rule": ForkRule.of(CONTROL)}
    with Engine(model, pick_runtime(model, "auto", None, "auto")) as engine:
        for number in range(3):
            engine.add(Request(str(number), [7, 8, 9 + number], RequestOptions(40, **how)))
            engine.step()
        while engine.unfinished:
            engine.step()
    assert engine.stats.peak_threads > 3  # so that there was something to ask
    assert 0 <= len(asked) - engine.stats.steps <= 2 * 3
