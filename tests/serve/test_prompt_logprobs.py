"""What the model says of the tokens of an echoed prompt: how evaluations ask which of several texts is likelier."""

import pytest
import torch

from medusa_apar.serve import translate
from tests.support.bytes_writer import ids_of
from tests.support.openai_answers import COMPLETION, byte_server, chunks_of, put_together, whole

TEXTS = ["a 你", "é", "a", "\n😀aé a a"]
PLAIN = {"echo": True, "temperature": 0}


@pytest.fixture(scope="module")
def server(engine):
    with byte_server(seed=3, engine=engine) as server:
        yield server


def plain(server, ids):
    """float32 [tokens - 1, vocabulary], by plain torch: the distribution of each token but the first."""
    with torch.no_grad():
        return server.apar.model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)


def check(server, logprobs, ids, most):
    """The first tokens of an answer's log-probabilities are those of the prompt."""
    expected = plain(server, ids)
    values, tops = logprobs["token_logprobs"][: len(ids)], logprobs["top_logprobs"][: len(ids)]
    assert values[0] is tops[0] is None
    for row, (value, top) in enumerate(zip(values[1:], tops[1:], strict=True)):
        assert value == pytest.approx(float(expected[row, ids[row + 1]]), abs=1e-4)
        likeliest = expected[row].topk(most).values.tolist()
        assert sorted(top.values(), reverse=True)[:most] == pytest.approx(likeliest, abs=1e-4)
        # As evaluations look whether a greedy choice would have been the token: the very same number is the largest.
        assert (value == max(top.values())) == (int(expected[row].argmax()) == ids[row + 1])


@pytest.mark.parametrize("limit", [0, 1, 12])
def test_they_are_those_of_a_plain_pass(server, limit):
    prompts = [TEXTS[0], ids_of(TEXTS[1]), *TEXTS[2:]]
    for prompt, text in zip(prompts, TEXTS, strict=True):
        body = {**PLAIN, "prompt": prompt, "max_tokens": limit, "logprobs": 2, "return_token_ids": True}
        answer = server.ask(COMPLETION, **body)
        assert put_together(server.chunks(COMPLETION, **body)) == whole(answer)
        ids, its, logprobs = ids_of(text), whole(answer), answer["choices"][0]["logprobs"]
        assert len(logprobs["tokens"]) == len(ids) + len(its["ids"]) and len(its["ids"]) <= limit
        check(server, logprobs, ids, 2)
        without = {**body, "echo": False, "max_tokens": max(limit, 1)}
        if limit:  # what is written behind is what is written without
            behind = server.ask(COMPLETION, **without)["choices"][0]
            assert its["text"] == text + behind["text"] and its["ids"] == behind["token_ids"]
            assert logprobs["token_logprobs"][len(ids) :] == behind["logprobs"]["token_logprobs"]
            offsets = [len(text) + offset for offset in behind["logprobs"]["text_offset"]]
            assert logprobs["text_offset"][len(ids) :] == offsets
        whole_before = [len(text.encode()[:token].decode(errors="ignore")) for token in range(len(ids))]
        assert logprobs["text_offset"][: len(ids)] == whole_before  # a token is a byte
        usage = answer["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(ids), len(its["ids"]))
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0


@pytest.mark.parametrize("stream", [True, False])
def test_many_prompts_and_choices_each_have_their_own(server, stream):
    """As evaluations send them: ids, a token more than is looked at."""
    prompts = list(map(ids_of, TEXTS))
    body = {**PLAIN, "prompt": prompts, "n": 2, "seed": 1234, "max_tokens": 1, "logprobs": 1, "stream": stream}
    response = server.client.post(COMPLETION, json=body)
    for index in range(8):
        if stream:
            its = put_together(chunks_of(response.content.decode()), index)
            values = [value for _, value, *_ in its["told"]]
        else:
            its = whole(response.json(), index)
            values = response.json()["choices"][index]["logprobs"]["token_logprobs"]
        ids = prompts[index // 2]
        expected = plain(server, ids)[range(len(ids) - 1), ids[1:]].tolist()
        assert values[0] is None and len(values) == len(ids) + 1 and its["text"].startswith(TEXTS[index // 2])
        assert values[1:-1] == pytest.approx(expected, abs=1e-4)


def test_they_are_the_same_in_a_small_pool_and_beside_others():
    with byte_server(seed=3, pool_slots=90, max_requests=2) as small, byte_server(seed=3) as large:
        body = {**PLAIN, "prompt": ["aé你 " * 4, "é" * 15, "a" * 20], "max_tokens": 2, "logprobs": 3}
        assert small.ask(COMPLETION, **body)["choices"] == large.ask(COMPLETION, **body)["choices"]
        small.its.wait_until_idle()


def test_more_answers_than_places_are_refused_and_what_fits_is_not(monkeypatch):
    """A prompt that is scored first takes no second place."""
    with byte_server(seed=3, max_requests=1, max_queue=2) as server:
        body = {**PLAIN, "max_tokens": 1, "logprobs": 0}
        assert len(server.ask(COMPLETION, **body, prompt=["aé"] * 3)["choices"]) == 3
        assert "at most" in server.refusal(COMPLETION, body | {"prompt": ["aé"] * 4})["message"]
        monkeypatch.setattr(translate, "_MOST_TOLD", 23)
        error = server.refusal(COMPLETION, body | {"prompt": "a" * 6, "n": 2, "logprobs": 1})
        assert error["param"] == "logprobs" and "24 log-probabilities" in error["message"]
        assert server.ask(COMPLETION, **body | {"prompt": "a" * 6, "n": 2, "logprobs": 0})
