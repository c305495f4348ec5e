"""What a request may ask of the chooser, over HTTP; tools, formats, and what is read from the cache."""

import json
from contextlib import contextmanager

import pytest

from tests.support.bytes_writer import LETTERS, ids_of
from tests.support.models import EOS
from tests.support.openai_answers import CHAT, COMPLETION, QUESTION, byte_server, put_together, whole

(A,) = ids_of("a")
PLAIN = {"prompt": "é", "temperature": 0, "max_tokens": 30, "return_token_ids": True, "apar": {"fork": False}}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}, "é": {"enum": ["你", "😀"]}},
    "required": ["a", "é"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "flag", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def server(engine):
    with byte_server(seed=3, engine=engine) as server:
        yield server


def test_a_bias_chooses(server):
    answer = whole(server.ask(COMPLETION, **PLAIN, logit_bias={str(A): 100}))
    assert answer["text"] == "a" * 30 and answer["reason"] == "length"
    banned = whole(server.ask(COMPLETION, **PLAIN | {"logit_bias": {str(id): -100 for id in ids_of("aé你")}}))
    assert not set(banned["ids"]) & set(ids_of("aé你"))


@pytest.mark.parametrize("least", [1, 5])
def test_an_end_waits_for_the_least_tokens(server, least):
    """The end token would always be chosen; in a text that has enough tokens it is."""
    ended = {**PLAIN, "logit_bias": {str(EOS): 100}}
    assert whole(server.ask(COMPLETION, **ended))["ids"] == [EOS]
    answer = server.ask(COMPLETION, **ended, min_tokens=least)
    assert whole(answer)["ids"].index(EOS) == least and whole(answer)["reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == least + 1
    ignoring = whole(server.ask(COMPLETION, **ended, ignore_eos=True))
    assert ignoring["ids"] == [EOS] * 30 and (ignoring["text"], ignoring["reason"]) == ("", "length")
    refused = server.refusal(COMPLETION, ended | {"min_tokens": 31})
    assert refused["param"] == "min_tokens" and "31" in refused["message"]


def test_a_stop_token_is_no_part_of_the_answer(server):
    free = whole(server.ask(COMPLETION, **PLAIN))
    mark = free["ids"][12]
    place = free["ids"].index(mark)
    fields = PLAIN | {"stop_token_ids": [mark]}
    answer = server.ask(COMPLETION, **fields)
    stopped = whole(answer)
    assert stopped["ids"] == free["ids"][:place] and stopped["reason"] == "stop"
    assert stopped["text"] == server.decode(stopped["ids"]) and answer["usage"]["completion_tokens"] == place
    assert put_together(server.chunks(COMPLETION, **fields)) == stopped


def test_stop_strings_wait_for_the_least_tokens(server):
    free = whole(server.ask(COMPLETION, **PLAIN))
    fields = PLAIN | {"stop": [free["text"][0]]}
    assert whole(server.ask(COMPLETION, **fields))["text"] == ""
    late, free = (whole(server.ask(COMPLETION, **its, min_tokens=10)) for its in (fields, PLAIN))
    assert len(late["ids"]) > 10 and late["ids"] == free["ids"][: len(late["ids"])]
    assert late["reason"] == "length" or free["text"].startswith(late["text"] + free["text"][0])


def test_penalties_that_vllm_would_forget_are_refused(server, engine):
    """It is asked anew where it has written a stop token too early, and counts what was written before no more."""
    fields = PLAIN | {"min_tokens": 5, "ignore_eos": True, "stop_token_ids": [A], "presence_penalty": 0.5}
    if engine == "native":
        assert len(whole(server.ask(COMPLETION, **fields))["ids"]) >= 5
    else:
        said = server.refusal(COMPLETION, fields)["message"]
        assert "min_tokens with ignore_eos and stop_token_ids beside presence_penalty" in said
    for name in ("min_tokens", "ignore_eos", "stop_token_ids", "presence_penalty"):
        assert whole(server.ask(COMPLETION, **{field: fields[field] for field in fields if field != name}))["ids"]


@pytest.mark.parametrize("asked", [{"type": "json_object"}, FORMAT, {"type": "text"}], ids=lambda asked: asked["type"])
@pytest.mark.parametrize("temperature", [0, 1])
def test_formats(server, asked, temperature):
    fields = {
        "messages": QUESTION,
        "response_format": asked,
        "temperature": temperature,
        "seed": 2,
        "max_tokens": 20 if asked["type"] == "text" else 300,
    }
    answer = server.ask(CHAT, **fields)
    assert put_together(server.chunks(CHAT, **fields)) == whole(answer)
    text, reason = whole(answer)["text"], whole(answer)["reason"]
    if asked["type"] == "text":
        assert text == whole(server.ask(CHAT, **fields | {"response_format": None}))["text"]
    elif reason == "stop":
        assert isinstance(json.loads(text), dict)
    else:
        assert text.lstrip().startswith("{")
    if asked is FORMAT:
        assert reason == "stop" and set(json.loads(text)) == {"a", "é"}


def test_a_schema_that_is_not_understood_is_refused(server):
    wrong = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "objekt"}}}
    error = server.refusal(CHAT, {"messages": QUESTION, "response_format": wrong})
    assert "schema" in error["message"]
    error = server.refusal(CHAT, {"messages": QUESTION, "response_format": {"type": "json_object"}, "ignore_eos": True})
    assert "ignore_eos" in error["message"]
    assert server.ask(COMPLETION, prompt=LETTERS, max_tokens=1)


@contextmanager
def template(server, text):
    before, server.tokenizer.chat_template = server.tokenizer.chat_template, text
    try:
        yield
    finally:
        server.tokenizer.chat_template = before


def test_tools_where_the_template_knows_them(server):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    called = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "c", "content": "2"},
    ]
    fields = {"max_tokens": 2, "return_token_ids": True, "messages": messages}
    assert server.refusal(CHAT, fields)["param"] == "messages"
    with template(
        server,
        "{% if tools %}{{ tools[0].function.name }};{% endif %}{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls %}{{ c.function.arguments.x }}{% endfor %};{% endfor %}",
    ):
        prompts = [
            server.decode(server.ask(CHAT, **fields, **more)["choices"][0]["prompt_token_ids"])
            for more in ({"tools": [tool]}, {"tools": [tool], "tool_choice": "none"}, {})
        ]
        bare = "user:aé?;assistant:1;tool:2;"
        assert prompts == [f"f;{bare}", bare, bare]
        called["function"]["arguments"] = "[1]"
        error = server.refusal(CHAT, fields)
        assert error["param"] == "messages[1].tool_calls[0].function.arguments"


def test_a_template_that_refuses_is_quoted(server):
    with template(server, "{{ raise_exception('roles must alternate') }}"):
        error = server.refusal(CHAT, {"messages": QUESTION})
    assert error["param"] == "messages" and "roles must alternate" in error["message"]


def test_what_was_read_before_is_counted_within_a_salt():
    """By default clients with different keys share nothing; what a hit brings is what reading it would have brought."""
    with byte_server(seed=3, api_keys=("one", "two")) as server:

        def ask(key, **more):
            server.client.headers["Authorization"] = f"Bearer {key}"
            answer = server.ask(COMPLETION, **PLAIN | {"prompt": "aé你😀" * 3, **more})
            return whole(answer), answer["usage"]["prompt_tokens_details"]["cached_tokens"]

        cold, nothing = ask("one")
        warm, cached = ask("one")
        assert nothing == 0 < cached < 30 and warm == cold
        assert ask("two") == (cold, 0)
        assert ask("two", cache_salt="ours") == (cold, 0)
        assert ask("one", cache_salt="ours") == (cold, cached)
