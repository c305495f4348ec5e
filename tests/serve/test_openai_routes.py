"""The API's shapes, and what it refuses: every field is honoured or answered with 400 and its name.

Rows of the field's bugs that are looked for here: ids that no model has (vllm#54195), empty prompts (vllm#7283), huge
and missing limits (vllm#1543), refusals without an answer and fields without effect (mini-sglang), usage that is
misplaced (llama.cpp PR 15444).
"""

import json

import httpx
import openai
import pytest

from medusa_apar.engine.counting import Counting
from tests.support.bytes_writer import ids_of
from tests.support.openai_answers import CHAT, COMPLETION, QUESTION, byte_server, chunks_of, put_together, whole

VOCABULARY = 261
CONTEXT = 512


@pytest.fixture(scope="module")
def server(engine):
    with byte_server(seed=3, engine=engine) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with official(server) as client:
        yield client


def official(server):
    return openai.OpenAI(base_url=f"{server.its.url}/v1", api_key="x", max_retries=0)


CHATS = [
    ({"frobnicate": 1}, "frobnicate", "is not a field"),
    ({"messages": None}, "messages", "should be a valid list|should be a valid array"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": "hello"}, "messages", "should be a valid"),
    ({"messages": [{"role": "user"}]}, "messages[0]", "has no content"),
    ({"messages": [{"role": "ape", "content": "a"}]}, "messages[0].role", "'user'"),
    ({"messages": [{"content": "a"}]}, "messages[0].role", "is missing"),
    ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content", "must be a text"),
    ({"messages": [{"role": "user", "content": "a\0b"}]}, "messages[0].content", "null character"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content", "text"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "must be a text"),
    ({"messages": [{"role": "user", "content": "a", "mood": "good"}]}, "messages[0].mood", "is not a field"),
    ({"messages": [{"role": "user", "content": "a", "refusal": "no"}]}, "messages[0].refusal", "not supported"),
    ({"messages": QUESTION * 200}, None, f"context has {CONTEXT} tokens"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 10**9}, "max_tokens", f"context has {CONTEXT} tokens"),
    ({"max_tokens": 10**30}, "max_tokens", "less than"),
    ({"max_tokens": "9"}, "max_tokens", "valid integer"),
    ({"max_tokens": 2.5}, "max_tokens", "integer"),
    ({"max_tokens": True}, "max_tokens", "integer"),
    ({"max_completion_tokens": CONTEXT}, "max_completion_tokens", f"context has {CONTEXT} tokens"),
    ({"max_completion_tokens": 4, "max_tokens": 5}, "max_tokens", "differ"),
    ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
    ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
    ({"temperature": "1"}, "temperature", "valid number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_p": 1.01}, "top_p", "less than or equal to 1"),
    ({"top_k": -2}, "top_k", "greater than or equal to -1"),
    ({"min_p": 1.5}, "min_p", "less than or equal to 1"),
    ({"seed": 2**63}, "seed", "less than"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 129}, "n", "less than or equal to 128"),
    ({"stop": ""}, "stop", "empty string"),
    ({"stop": ["a", ""]}, "stop", "empty string"),
    ({"stop": [1]}, "stop", "list of strings"),
    ({"stop": ["a"] * 65}, "stop", "65 strings"),
    ({"stop": ["a", "b" * 1001]}, "stop", "1001 characters, at most 1000"),
    ({"stop_token_ids": [VOCABULARY]}, "stop_token_ids", f"from 0 to {VOCABULARY - 1}"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", f"from 0 to {VOCABULARY - 1}"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids[0]", "integer"),
    ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
    ({"frequency_penalty": -2.5}, "frequency_penalty", "greater than or equal to -2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "no token id"),
    ({"logit_bias": {str(VOCABULARY): 1}}, "logit_bias", f"from 0 to {VOCABULARY - 1}"),
    ({"logit_bias": {str(2**31): 1}}, "logit_bias", f"from 0 to {VOCABULARY - 1}"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", f"from 0 to {VOCABULARY - 1}"),
    ({"logit_bias": {str(id): 1 for id in range(1001)}}, "logit_bias", "1001 entries, at most 1000"),
    ({"logit_bias": {"7": 101}}, "logit_bias.7", "less than or equal to 100"),
    ({"logprobs": 3}, "logprobs", "valid boolean"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
    ({"stream": True, "stream_options": {"chunks": 3}}, "stream_options.chunks", "is not a field"),
    ({"stream": "yes"}, "stream", "valid boolean"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "'json_object'"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
    ({"response_format": {"type": "json_object"}, "apar": {"fork": "auto"}}, "apar.fork", "exclude"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "knows nothing"),
    ({"tool_choice": "auto"}, "tool_choice", "no tools"),
    ({"functions": []}, "functions", "deprecated"),
    ({"reasoning_effort": "low"}, "reasoning_effort", "not supported"),
    ({"modalities": ["text", "audio"]}, "modalities[1]", "'text'"),
    ({"store": True}, "store", "False"),
    ({"service_tier": "flex"}, "service_tier", "'auto'"),
    ({"apar": {"fork": "sometimes"}}, "apar.fork", "one of"),
    ({"apar": {"fork": 1}}, "apar.fork", "one of"),
    ({"apar": {"max_threads": 0}}, "apar.max_threads", "greater than or equal to 1"),
    ({"apar": {"acceptance": "lax"}}, "apar.acceptance", "'typical'"),
    ({"apar": {"lanes": 3}}, "apar.lanes", "is not a field"),
    ({"apar": {"\n": None}}, 'apar."\\n"', "is not a field"),  # a message is one line
    ({"a\u2028b\x00": 1}, '"a\\u2028b\\u0000"', "is not a field"),
    ({"apar": {"events": True}, "n": 2}, "apar", "one answer"),
    ({"min_tokens": -1}, "min_tokens", "greater than or equal to 0"),
    ({"best_of": 2}, "best_of", "is not a field"),
]
COMPLETIONS = [
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "not empty"),
    ({"prompt": [[]]}, "prompt", "empty"),
    ({"prompt": ["a", ""]}, "prompt", "empty"),
    ({"prompt": None}, "prompt", "must be a text"),
    ({"prompt": [1.5]}, "prompt", "must be a text"),
    ({"prompt": [True]}, "prompt", "must be a text"),
    ({"prompt": [[1], "a", 3]}, "prompt", "must be a text"),
    ({"prompt": [VOCABULARY]}, "prompt", f"vocabulary has ids from 0 to {VOCABULARY - 1}"),
    ({"prompt": [[7], [-1]]}, "prompt", "-1, but the model"),
    ({"prompt": [2**70]}, "prompt", "but the model's vocabulary has ids"),
    ({"prompt": "a\0"}, "prompt", "null character"),
    ({"prompt": "a" * CONTEXT}, None, f"the prompt has {CONTEXT}"),
    ({"prompt": "a" * 500, "max_tokens": 13}, "max_tokens", "513 together"),
    ({"max_tokens": 0}, "max_tokens", "echo=true"),
    ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
    ({"best_of": 2}, "best_of", "not n"),
    ({"suffix": "end"}, "suffix", "''"),
    ({"logprobs": True}, "logprobs", "valid integer"),
    ({"messages": QUESTION}, "messages", "is not a field"),
    ({"prompt": ["a"] * 43, "n": 3}, "n", "more than 128 answers"),
]


@pytest.mark.parametrize(("path", "changes", "param", "words"), [
    *((CHAT, *case) for case in CHATS), *((COMPLETION, *case) for case in COMPLETIONS)
])  # fmt: skip
def test_what_cannot_be_is_refused_by_name(server, path, changes, param, words):
    plain = {"messages": QUESTION} if path == CHAT else {"prompt": "a"}
    for stream in (False, True):
        error = server.refusal(path, plain | ({"stream": True} if stream else {}) | changes)
        assert error["param"] == param and error["type"] == "invalid_request_error"
        assert any(word in error["message"] for word in words.split("|")), error["message"]
        assert error["message"].endswith(".") and "\n" not in error["message"] and len(error["message"]) < 400


BODIES = {
    "nothing": b"",
    "no JSON": b'{"prompt": ',
    "no object": b"[1]",
    "no UTF-8": b'{"prompt": "\xff"}',
    "half a surrogate pair": b'{"prompt": "\\ud83d"}',
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "infinity": b'{"prompt": "a", "presence_penalty": -Infinity}',
    "beyond all floats": b'{"prompt": "a", "temperature": 1e999}',
    "deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a form": b"prompt=a&max_tokens=3",
    "a long name": b'{"prompt": "a", "' + b"x" * 50_000 + b'": 1}',
    "a long name within": b'{"prompt": "a", "logit_bias": {"' + b"x" * 50_000 + b'": "1"}}',
    "many unknown fields": b'{"prompt": "a"' + b"".join(b',"%d":1' % n for n in range(50_000)) + b"}",
    "many wrong ids": b'{"prompt": "a", "stop_token_ids": [' + b",".join([b'"x"'] * 50_000) + b"]}",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_bodies_that_are_none(server, body):
    error = server.refusal(COMPLETION, body)
    assert len(error["message"]) < 300 and "Traceback" not in error["message"]


@pytest.mark.parametrize("name", ["temperature", "presence_penalty"])
def test_numbers_that_are_none_are_named(server, name):
    error = server.refusal(COMPLETION, f'{{"prompt": "a", "{name}": NaN}}'.encode())
    assert error["param"] == name and "finite" in error["message"]


def test_fields_without_effect_on_the_answer_are_taken(server):
    plain = {"messages": QUESTION, "temperature": 0, "max_tokens": 9}
    without = {
        **{"user": "u", "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "k", "store": False},
        **{"prompt_cache_retention": "24h", "service_tier": "auto", "modalities": ["text"], "stop": None},
        **{
            "tools": None,
            "logit_bias": None,
            "seed": None,
            "n": None,
            "functions": None,
            "apar": None,
            "stream_options": None,
        },
    }
    assert whole(server.ask(CHAT, **plain, **without)) == whole(server.ask(CHAT, **plain))


def test_what_comes_back_from_a_client_is_taken(server):
    """Messages as the official client returns them, and content in parts."""
    said = {"role": "assistant", "content": "b", "refusal": None, "annotations": [], "audio": None, "tool_calls": None}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "s"}, *QUESTION, said, {"role": "user", "content": parts}]
    plain = [
        {"role": "system", "content": "s"}, *QUESTION,
        {"role": "assistant", "content": "b"}, {"role": "user", "content": "a\nb"},
    ]  # fmt: skip
    counted = server.ask("/tokenize", messages=messages)
    assert counted == server.ask("/tokenize", messages=plain) and counted["max_model_len"] == CONTEXT
    answer = server.ask(CHAT, messages=messages, temperature=0, max_tokens=9)
    assert answer["usage"]["prompt_tokens"] == counted["count"]


def test_a_missing_limit_is_what_the_api_says(server):
    """Sixteen tokens of a completion; of a chat as many as the context has room for, no end token being likely."""
    fields = {"temperature": 0, "apar": {"fork": False}}
    completion = server.ask(COMPLETION, prompt="a", **fields)
    assert completion["usage"]["completion_tokens"] == 16
    chat = server.ask(CHAT, messages=QUESTION, **fields)
    usage = chat["usage"]
    assert usage["total_tokens"] == CONTEXT if whole(chat)["reason"] == "length" else usage["total_tokens"] <= CONTEXT


def test_a_pool_without_room_is_told_with_its_numbers():
    with byte_server(seed=3, pool_slots=100) as server:
        error = server.refusal(COMPLETION, {"prompt": "a" * 20, "max_tokens": 60})
        assert "keeps 100 tokens" in error["message"] and "a prompt of 20" in error["message"]
        room = int(error["message"].split("an answer of ")[1].split(",")[0])
        assert server.ask(COMPLETION, prompt="a" * 20, max_tokens=room)["usage"]["completion_tokens"] <= room
        server.refusal(COMPLETION, {"prompt": "a" * 20, "max_tokens": room + 1})
        off = {"fork": False}
        assert server.ask(COMPLETION, prompt="a" * 20, max_tokens=80, apar=off)
        server.refusal(COMPLETION, {"prompt": "a" * 20, "max_tokens": 81, "apar": off})
        chat = server.ask(CHAT, messages=QUESTION, apar=off)  # as long as there is room
        assert chat["usage"]["total_tokens"] <= 100


def test_echo_and_prompts_of_all_kinds(server):
    fields = {"temperature": 0, "max_tokens": 6, "return_token_ids": True}
    alone = [whole(server.ask(COMPLETION, prompt=text, **fields)) for text in ("a", "é")]
    answer = server.ask(COMPLETION, prompt=["a", ids_of("é")], n=2, echo=True, **fields)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    for index in range(4):
        its, prompt = whole(answer, index), "aé"[index // 2]
        assert its["text"] == prompt + alone[index // 2]["text"] and its["ids"] == alone[index // 2]["ids"]
        assert answer["choices"][index]["prompt_token_ids"] == ids_of(prompt)
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == sum(len(whole(answer, index)["ids"]) for index in range(4))
    for prompt in ("a 你", ids_of("a 你")):
        nothing = server.ask(COMPLETION, prompt=prompt, echo=True, max_tokens=0)
        assert whole(nothing)["text"] == "a 你" and whole(nothing)["reason"] == "length"
        assert nothing["usage"]["completion_tokens"] == 0
        chunks = server.chunks(COMPLETION, prompt=prompt, echo=True, max_tokens=0)
        assert put_together(chunks) == whole(nothing)


def test_a_stream_is_this(server):
    """The very bytes, but for what differs from answer to answer."""
    fields = {"messages": QUESTION, "temperature": 0, "max_tokens": 3, "stream_options": {"include_usage": True}}
    lines = server.lines(CHAT, **fields)
    first, *_, last, done, empty = lines.split("\n\n")
    head = json.loads(first.removeprefix("data: "))
    assert head["id"].startswith("chatcmpl-") and head["object"] == "chat.completion.chunk" and head["model"] == "tiny"
    assert head["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    chunks = chunks_of(lines)
    assert {(chunk["id"], chunk["created"]) for chunk in chunks} == {(head["id"], head["created"])}
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-2]["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}]
    usage = json.loads(last.removeprefix("data: "))
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 3
    assert 0 <= usage["usage"]["prompt_tokens_details"]["cached_tokens"] < usage["usage"]["prompt_tokens"]
    assert (done, empty) == ("data: [DONE]", "")
    assert "usage" not in server.chunks(CHAT, **fields | {"stream_options": {}})[0]


def test_events_come_where_they_are_asked_for(server, monkeypatch):
    # What an engine has learned decides how far threads write on that nobody will read: here all of them do.
    monkeypatch.setattr("medusa_apar.engine.scheduler.worth", lambda likely, *_: len(likely))
    fields = {"messages": QUESTION, "seed": 1, "max_tokens": 40}
    assert all("apar" not in chunk for chunk in server.chunks(CHAT, **fields))
    assert "apar" not in server.ask(CHAT, **fields)
    watched = fields | {"apar": {"events": True}}
    answer, chunks = server.ask(CHAT, **watched), server.chunks(CHAT, **watched)
    assert put_together(chunks) == whole(answer) == whole(server.ask(CHAT, **fields))

    def told(events):
        """Without what differs from run to run: ids, times, and the step's rows."""
        kept = ("event", "thread", "parent", "token_ids", "reason", "texts")
        return [
            {name: event[name] for name in kept if name in event}
            for event in events
            if event["event"] in ("ThreadStarted", "TokensAccepted", "ThreadFinished")
        ]

    streamed = [event for chunk in chunks for event in chunk.get("apar", {}).get("events", [])]
    assert told(streamed) == told(answer["apar"]["events"])
    threads = [event for event in streamed if event["event"] == "ThreadStarted"]
    for stats in (answer["apar"]["stats"], chunks[-1]["apar"]["stats"]):
        assert stats["threads"] == len(threads) > 1 and stats["seconds"] > 0
        assert stats["tokens"] == answer["usage"]["completion_tokens"]
        assert stats["steps"] == sum(event["event"] == "StepFinished" for event in streamed)


def test_models_tokens_and_what_is_not_there(server):
    (card,) = server.client.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("tiny", "model", CONTEXT)
    assert server.client.get("/v1/models/tiny").json() == card
    assert server.client.get("/v1/models/a/b").status_code == 404
    counted = server.ask("/tokenize", prompt="a你", model="tiny", return_token_strs=True)
    assert counted["tokens"] == ids_of("a你") and counted["count"] == 4 == len(counted["token_strs"])
    assert server.ask("/detokenize", tokens=counted["tokens"])["prompt"] == "a你"
    assert server.ask("/detokenize", tokens=[2])["prompt"] == "<|im_end|>"
    assert server.refusal("/detokenize", {"tokens": [VOCABULARY]})["param"] == "tokens"
    server.refusal("/tokenize", {"prompt": "a", "messages": QUESTION})
    server.refusal("/tokenize", {})
    error = server.refusal("/v1/responses", {"input": "a"}, 404)
    assert "/v1/chat/completions" in error["message"]
    for path, body in ((CHAT, {"messages": QUESTION}), (COMPLETION, {"prompt": "a"}), ("/tokenize", {"prompt": "a"})):
        error = server.refusal(path, body | {"model": "gpt-9"}, 404)
        assert error["code"] == "model_not_found" and error["param"] == "model" and "'tiny'" in error["message"]


def test_the_official_client(client):
    plain = {"model": "tiny", "messages": QUESTION, "seed": 4, "max_tokens": 30}
    answer = client.chat.completions.create(**plain, logprobs=True, top_logprobs=1)
    message = answer.choices[0].message
    with client.chat.completions.create(**plain, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == message.content
    assert chunks[-2].choices[0].finish_reason == answer.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0  # the same question again
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
    back = client.chat.completions.create(**plain | {"messages": [*QUESTION, message.model_dump(), *QUESTION]})
    assert back.usage.prompt_tokens > answer.usage.prompt_tokens
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.BadRequestError, match="temperature should be") as refused:
        client.chat.completions.create(**plain, temperature=3)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.chat.completions.create(**plain | {"model": "other"})
    ours = client.completions.create(
        model="tiny", prompt=["a", "b"], n=2, max_tokens=5, logprobs=1, extra_body={"top_k": 3, "apar": {"fork": False}}
    )
    assert len(ours.choices) == 4 and len(ours.choices[0].logprobs.tokens) <= 5


def test_an_engine_that_breaks_in_the_middle_of_a_stream_says_so(monkeypatch):
    def broken(*_):
        raise LookupError("a step went wrong")

    with byte_server(seed=3) as server, official(server) as client:
        body = {"model": "tiny", "messages": QUESTION, "max_tokens": 400, "extra_body": {"apar": {"fork": False}}}
        stream = client.chat.completions.create(**body, temperature=0, stream=True)
        assert next(stream).choices[0].delta.role == "assistant"
        monkeypatch.setattr(Counting, "record_iteration", broken)
        with pytest.raises(openai.APIError, match="the engine has died"):
            list(stream)
        error = server.refusal(CHAT, {"messages": QUESTION}, 503)
        assert error["type"] == "service_unavailable_error"


def test_every_route_is_described(server):
    described = server.client.get("/openapi.json").json()
    for path in (CHAT, COMPLETION, "/tokenize", "/detokenize"):
        schema = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema["additionalProperties"] is False and "$ref" not in json.dumps(schema)


@pytest.mark.parametrize("prompt", [[2], [1, 2, 0], [3], [4, 3], " ", "\n", "<|im_end|>", "a" * (CONTEXT - 1)])
def test_prompts_at_the_edge_are_answered(server, prompt):
    """Nothing but special and control tokens, white space, and all that the context holds but one token."""
    usage = server.ask(COMPLETION, prompt=prompt)["usage"]
    assert 1 <= usage["completion_tokens"] <= min(16, CONTEXT - usage["prompt_tokens"])


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_on_several_choices_ends_them_all(server, stream):
    def written():
        return server.its.service.engine.stats().generated_tokens

    before, off = written(), {"fork": False}  # so that every token but the first few is a step of its own
    body = {"prompt": ["a", "é"], "n": 2, "max_tokens": 500, "ignore_eos": True, "stream": stream, "apar": off}
    if stream:
        with server.client.stream("POST", COMPLETION, json=body) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            server.client.post(COMPLETION, json=body, timeout=0.1)
    server.its.wait_until_idle()
    assert written() - before < 4 * 500
    assert server.ask(COMPLETION, prompt="a", max_tokens=1)
