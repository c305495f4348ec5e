"""What one body may cost: the first error ends it, what its choices share is made once, long work has few threads."""

import asyncio
import json
import threading

import pytest
from pydantic import ValidationError

import medusa_apar
from medusa_apar.serve.aside import Aside
from medusa_apar.serve.errors import ApiError
from medusa_apar.serve.schemas import ChatBody, CompletionBody
from medusa_apar.serve.translate import Place, chat, completion
from tests.support.byte_chat import byte_model, byte_tokenizer
from tests.support.openai_answers import QUESTION
from tests.support.serving import SECONDS

MANY = 3000
NAMES = {f"x{n}": n for n in range(MANY)}


@pytest.fixture(scope="module")
def place():
    """A model that cannot fork."""
    return Place(medusa_apar.attach(byte_model(), tokenizer=byte_tokenizer()).facts, "id")


@pytest.mark.parametrize(
    "wrong",
    [
        NAMES,
        {"apar": NAMES},
        {"stream_options": NAMES},
        {"response_format": {"type": "json_schema", "json_schema": NAMES}},
        {"messages": [{}] * MANY},
        {"messages": [QUESTION[0] | NAMES] * 2},
        {"messages": [QUESTION[0] | {"tool_calls": [{}] * MANY}]},
        {"tools": [{}] * MANY},
        {"tools": [{"type": "function", "function": NAMES}]},
        {"modalities": [1] * MANY},
        {"metadata": NAMES},
        {"logit_bias": NAMES},
        {"stop_token_ids": ["x"] * MANY},
        {"stop": [1] * MANY},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_body_that_is_wrong_everywhere_has_few_errors(wrong):
    """Each error would be held and written with the value that it is about."""
    with pytest.raises(ValidationError) as refused:
        ChatBody.model_validate_json(json.dumps({"messages": QUESTION} | wrong))
    assert refused.value.error_count() <= 5


def test_choices_share_what_is_made_of_their_body(place):
    fields = {"stop": ["abab", "b"], "logit_bias": {"7": 3}, "n": 3, "seed": 5}
    asked = completion(CompletionBody.model_validate({"prompt": ["a", "b"], **fields}), place)
    assert len(asked.requests) == 6
    assert len({id(request.options.processors[0]) for request in asked.requests}) == 1
    assert len({request.options.seed for request in asked.requests}) == 3
    assert [vars(stop)["shorter"] for stop in asked.stops] == [[0, 0, 1, 2], [0]]  # so nobody makes them again


def test_true_is_refused_where_nothing_can_fork(place):
    for fork in (None, False, "auto", "off", "lists"):
        chat(ChatBody.model_validate({"messages": QUESTION, "apar": {"fork": fork}}), place)
    with pytest.raises(ApiError, match="no .Fork. and .Child.") as refused:
        chat(ChatBody.model_validate({"messages": QUESTION, "apar": {"fork": True}}), place)
    assert (refused.value.status, refused.value.param) == (400, "apar.fork")


def test_a_text_much_too_long_is_refused_before_it_is_tokenized(place, monkeypatch):
    monkeypatch.setattr(type(place.facts.tokenizer), "_encode_plus", None)
    said = "context has 1024 tokens, but the prompt has [0-9]+ or more"
    for prompt in ("a" * 20_000, ["a", "é" * 20_000]):
        with pytest.raises(ApiError, match=said) as refused:
            completion(CompletionBody.model_validate({"prompt": prompt}), place)
        assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")
    with pytest.raises(ApiError, match=said):
        chat(ChatBody.model_validate({"messages": [*QUESTION, {"role": "user", "content": "b" * 20_000}]}), place)
    with pytest.raises(TypeError):
        completion(CompletionBody.model_validate({"prompt": "a"}), place)


def test_long_work_has_few_threads_and_a_short_queue():
    async def crowd():
        aside, go, begun, here = Aside(most_waiting=3), threading.Event(), [], threading.get_ident()

        def work():
            begun.append(threading.get_ident())
            assert go.wait(SECONDS)
            return "done"

        try:
            tasks = [asyncio.create_task(aside(work, 1 << 20)) for _ in range(7)]
            while len(begun) < 4:
                await asyncio.sleep(0.001)
            for always in (False, True):
                with pytest.raises(ApiError) as refused:
                    await aside(work, 0 if always else 1 << 20, always)
                assert refused.value.status == 429 and refused.value.headers["Retry-After"] == "1"
            assert await aside(threading.get_ident, 100) == here  # short work does not wait
            tasks.pop().cancel()
            await asyncio.sleep(0)
            tasks.append(asyncio.create_task(aside(work, 1 << 20)))  # into the place of who has gone
            await asyncio.sleep(0)
            assert len(begun) == 4 and here not in begun
        finally:
            go.set()
        assert await asyncio.gather(*tasks) == ["done"] * 7

    asyncio.run(crowd())
