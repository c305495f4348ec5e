"""What is answered over HTTP: the same text whole and streamed, greedy or sampled, up to stop strings and limits.

Rows of the field's bugs that are looked for here: a text that a stop string cuts and ids that run on (vllm PR 47616),
stop strings that only plain answers heed (aprender PR 2019), characters cut in streams (dynamo#12630 and others),
streams that differ from plain answers (mlxcel PR 713), reasons and usage behind a limit (sglang#31599, #39826), seeds
that batch mates change (vllm#51226, tt-metal#53802).
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medusa_apar.models.chat import encode_messages
from tests.support.bytes_writer import LETTERS, ids_of
from tests.support.models import EOS
from tests.support.openai_answers import CHAT, COMPLETION, QUESTION, byte_server, put_together, whole
from tests.support.stop_strings import cut

quickly = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def server(engine):
    with byte_server(seed=3, max_requests=8, engine=engine) as server:
        yield server


def generated(server, ids, limit, **options):
    """What `generate` writes behind a prompt, without padding."""
    inputs = torch.tensor([ids])
    out = server.apar.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=limit, **options)
    return out[0, len(ids) :].tolist()


def both(server, path, **body):
    """One choice in one piece and streamed, which have to be the same; and the usage of both."""
    body = {"return_token_ids": True, "max_tokens": 40} | body
    answer = server.ask(path, **body)
    chunks = server.chunks(path, **body, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == [] and counted(chunks[-1]) == counted(answer)
    for index in range(len(answer["choices"])):
        assert put_together(chunks, index) == whole(answer, index)
    return whole(answer), answer["usage"]


def counted(answer):
    """Its usage, but for what had been read before: that changes from one time to the next."""
    return {name: count for name, count in answer["usage"].items() if name != "prompt_tokens_details"}


@pytest.mark.parametrize("limit", [1, 7, 40, 120])
@pytest.mark.parametrize("fork", [True, False])
def test_greedy_texts_are_those_of_generate(server, limit, fork):
    fields = {"temperature": 0, "max_tokens": limit, "apar": {"fork": fork}}
    prompt = encode_messages(server.tokenizer, QUESTION)["input_ids"][0].tolist()
    ids = generated(server, prompt, limit, do_sample=False, fork=fork)
    answer, usage = both(server, CHAT, messages=QUESTION, **fields)
    assert (answer["ids"], answer["text"]) == (ids, server.decode(ids))
    assert answer["reason"] == ("stop" if ids[-1] == EOS else "length")
    counts = {"prompt_tokens": len(prompt), "completion_tokens": len(ids), "total_tokens": len(prompt) + len(ids)}
    assert usage | counts == usage
    for said in ("你 a", ids_of("你 a")):
        answer, _ = both(server, COMPLETION, prompt=said, **fields)
        assert answer["ids"] == generated(server, ids_of("你 a"), limit, do_sample=False, fork=fork)


def test_answers_fork_and_characters_go_over_threads_borders(server):
    """Or nothing here would say that streams splice threads well."""
    crossing = 0
    for seed in range(8):
        body = {"prompt": "a", "seed": seed, "max_tokens": 60, "apar": {"events": True}}
        events = server.ask(COMPLETION, **body)["apar"]["events"]
        pieces = [text for event in events if event["event"] == "TokensAccepted" for text in event["texts"]]
        crossing += sum(event["event"] == "ThreadStarted" for event in events) > 2 and "" in pieces
    assert crossing >= 2
    assert server.its.service.engine.stats().accepted.total()  # stop strings and ends stand in runs of guesses, too


prompts = st.text(alphabet=LETTERS, min_size=1, max_size=4)


@quickly
@given(prompts, st.integers(0, 2**40), st.integers(1, 60), st.data())
def test_stop_strings_end_text_ids_logprobs_and_usage_alike(server, prompt, seed, limit, data):
    fields = {"prompt": prompt, "seed": seed, "max_tokens": limit, "logprobs": 1}
    free, _ = both(server, COMPLETION, **fields)
    text = free["text"]
    places = st.tuples(st.integers(0, max(len(text) - 1, 0)), st.integers(1, 4))
    stops = [text[start : start + size] or "x" for start, size in data.draw(st.lists(places, min_size=1, max_size=3))]
    answer, usage = both(server, COMPLETION, **fields, stop=stops)
    expected, found = cut(text, stops)
    assert answer["text"] == expected
    assert answer["reason"] == ("stop" if found else free["reason"])
    # The token that brings the stop string's last character is the last one, in all that is told.
    count = usage["completion_tokens"]
    assert answer["ids"] == free["ids"][:count] and answer["told"] == free["told"][:count]
    if found and not any("\ufffd" in stop for stop in stops):  # as half a character looks, too
        assert not any(stop in server.decode(answer["ids"][:-1]) for stop in stops)
    if not found:
        assert answer["ids"] == free["ids"]


@quickly
@given(st.lists(prompts, min_size=1, max_size=2), st.integers(0, 9), st.integers(1, 3), st.integers(1, 30))
def test_streams_of_many_choices_are_the_choices(server, texts, seed, n, limit):
    both(server, COMPLETION, prompt=texts, seed=seed, n=n, max_tokens=limit, echo=seed % 2 == 0)


@quickly
@given(prompts, st.sampled_from([0, 0.5, 1.3]), st.integers(0, 99), st.sampled_from([None, ["a"], [" \n", "😀"]]))
def test_chats_are_streamed_as_they_are(server, text, temperature, seed, stop):
    fields = {"messages": [{"role": "user", "content": text}], "temperature": temperature, "seed": seed, "stop": stop}
    answer, _ = both(server, CHAT, **fields, logprobs=True, top_logprobs=2)
    assert len(answer["told"]) == len(answer["ids"])


def test_every_limit_around_an_end_says_why(server):
    """An end token is the answer's end even where it is the last that the limit lets through."""
    for seed in (0, 1):
        fields = {"prompt": "a", "seed": seed}
        free, _ = both(server, COMPLETION, **fields, max_tokens=60)
        length = len(free["ids"])
        for limit in range(max(length - 2, 1), length + 3 if free["reason"] == "stop" else length):
            answer, usage = both(server, COMPLETION, **fields, max_tokens=limit)
            assert answer["ids"] == free["ids"][:limit]
            assert usage["completion_tokens"] == min(limit, length)
            assert answer["reason"] == ("stop" if limit >= length and free["reason"] == "stop" else "length")
        assert (free["ids"][-1] == EOS) == (free["reason"] == "stop")


def test_a_seed_names_the_sample(server):
    """Alone, beside others with seeds and without, and twice at once; a choice more does not change the first."""
    body = {"prompt": "é", "seed": 5, "max_tokens": 30, "return_token_ids": True}
    alone = whole(server.ask(COMPLETION, **body))
    mates = [{"prompt": text, "max_tokens": 25, "temperature": t} for text, t in (("a", 0), ("é", 1), ("你", 1.5))]
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(server.ask, COMPLETION, **its) for its in [body, *mates, body]]
        answers = [answer.result() for answer in answers]
    assert whole(answers[0]) == whole(answers[-1]) == alone
    three = server.ask(COMPLETION, **body | {"n": 3})
    assert whole(three) == alone
    assert len({tuple(whole(three, index)["ids"]) for index in range(3)}) == 3
    assert [whole(server.ask(COMPLETION, **body | {"n": 3}), index) for index in range(3)] == [
        whole(three, index) for index in range(3)
    ]
    assert whole(server.ask(COMPLETION, **body | {"seed": 6})) != alone
    negative = [whole(server.ask(COMPLETION, **body | {"seed": -6}))["ids"] for _ in range(2)]
    assert negative[0] == negative[1] != alone["ids"]


def test_samples_without_a_seed_differ(server):
    texts = {whole(server.ask(COMPLETION, prompt="a", max_tokens=30))["text"] for _ in range(4)}
    assert len(texts) > 1
    answer = server.ask(COMPLETION, prompt="a", max_tokens=30, n=3)
    assert len({whole(answer, index)["text"] for index in range(3)}) > 1


def test_answers_of_all_kinds_at_once_are_those_of_each_alone(server):
    bodies = [
        {"prompt": "a", "temperature": 0},
        {"prompt": "é", "seed": 1, "top_p": 0.8, "logprobs": 2},
        {"prompt": "你", "seed": 2, "presence_penalty": 1.2, "frequency_penalty": 0.4, "stop": ["a"]},
        {"prompt": ids_of("😀"), "seed": 3, "repetition_penalty": 1.3, "top_k": 5, "n": 2},
        {"prompt": "a\n", "temperature": 0, "logprobs": 0, "apar": {"fork": "off"}},
        {"prompt": " ", "seed": 4, "min_p": 0.1, "apar": {"max_threads": 1}},
    ]
    bodies = [body | {"max_tokens": 30, "return_token_ids": True} for body in bodies]
    alone = [server.ask(COMPLETION, **body)["choices"] for body in bodies]
    with ThreadPoolExecutor(len(bodies) * 2) as pool:
        answers = [pool.submit(server.ask, COMPLETION, **body) for body in bodies * 2]
        assert [answer.result()["choices"] for answer in answers] == alone * 2


def test_logprobs_are_the_models_own(server):
    prompt = ids_of("a é")
    fields = {"prompt": prompt, "temperature": 0, "max_tokens": 5, "apar": {"fork": False}, "return_token_ids": True}
    answer = server.ask(COMPLETION, **fields, logprobs=3)
    ids, told = whole(answer)["ids"], answer["choices"][0]["logprobs"]
    with torch.no_grad():
        logits = server.apar.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    expected = logits.double().log_softmax(-1)
    own = expected.gather(1, torch.tensor(ids)[:, None])[:, 0]
    assert torch.allclose(torch.tensor(told["token_logprobs"]).double(), own, atol=1e-4)
    for row, top in zip(expected, told["top_logprobs"], strict=True):
        values = sorted(top.values(), reverse=True)[:3]
        assert torch.allclose(torch.tensor(values).double(), row.topk(3).values, atol=1e-4)


def test_tokens_of_logprobs_spell_the_text(server):
    fields = {"temperature": 0, "max_tokens": 40, "return_token_ids": True}
    answer, _ = both(server, CHAT, messages=QUESTION, logprobs=True, top_logprobs=1, **fields)
    spelled = b"".join(bytes(entry["bytes"]) for entry in answer["told"] if not entry["token"].startswith("<|"))
    assert spelled.decode("utf-8", "replace") == answer["text"]
    assert any(entry["token"].startswith("\\x") for entry in answer["told"])  # parts of characters
    answer, _ = both(server, COMPLETION, prompt="a", logprobs=1, echo=False, **fields)
    for (name, value, top, offset), token in zip(answer["told"], answer["ids"], strict=True):
        assert top[name] == value <= 0
        if len(name) == 1 and token != EOS:
            assert answer["text"][offset] == name
