"""The engine over vLLM, asked through a stand-in: under any schedule the native engine's text, or one clear error."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper

from medusa_apar.engine.admission import QueueFull
from medusa_apar.engine.vllm import compat
from medusa_apar.engine.vllm.vllm_engine import VllmEngine
from medusa_apar.events.recording import Recording
from medusa_apar.threads.control_tokens import ControlTokens
from medusa_apar.threads.fork_rule import ForkRule
from medusa_apar.threads.request import Status
from tests.support import clockwork
from tests.support.models import CHILD, FORK
from tests.support.over_vllm import (
    CONTEXT,
    PROMPTS,
    SCHEDULES,
    answer,
    engine_of,
    left_nothing,
    parts,
    request,
    written,
)
from tests.support.stand_in_vllm import SpokenPlainly, StandIn


@settings(max_examples=80, deadline=None)
@given(
    **SCHEDULES,
    free_rows=st.sampled_from([0.5, 3.0, 1000.0]),
    asked=st.lists(st.tuples(st.integers(0, 5), st.sampled_from([5, 12, 24])), min_size=1, max_size=5),
    most=st.sampled_from([1, 2, None]),
    ranks=st.integers(1, 3),
)
def test_no_schedule_shows(seed, longest_delta, refuses, free_rows, asked, most, ranks):
    client = StandIn(parts()[2], seed, longest_delta, refuses)

    async def run():
        engine = engine_of(client, max_requests=most, free_rows=free_rows, data_parallel_size=ranks)
        each = [request(str(n), PROMPTS[number], limit) for n, (number, limit) in enumerate(asked)]
        answers = await asyncio.gather(*(answer(engine, its) for its in each))
        await left_nothing(engine, client)
        return answers

    for (ids, last), (number, limit) in zip(clockwork.run(run()), asked, strict=True):
        assert (ids, last.finish_reason) == written(number, limit)[:2]
    assert all(len(used) == 1 for used in client.ranks.values())  # where the prefix cache has the rest of the answer


@settings(max_examples=40, deadline=None)
@given(**SCHEDULES, dies_after=st.integers(1, 150))
def test_a_core_that_dies_fails_each_answer_once(seed, longest_delta, refuses, dies_after):
    client = StandIn(parts()[2], seed, longest_delta, refuses, dies_after)

    async def run():
        engine = engine_of(client)
        tasks = [answer(engine, request(str(n), prompt)) for n, prompt in enumerate(PROMPTS)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert engine.healthy is not client.errored
        if client.errored:
            with pytest.raises(RuntimeError, match="the engine has broken"):
                await answer(engine, request("late", PROMPTS[0]))
        await left_nothing(engine, client)
        return results

    for number, result in enumerate(clockwork.run(run())):
        if isinstance(result, BaseException):
            assert isinstance(result, RuntimeError) and "the engine has broken" in str(result) and client.errored
        else:
            assert result[0] == written(number)[0]


@settings(max_examples=40, deadline=None)
@given(**SCHEDULES, goes=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8)), max_size=4))
def test_readers_that_go_leave_nothing(seed, longest_delta, refuses, goes):
    """Whoever goes, whenever: its requests of vLLM are closed, and the others' texts are what they were."""
    client = StandIn(parts()[2], seed, longest_delta, refuses)
    gone = dict(goes)

    async def some(engine, number):
        stream = engine.generate(request(str(number), PROMPTS[number]))
        for _ in range(gone[number]):
            if (await anext(stream, None)) is None:
                break
        await stream.aclose()

    async def run():
        engine = engine_of(client, max_requests=4)
        work = [
            some(engine, number) if number in gone else answer(engine, request(str(number), PROMPTS[number]))
            for number in range(6)
        ]
        results = await asyncio.gather(*work)
        await left_nothing(engine, client)
        return results

    for number, result in enumerate(clockwork.run(run())):
        assert number in gone or result[0] == written(number)[0]


@settings(max_examples=20, deadline=None)
@given(**SCHEDULES, number=st.integers(0, 5))
def test_events_tell_the_whole_answer(seed, longest_delta, refuses, number):
    client = StandIn(parts()[2], seed, longest_delta, refuses)

    async def run():
        engine = engine_of(client)
        return [output async for output in engine.generate(request("a", PROMPTS[number], events=True))]

    outputs = clockwork.run(run())
    recording = Recording.of([event for output in outputs for event in output.events])
    text = [thread.tokens[index] for thread, index in recording.text()]
    assert text[: len(written(number)[0])] == [token for output in outputs for token in output.token_ids]
    assert all(thread.ended for thread in recording.trees[0].threads)


@settings(max_examples=20, deadline=None)
@given(seeds=st.lists(st.integers(0, 2**32), min_size=2, max_size=2), number=st.integers(0, 5), noise=st.integers(0, 9))
def test_a_seed_gives_one_text_whatever_comes_when(seeds, number, noise):
    """vLLM's noise comes from the seed of each request: threads have their own, and sampled ones never stop halfway."""

    async def run(seed):
        client = StandIn(parts()[2], seed, 4, 0.2)
        engine = engine_of(client, free_rows=0.5)
        its = request("a", PROMPTS[number], seed=noise, processors=(TemperatureLogitsWarper(0.7),))
        return await answer(engine, its)

    (one, _), (other, _) = (clockwork.run(run(seed)) for seed in seeds)
    assert one == other


@settings(max_examples=20, deadline=None)
@given(**SCHEDULES, number=st.integers(0, 5), noise=st.none() | st.integers(0, 9), most=st.integers(1, 2))
def test_no_more_threads_run_than_may(seed, longest_delta, refuses, number, noise, most):
    client = StandIn(parts()[2], seed, longest_delta, refuses)

    async def run():
        engine = engine_of(client, free_rows=1000.0)
        await answer(engine, request("a", PROMPTS[number], 40, seed=noise, max_threads=most))
        await left_nothing(engine, client)

    clockwork.run(run())
    assert client.most_open <= most + 1  # one is closed while the next is opened


def test_threads_of_one_answer_have_noise_of_their_own():
    client, seeds = StandIn(parts()[2]), []

    class Watched(SpokenPlainly):
        def params_of(self, part):
            seeds.append(part.sampling.seed)
            return part

    async def run():
        engine = VllmEngine(client, CONTEXT, dialect=Watched())
        await answer(engine, request("a", PROMPTS[0], 60, seed=3))

    clockwork.run(run())
    assert len(seeds) > 3 and len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)


def test_what_is_read_first_goes_first():
    """Children before what their parent writes behind them, in their order; an answer before those that came later."""
    client = StandIn(parts()[2])

    async def run():
        engine = engine_of(client, free_rows=1000.0)
        each = [request(str(n), prompt, 60) for n, prompt in enumerate(PROMPTS)]
        await asyncio.gather(*(answer(engine, its) for its in each))
        return each

    compared = 0
    for number, its in enumerate(clockwork.run(run())):
        of = {
            its.tree.threads[int(name.split(".")[1])]: value
            for name, value in client.priorities.items()
            if name.split(".")[0] == str(number)
        }
        for thread, value in of.items():
            siblings = [of[child] for child in thread.children if child in of]
            assert siblings == sorted(set(siblings)) and all(child < value for child in siblings)
            compared += len(siblings)
        others = [value for name, value in client.priorities.items() if int(name.split(".")[0]) > number]
        assert all(max(of.values()) < other for other in others)
    assert compared > 20


def test_little_is_written_in_vain_where_rows_are_dear():
    def waste(free_rows):
        client = StandIn(parts()[2], longest_delta=1)

        async def run():
            engine = engine_of(client, free_rows=free_rows)
            texts = await asyncio.gather(*(answer(engine, request(str(n), p, 60)) for n, p in enumerate(PROMPTS)))
            return sum(len(ids) for ids, _ in texts)

        shown = clockwork.run(run())
        return client.written / shown

    dear, free = waste(0.5), waste(1000.0)
    assert dear < 0.8 * free


def test_answers_are_admitted_and_not_threads():
    client = StandIn(parts()[2])

    async def run():
        engine = engine_of(client, max_requests=1, max_waiting=1)
        streams = [engine.generate(request(str(n), PROMPTS[n])) for n in range(3)]
        firsts = [await anext(stream) for stream in streams[:2]]
        assert not any(first.token_ids for first in firsts)
        with pytest.raises(QueueFull, match="1 requests are waiting"):
            await anext(streams[2])
        assert engine.stats().places == 0 and engine.stats().waiting == 1
        rest = [[output async for output in stream] for stream in streams[:2]]
        await left_nothing(engine, client)
        return rest

    for number, outputs in enumerate(clockwork.run(run())):
        assert [token for output in outputs for token in output.token_ids] == written(number)[0]


def test_an_error_of_one_request_is_its_own():
    client = StandIn(parts()[2], fails=lambda path: LookupError("of a request") if path[2] == 10 else None)

    async def run():
        engine = engine_of(client)
        bad, good = await asyncio.gather(
            answer(engine, request("bad", PROMPTS[1])), answer(engine, request("good", PROMPTS[0]))
        )
        assert engine.healthy
        await left_nothing(engine, client)
        return bad, good

    (_, last), (ids, _) = clockwork.run(run())
    assert last.finish_reason == "error" and isinstance(last.error, LookupError)
    assert ids == written(0)[0]


def test_drain_waits_and_close_does_not():
    async def run(timeout):
        client = StandIn(parts()[2])
        engine = engine_of(client)
        task = asyncio.create_task(answer(engine, request("a", PROMPTS[0])))
        await asyncio.sleep(0)
        done = await engine.drain(timeout)
        assert not engine.healthy
        with pytest.raises(RuntimeError, match="takes no requests"):
            await answer(engine, request("late", PROMPTS[0]))
        try:
            return done, (await task)[0]
        except RuntimeError as error:
            return done, str(error)

    assert clockwork.run(run(None)) == (True, written(0)[0])
    assert clockwork.run(run(0.0)) == (False, "the engine was closed.")


def test_what_vllm_drafts_is_counted_under_its_own_name_for_how():
    counts = compat.Counts(drafts=5, draft_tokens=15, accepted=[4, 2, 1], draft_method="ngram")

    async def run():
        return VllmEngine(StandIn(parts()[2]), CONTEXT, counts=counts, dialect=SpokenPlainly()).stats()

    stats = clockwork.run(run())
    assert (stats.drafted, stats.accepted) == ({"ngram": 15}, {"ngram": 7})
    assert stats.drafts == {0: 1, 1: 2, 2: 1, 3: 1}


def test_an_abort_by_another_ends_the_iterator():
    client = StandIn(parts()[2])

    async def run():
        engine = engine_of(client)
        its, reasons = request("a", PROMPTS[0], 200), []
        async for output in engine.generate(its):
            engine.abort(its)
            reasons.append(output.finish_reason)
        engine.abort(its)  # one that has ended stays as it is
        await left_nothing(engine, client)
        return reasons, its.status

    reasons, status = clockwork.run(run())
    assert reasons[-1] == "aborted" and set(reasons[:-1]) <= {None} and status is Status.ABORTED


def test_the_stand_in_forks_as_vllm_may():
    """Bans of sequences do not see the prompt: the stand-in, as vLLM, does write a `[Fork]` where none may be."""
    client = StandIn(parts()[2])
    rule = ForkRule.of(ControlTokens(FORK, CHILD))

    async def run():
        engine = engine_of(client)
        each = [request(str(n), prompt, 60, rule=rule) for n, prompt in enumerate(PROMPTS)]
        await asyncio.gather(*(answer(engine, its) for its in each))
        return each

    asked = sum(len(its.tree.threads) for its in clockwork.run(run()))
    assert client.asked > asked  # parts that were asked again with `[Fork]` banned
