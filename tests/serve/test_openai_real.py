"""The protocol over the real model: its tokenizer's texts, and a chat as `generate` writes it."""

import random

import openai
import pytest
import torch

import medusa_apar
from medusa_apar.commands.demo import QUESTION
from medusa_apar.events.texts import TextStream, TokenTexts
from medusa_apar.models.chat import encode
from tests.support.serving import running
from tests.support.stop_strings import cut

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def apar():
    torch.set_num_threads(2)
    yield medusa_apar.load("smollm2-135m")
    torch.set_num_threads(1)


def decoded(apar, ids):
    return apar.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_any_tokens_become_the_text_that_all_of_them_decode_to(apar):
    draw = random.Random(0)
    pieces = [apar.tokenizer(text)["input_ids"] for text in ("👩‍👩‍👧 é", " 你好，世界", "naïve café\n", "🏳️‍🌈")]
    for _ in range(200):
        ids = [id for _ in range(6) for id in draw.choice([*pieces, [draw.randrange(49152)]])]
        draw.shuffle(ids) if draw.random() < 0.5 else None
        stream = TextStream(TokenTexts.of(apar.tokenizer))
        assert "".join([*map(stream.push, ids), stream.end()]) == decoded(apar, ids)


def test_a_chat_that_forks_is_streamed_as_generate_writes_it(apar):
    inputs = encode(apar.tokenizer, QUESTION)
    ids = apar.generate(**inputs, max_new_tokens=96, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    stop = decoded(apar, ids)[150:156]
    with running(lambda: apar) as its, openai.OpenAI(base_url=f"{its.url}/v1", api_key="x", max_retries=0) as client:
        plain = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
        for more, expected in (
            ({}, decoded(apar, ids)),
            ({"stop": [stop, "never"]}, cut(decoded(apar, ids), [stop])[0]),
        ):
            with client.chat.completions.create(**plain, **more, max_tokens=96, stream=True) as stream:
                text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            whole = client.chat.completions.create(**plain, **more, max_tokens=96)
            assert text == whole.choices[0].message.content == expected
