"""`VllmEngine` over a real vLLM writes what our own engine writes, token for token, in float32."""

import asyncio

import pytest

from medusa_apar.eval.vllm_answers import asked_again, opened, text

BLOCKS, LONGEST = 10, 192  # of 32 tokens; in tokens. Each of the four trunks fills 5 blocks, of which they share one


@pytest.fixture(scope="module")
def loop():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def engine(loop, merged, answers):
    engine = loop.run(opened(merged, num_gpu_blocks_override=BLOCKS, max_model_len=LONGEST))
    yield engine
    loop.run(engine.close())


@pytest.mark.parametrize("number", range(4))
def test_an_answer_with_forks_is_the_native_one(loop, engine, answers, number):
    before = engine.stats()
    assert loop.run(text(engine, "alone", answers[number])) == answers[number].text_ids
    after = engine.stats()
    assert after.forks > before.forks and after.prefix_cache_hits > before.prefix_cache_hits


def test_a_cache_that_is_too_small_for_all_of_them_changes_nothing(loop, engine, answers):
    before = engine.stats().preemptions
    assert loop.run(asked_again(engine, answers)) == [answer.text_ids for answer in answers]
    assert engine.stats().preemptions > before


def test_one_that_is_left_leaves_nothing(loop, engine, answers):
    async def left():
        outputs = engine.generate(answers[0].request("left"))
        async for output in outputs:
            if output.token_ids:
                break
        await outputs.aclose()
        while engine.stats().running or engine.stats().threads:
            await asyncio.sleep(0.05)
        # vLLM tells of what runs after each of its steps alone
        again = await text(engine, "next", answers[1])
        return again, engine.stats()

    again, stats = loop.run(asyncio.wait_for(left(), 60))
    assert again == answers[1].text_ids and stats.running == stats.threads == 0
