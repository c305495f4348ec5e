"""The protocol over the real model: its tokenizer's texts, and a chat as `generate` writes it."""

import random

import openai
import pytest

from medusa_apar.commands.demo import QUESTION
from medusa_apar.events.texts import TextStream, TokenTexts
from medusa_apar.models.chat import encode
from tests.support.serving import running
from tests.support.stop_strings import cut

pytestmark = pytest.mark.real


def decoded(apar, ids):
    return apar.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_any_tokens_become_the_text_that_all_of_them_decode_to(smollm2):
    draw = random.Random(0)
    pieces = [smollm2.tokenizer(text)["input_ids"] for text in ("👩‍👩‍👧 é", " 你好，世界", "naïve café\n", "🏳️‍🌈")]
    for _ in range(200):
        ids = [id for _ in range(6) for id in draw.choice([*pieces, [draw.randrange(49152)]])]
        draw.shuffle(ids) if draw.random() < 0.5 else None
        stream = TextStream(TokenTexts.of(smollm2.tokenizer))
        assert "".join([*map(stream.push, ids), stream.end()]) == decoded(smollm2, ids)


def test_a_chat_that_forks_is_streamed_as_generate_writes_it(smollm2):
    inputs = encode(smollm2.tokenizer, QUESTION)
    ids = smollm2.generate(**inputs, max_new_tokens=96, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    stop = decoded(smollm2, ids)[150:156]
    with running(lambda: smollm2) as its, openai.OpenAI(base_url=f"{its.url}/v1", api_key="x", max_retries=0) as client:
        plain = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
        for more, expected in (
            ({}, decoded(smollm2, ids)),
            ({"stop": [stop, "never"]}, cut(decoded(smollm2, ids), [stop])[0]),
        ):
            with client.chat.completions.create(**plain, **more, max_tokens=96, stream=True) as stream:
                text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            whole = client.chat.completions.create(**plain, **more, max_tokens=96)
            assert text == whole.choices[0].message.content == expected
