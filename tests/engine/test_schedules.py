"""Requests that join, leave and are aborted at any step: scheduling never shows (CONTRIBUTING, promise 5).

`make schedules COUNT=100000` runs as many random schedules.
"""

import os
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.drafting.options import Speculation
from medusa_apar.drafting.step_cost import StepCost
from medusa_apar.engine.engine import Engine
from medusa_apar.engine.options import EngineOptions
from medusa_apar.heads import Eagle3Heads
from medusa_apar.runtimes.pick import pick_runtime
from medusa_apar.threads.fork_policy import ControlTokenForks, NoForks
from medusa_apar.threads.fork_rule import ForkRule
from medusa_apar.threads.request import Request, RequestOptions, Status
from medusa_apar.triton_kernels import reference
from tests.support.drafters import RecallHeads
from tests.support.eagle3_files import Layout, checkpoint
from tests.support.models import CONTROL, EOS, VOCAB, forking_model

COUNT = int(os.environ.get("MEDUSA_APAR_SCHEDULES", "500"))
COST = StepCost(((1, 10.0), (8, 14.0), (64, 70.0)), ((1, 0.5), (8, 1.0)))
BACKENDS = ("cpu", "torch", "one launch")
LONGEST = 24  # tokens of an answer
HIDDEN = 24 + 2 * 3  # control tokens on a path beside the text
PROMPTS = [[7 + (3 * n + k) % (VOCAB - 8) for k in range(3 + 5 * n)] for n in range(4)]
PROCESSORS = {
    "greedy": (),
    "penalised": (RepetitionPenaltyLogitsProcessor(1.3),),
    "warm": (TemperatureLogitsWarper(0.8), TopKLogitsWarper(12)),
    "hot": (),
    "warm and penalised": (RepetitionPenaltyLogitsProcessor(1.2), TemperatureLogitsWarper(1.1)),
}


@cache
def backend(name):
    """Model, runtime and heads that remember what it writes."""
    model = forking_model(13, "wide_llama")  # some of its answers have dozens of threads
    runtime = pick_runtime(model, "cpu" if name == "cpu" else "torch", None, "auto")
    if name == "one launch":
        runtime.verify = reference.verify
    trees = []
    for prompt in PROMPTS:
        request = Request("a", prompt, options("greedy", None))
        with Engine(model, runtime) as engine:
            engine.add(request)
            while engine.unfinished:
                engine.step()
        trees.append(request.tree)
    return model, runtime, RecallHeads(model, trees)


@cache
def attending(name):
    """A drafter of random weights, whose keys, values and features have to be wherever its model's are."""
    model = backend(name)[0]
    layout = Layout(states=2, ids=(2, 1), where_ids="top", draft_vocab=None)
    state, config = checkpoint(layout, 0, model.config.hidden_size, VOCAB)
    return Eagle3Heads.from_state(state, config, model)


def options(how, seed, fork=True, **changes):
    return RequestOptions(
        **{"max_new_tokens": LONGEST, "eos_ids": frozenset({EOS})} | changes,
        policy=ControlTokenForks() if fork else NoForks(),
        rule=ForkRule.of(CONTROL, fork=fork),
        seed=None if how in ("greedy", "penalised") else seed,
        processors=PROCESSORS[how],
    )


def alone(name, prompt, how, seed, fork, limit):
    """The text of a request that has an engine for itself, without drafts. A limit cuts it short, and does no more."""
    return whole(name, prompt, how, None if how in ("greedy", "penalised") else seed, fork)[:limit]


@cache
def whole(name, prompt, how, seed, fork):
    model, runtime, _ = backend(name)
    request = Request("alone", PROMPTS[prompt], options(how, seed, fork))
    with Engine(model, runtime) as engine:
        engine.add(request)
        while engine.unfinished:
            engine.step()
    assert request.error is None
    return request.text_ids


requests = st.tuples(
    st.integers(0, len(PROMPTS) - 1),
    st.sampled_from(sorted(PROCESSORS)),
    st.integers(0, 2),
    st.booleans(),
    st.sampled_from([1, 5, LONGEST]),
    st.fixed_dictionaries({"max_threads": st.sampled_from([None, 1, 2]), "priority": st.integers(0, 1)}),
)
# Before each step: how many requests join, and which one of those that joined is aborted, if any. Drawn at once, since
# what is drawn may not depend on how many steps an engine takes.
schedules = st.lists(st.tuples(st.integers(0, 3), st.none() | st.none() | st.none() | st.integers(0, 6)), max_size=40)


def checked(engine, live):
    """After every step: nothing is leaked, and a request that waits or has ended holds nothing."""
    ledger = engine.ledger
    ledger.check()
    pool = ledger.pool
    assert len(pool.used) == pool.in_use == pool.live + pool.cached
    if pool.max_slots is not None:
        assert pool.in_use <= pool.max_slots
    for request in live:
        if request.status in (Status.WAITING, Status.PREEMPTED) or request.status.ended:
            assert not any(ledger.cached(thread) for thread in request.tree.threads)
    if not engine.unfinished:
        assert pool.live == 0


@settings(max_examples=COUNT, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_every_text_is_the_one_written_alone(data):
    draw = data.draw
    name = draw(st.sampled_from(BACKENDS))
    model, runtime, heads = backend(name)
    most = max(map(len, PROMPTS)) + LONGEST + LONGEST + 2 * 3
    how = EngineOptions(
        speculation=draw(st.sampled_from([None, Speculation(), Speculation(recycling=True), Speculation.even()])),
        draft_tree=DraftTree.likeliest(8),
        step_cost=COST,
        budget=draw(st.sampled_from([None, 6, 40])),
        pool_slots=draw(st.none() | st.integers(most, most + 40)),
        max_prefill_rows=draw(st.sampled_from([None, 1, 3, 7])),
        max_requests=draw(st.sampled_from([None, 1, 3])),
        prefix_cache=draw(st.booleans()),
    )
    todo = draw(st.lists(requests, min_size=1, max_size=7))
    schedule = iter(draw(schedules))
    running, aborted = {}, set()
    with Engine(model, runtime, draw(st.sampled_from([None, heads, attending(name)])), how) as engine:
        # What answers need is learned; an engine that expects too little lets in more than the pool can hold.
        engine.scheduler.needs.share = draw(st.sampled_from([1.0, 0.05]))
        while todo or engine.unfinished:
            joining, leaving = next(schedule, (1, None))
            for _ in range(joining if engine.unfinished else 1):
                if todo:
                    *its, changes = todo.pop()
                    prompt, kind, seed, fork, limit = its
                    changes = changes | {"max_new_tokens": limit}
                    request = Request(str(len(running)), PROMPTS[prompt], options(kind, seed, fork, **changes))
                    running[request.id] = request, its
                    engine.add(request)
            if running and leaving is not None:
                named = sorted(running)[leaving % len(running)]
                if not running[named][0].status.ended:
                    aborted.add(named)
                engine.abort(named)
                checked(engine, [request for request, _ in running.values()])
            if engine.unfinished:
                engine.step()
            checked(engine, [request for request, _ in running.values()])
    for named, (request, its) in running.items():
        expected = alone(name, *its)
        assert request.error is None
        if named in aborted:
            assert request.status is Status.ABORTED and request.text_ids == expected[: len(request.text_ids)]
        else:
            assert request.status is Status.FINISHED and request.text_ids == expected, (named, its)


@pytest.mark.parametrize("name", BACKENDS)
def test_preempted_threads_and_requests_are_fed_again_to_the_same_text(name):
    """What the random schedules meet now and then, for certain."""
    model, runtime, heads = backend(name)
    most = max(map(len, PROMPTS)) + LONGEST + LONGEST + 2 * 3

    def asked():
        """Answers that go on to their limit."""
        return [
            Request(f"{kind} {n}", PROMPTS[n % 4], options(kind, n, eos_ids=frozenset()))
            for n, kind in enumerate([*sorted(PROCESSORS), "greedy", "hot"])
        ]

    how = EngineOptions(Speculation(), DraftTree.likeliest(8), step_cost=COST, pool_slots=most, max_prefill_rows=3)
    with Engine(model, runtime, heads, how) as engine:
        engine.scheduler.needs.share = 0.05
        its = asked()
        for request in its:
            engine.add(request)
        while engine.unfinished:
            engine.step()
            checked(engine, its)
        assert engine.stats.preemptions > 0 and engine.stats.thread_preemptions > 0
    for request, expected in zip(its, asked(), strict=True):
        with Engine(model, runtime) as engine:
            engine.add(expected)
            while engine.unfinished:
                engine.step()
        assert request.text_ids == expected.text_ids and len(expected.text_ids) > 1
