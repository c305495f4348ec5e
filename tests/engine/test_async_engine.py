"""The asyncio shell over an engine: streams, aborts, drains and breaks."""

import asyncio
import threading
import time

import pytest

from medusa_apar.engine.async_engine import ThreadedEngine
from medusa_apar.engine.engine import Engine
from medusa_apar.engine.options import EngineOptions
from medusa_apar.events import StepFinished
from medusa_apar.runtimes.pick import pick_runtime
from medusa_apar.threads.fork_policy import ControlTokenForks, NoForks
from medusa_apar.threads.fork_rule import ForkRule
from medusa_apar.threads.request import Request, RequestOptions
from tests.support.models import CONTROL, EOS, forking_model

PROMPTS = [[7, 8, 9 + n, 10] for n in range(6)]


@pytest.fixture(scope="module")
def parts():
    model = forking_model(5, "wide_llama")
    return model, pick_runtime(model, "auto", None, "auto")


def request(name, prompt, limit=40, **changes):
    how = {"eos_ids": frozenset({EOS}), "policy": ControlTokenForks(), "rule": ForkRule.of(CONTROL)}
    return Request(name, prompt, RequestOptions(max_new_tokens=limit, **how | changes))


def written(parts, prompt, limit=40):
    its = request("alone", prompt, limit)
    with Engine(*parts) as engine:
        engine.add(its)
        while engine.unfinished:
            engine.step()
    return its.text_ids


async def started(parts, **options):
    return await ThreadedEngine(lambda: Engine(*parts, None, EngineOptions(**options))).start()


async def answer(engine, its):
    outputs = [output async for output in engine.generate(its)]
    assert all(output.finish_reason is None for output in outputs[:-1])
    return [token for output in outputs for token in output.token_ids], outputs[-1]


def test_many_streams_at_once_are_each_what_is_written_alone(parts):
    async def run():
        engine = await started(parts)
        assert engine.healthy
        answers = await asyncio.gather(*(answer(engine, request(str(n), p)) for n, p in enumerate(PROMPTS)))
        assert await engine.drain()
        assert not engine.healthy and engine.stats().final_slots == 0
        return answers

    for (ids, last), prompt in zip(asyncio.run(run()), PROMPTS, strict=True):
        assert ids == written(parts, prompt)
        assert last.finish_reason in ("stop", "length") and last.error is None


def test_an_iterator_that_is_closed_aborts_its_request_alone(parts):
    async def run():
        engine = await started(parts)
        other = asyncio.create_task(answer(engine, request("other", PROMPTS[1])))
        stream = engine.generate(request("gone", PROMPTS[0], 200))
        while not (await anext(stream)).token_ids:
            pass
        await stream.aclose()
        ids, _ = await other
        again, _ = await answer(engine, request("gone", PROMPTS[0]))  # its name is free again
        assert await engine.drain()
        return ids, again, engine.stats()

    ids, again, stats = asyncio.run(run())
    assert ids == written(parts, PROMPTS[1]) and again == written(parts, PROMPTS[0])
    assert stats.final_slots == 0


def test_what_can_never_fit_is_said_to_whoever_asks(parts):
    async def run():
        engine = await started(parts, pool_slots=40)
        with pytest.raises(ValueError, match="pool_slots=40 is too small"):
            await answer(engine, request("long", PROMPTS[0], 100))
        ids, _ = await answer(engine, request("short", PROMPTS[0], 5))
        await engine.close()
        with pytest.raises(RuntimeError, match="takes no requests"):
            await answer(engine, request("late", PROMPTS[0]))
        return ids

    assert asyncio.run(run()) == written(parts, PROMPTS[0], 5)


def test_a_failed_request_says_so_and_others_go_on(parts):
    def broken(input_ids, scores):
        if input_ids.shape[1] > 9:
            raise LookupError("of the processor")
        return scores

    async def run():
        engine = await started(parts)
        bad, good = await asyncio.gather(
            answer(engine, request("bad", PROMPTS[0], processors=(broken,))), answer(engine, request("ok", PROMPTS[1]))
        )
        assert await engine.drain()
        return bad, good

    (_, last), (ids, _) = asyncio.run(run())
    assert last.finish_reason == "error" and isinstance(last.error, LookupError)
    assert ids == written(parts, PROMPTS[1])


def test_drain_gives_up_after_its_time(parts):
    async def run():
        engine = await started(parts)
        task = asyncio.create_task(answer(engine, request("long", PROMPTS[0], 200)))
        await asyncio.sleep(0)
        assert not await engine.drain(timeout=0.0)
        with pytest.raises(RuntimeError, match="the engine was closed"):
            await task

    asyncio.run(run())


def test_an_engine_that_breaks_tells_everybody(parts, monkeypatch):
    async def run():
        engine = await started(parts)
        monkeypatch.setattr(type(parts[1]), "step", lambda *_: (_ for _ in ()).throw(MemoryError("of the machine")))
        tasks = [answer(engine, request(str(n), prompt)) for n, prompt in enumerate(PROMPTS)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert not engine.healthy
        with pytest.raises(RuntimeError, match="has broken: of the machine"):
            await answer(engine, request("late", PROMPTS[0]))
        await engine.close()
        return results

    for result in asyncio.run(run()):
        assert isinstance(result, RuntimeError)


def test_what_the_making_of_an_engine_raises_is_raised_at_the_start():
    async def run():
        def make():
            raise ValueError("no such model")

        with pytest.raises(ValueError, match="no such model"):
            await ThreadedEngine(make).start()

    asyncio.run(run())


def test_what_nobody_has_read_comes_as_one_output(parts):
    """A reader that never reads costs one answer: nothing is kept for each step."""

    async def run():
        engine = await started(parts)
        stream = engine.generate(request("slow", PROMPTS[0], events=True))
        taken = await anext(stream)
        while not engine.stats().steps or engine.stats().running:
            await asyncio.sleep(0.001)
        rest = [output async for output in stream]
        steps = engine.stats().steps
        await engine.close()
        return taken, rest, steps

    taken, rest, steps = asyncio.run(run())
    assert steps > 3 > len(rest) and rest[-1].finish_reason in ("stop", "length")
    assert [token for output in (taken, *rest) for token in output.token_ids] == written(parts, PROMPTS[0])
    events = [event for output in (taken, *rest) for event in output.events]
    assert sum(isinstance(event, StepFinished) for event in events) == steps


def test_an_abort_by_another_ends_the_iterator(parts):
    async def run():
        engine = await started(parts)
        its, other = request("gone", PROMPTS[0], 200), asyncio.create_task(answer(engine, request("other", PROMPTS[1])))
        reasons = []
        async for output in engine.generate(its):
            engine.abort(its)
            reasons.append(output.finish_reason)
        ids, _ = await other
        engine.abort(its)  # one that has ended stays as it is
        assert await engine.drain()
        return reasons, ids, engine.stats()

    reasons, ids, stats = asyncio.run(run())
    assert reasons[-1] == "aborted" and set(reasons[:-1]) <= {None}
    assert ids == written(parts, PROMPTS[1]) and stats.live_slots == stats.running == stats.waiting == 0


def test_a_loop_that_is_closed_under_its_readers_leaves_nothing_running(parts):
    loop = asyncio.new_event_loop()
    engine = loop.run_until_complete(started(parts))
    its = request("left", PROMPTS[0], 1000, eos_ids=frozenset(), policy=NoForks())
    outputs = engine.generate(its)
    loop.run_until_complete(anext(outputs))
    while not engine.stats().generated_tokens:  # so that an output waits when the loop goes
        time.sleep(0.001)
    loop.close()
    while engine.stats().running:
        time.sleep(0.001)
    assert engine.stats().generated_tokens < 1000
    asyncio.run(engine.close())


def test_how_the_engine_stands_is_told_while_it_runs(parts):
    async def run():
        engine = await started(parts, max_requests=1)
        tasks = [asyncio.create_task(answer(engine, request(str(n), PROMPTS[n], 100))) for n in range(3)]
        seen = []
        while not all(task.done() for task in tasks):
            seen.append(engine.stats())
            await asyncio.sleep(0.001)
        await engine.close()
        return seen

    seen = asyncio.run(run())
    assert max(stats.waiting for stats in seen) >= 2 and {stats.running for stats in seen} <= {0, 1}
    assert max(stats.threads for stats in seen) > 1
    assert all(stats.live_slots >= stats.threads for stats in seen if stats.steps)


def test_an_engine_that_is_still_made_holds_nobody_up(parts):
    """A process that is to end does not wait for a model that loads."""
    made = threading.Event()

    async def run():
        engine = ThreadedEngine(lambda: Engine(*parts) if made.wait(10) else pytest.fail())
        start = asyncio.create_task(engine.start())
        await asyncio.sleep(0)
        assert not engine.healthy and await engine.drain()
        start.cancel()

    asyncio.run(asyncio.wait_for(run(), 10))
    made.set()
