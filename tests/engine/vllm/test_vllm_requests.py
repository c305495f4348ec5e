"""What a request over vLLM may ask for is what the native engine does; the rest is refused before vLLM is asked."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from medusa_apar.engine.engine import Engine
from medusa_apar.engine.vllm.vllm_engine import VllmEngine
from medusa_apar.threads.fork_policy import ControlTokenForks, NoForks
from medusa_apar.threads.fork_rule import ForkRule
from medusa_apar.verify.min_tokens import MinTokensLogitsProcessor
from medusa_apar.verify.penalties import PresenceFrequencyLogitsProcessor
from tests.support import clockwork
from tests.support.models import CONTROL, EOS
from tests.support.over_vllm import (
    CONTEXT,
    PROMPTS,
    SCHEDULES,
    answer,
    engine_of,
    left_nothing,
    native,
    parts,
    request,
)
from tests.support.stand_in_vllm import SpokenPlainly, StandIn

STOPS = frozenset({11, 12, 13, 14, 15})
HELD = MinTokensLogitsProcessor(4, 12, sorted(STOPS), CONTROL, True)
ENDS_HELD = MinTokensLogitsProcessor(4, 12, [EOS], CONTROL)
PENALISED = PresenceFrequencyLogitsProcessor(4, 0.8, 0.3, CONTROL.ids)
ONE_THREAD = {"policy": NoForks(), "rule": ForkRule.of(CONTROL, fork=False)}


@settings(max_examples=40, deadline=None)
@given(
    **SCHEDULES,
    number=st.integers(0, 5),
    changes=st.sampled_from(
        [
            {"logprobs": 2},
            {"rule": ForkRule.of(CONTROL, fork=False)},
            {"rule": ForkRule.of(CONTROL, max_depth=1)},
            {"ignore_eos": True},
            {"stop_ids": STOPS},
            {"fork_if": lambda point: sum(point.path_ids) % 2 == 0},
            {"max_threads": 1},
            {"ignore_eos": True, "processors": (HELD,), "stop_ids": STOPS},
            {"processors": (MinTokensLogitsProcessor(4, 20, [EOS], CONTROL),)},
            {"processors": (HELD,), "stop_ids": STOPS},
            {
                "ignore_eos": True,
                "processors": (RepetitionPenaltyLogitsProcessor(1.3), HELD),
                "stop_ids": STOPS,
            },
            {"processors": (ENDS_HELD, HELD, PENALISED), "stop_ids": STOPS, **ONE_THREAD},
            {
                "ignore_eos": True,
                "processors": (ENDS_HELD, HELD, PENALISED),
                "stop_ids": STOPS | {EOS},
                **ONE_THREAD,
            },
            {"stop": lambda its: len(its.text) > 2 and sum(its.text_ids[-2:]) % 9 == 0},
        ]
    ),
)
def test_what_a_request_asks_for_is_what_the_native_engine_does(seed, longest_delta, refuses, number, changes):
    client = StandIn(parts()[2], seed, longest_delta, refuses)

    async def run():
        engine = engine_of(client)
        outputs = [output async for output in engine.generate(request("a", PROMPTS[number], **changes))]
        await left_nothing(engine, client)
        return outputs

    outputs = clockwork.run(run())
    ids, reason, told = native(request("alone", PROMPTS[number], **changes))
    assert [token for output in outputs for token in output.token_ids] == ids
    assert outputs[-1].finish_reason == reason
    logprobs = [each for output in outputs for each in output.logprobs]
    assert [each.logprob for each in logprobs] == pytest.approx([each.logprob for each in told], abs=1e-4)
    assert [[id for id, _ in each.top] for each in logprobs] == [[id for id, _ in each.top] for each in told]


@pytest.mark.parametrize(
    "changes, error, said",
    [
        ({"scores": True}, NotImplementedError, "vLLM has no scores"),
        ({"typical": object(), "seed": 1}, NotImplementedError, "vLLM has no typical acceptance"),
        ({"processors": (lambda ids, scores: scores,)}, NotImplementedError, "no logits processors"),
        (
            {"ignore_eos": True, "processors": (HELD, PENALISED), "stop_ids": STOPS},
            NotImplementedError,
            "vLLM has no min_tokens with ignore_eos and stop_token_ids beside presence_penalty or frequency_penalty",
        ),
        ({"score_from": 5}, ValueError, None),
    ],
)
def test_what_cannot_be_is_refused_before_vllm_is_asked(changes, error, said):
    client = StandIn(parts()[2])

    async def run():
        prompt = list(range(7, 7 + CONTEXT % 50)) * 50 if said is None else PROMPTS[0]
        with pytest.raises(error, match=said or "max_model_len is 256"):
            await answer(engine_of(client), request("a", prompt, **changes))

    clockwork.run(run())
    assert client.asked == 0


def test_presence_and_frequency_penalties_keep_an_answer_to_one_thread():
    """A child's request of vLLM does not know what was written before it."""
    client = StandIn(parts()[2])

    async def run():
        processors = (PresenceFrequencyLogitsProcessor(4, 0.5, 0.0, CONTROL.ids),)
        its = request("a", PROMPTS[0], 60, processors=processors)
        await answer(engine_of(client), its)
        return its

    assert len(clockwork.run(run()).tree.threads) == 1
    assert len(native(request("a", PROMPTS[0], 60))[0]) and client.asked >= 1


@pytest.mark.parametrize("ignores", [False, True])
def test_a_penalty_that_counts_what_was_written_is_asked_for_once(ignores):
    """A part that was asked for anew would have it begin to count anew."""
    client = StandIn(parts()[2])
    processors = (ENDS_HELD, HELD, PENALISED)
    stops = STOPS | {EOS} if ignores else STOPS

    async def run():
        engine = engine_of(client)
        for number, prompt in enumerate(PROMPTS):
            changes = {"ignore_eos": ignores, "processors": processors, "stop_ids": stops}
            await answer(engine, request(str(number), prompt, 60, **changes))

    clockwork.run(run())
    assert client.asked == len(PROMPTS)


def test_a_prompt_is_scored():
    client, prompt = StandIn(parts()[2]), [7, 8, 9, 10, 11, 12]

    def its():
        return request("a", prompt, 1, score_from=1, logprobs=2, rule=None, policy=ControlTokenForks())

    async def run():
        return [output async for output in engine_of(client).generate(its())]

    model, runtime, _ = parts()
    with Engine(model, runtime) as engine:
        engine.add(its())
        expected = [output for _ in range(9) for output in engine.step()][-1].prompt_logprobs
    told = clockwork.run(run())[-1].prompt_logprobs
    assert [each.logprob for each in told] == pytest.approx([each.logprob for each in expected], abs=1e-4)
    assert [[id for id, _ in each.top] for each in told] == [[id for id, _ in each.top] for each in expected]


def test_a_penalty_that_reads_the_prompt_goes_along():
    """vLLM's repetition penalty reads a request's prompt, which is the path, as ours does."""
    seen = []

    class Watched(SpokenPlainly):
        def params_of(self, part):
            seen.append(part.sampling.repetition_penalty)
            return part

    async def run():
        engine = VllmEngine(StandIn(parts()[2]), CONTEXT, dialect=Watched())
        await answer(engine, request("a", PROMPTS[0], processors=(RepetitionPenaltyLogitsProcessor(1.3),)))

    clockwork.run(run())
    assert set(seen) == {1.3}
