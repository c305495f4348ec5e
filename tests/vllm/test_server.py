"""`medusa-apar serve --engine vllm` as its users have it: a process, asked by OpenAI's client."""

import json
import re
import sys
import time

import httpx
import openai
import pytest

from medusa_apar.eval.serve_servers import HOST, Launch, running
from tests.support.serving import PLAIN

FLAGS = ("--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-model-len", "512", "--max-logprobs", "5")


@pytest.fixture(scope="module")
def server(merged, answers, tmp_path_factory):
    command = (sys.executable, "-m", "medusa_apar", "serve", "--engine", "vllm", "smollm2-135m", *FLAGS)
    log = tmp_path_factory.mktemp("server") / "log"
    where = ("--host", HOST, "--port", "{port}")
    with running(Launch("vllm", "ours over vLLM", "float32", log, (*command, *where), pooled=True)) as its:
        yield its


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, timeout=120) as client:
        yield client


def asked(server, answer, **more):
    messages = [{"role": "user", "content": answer.question}]
    return {"model": server.model, "messages": messages, "temperature": 0, "max_tokens": 96, **more}


def test_an_answer_is_the_native_one(server, client, answers):
    said = client.chat.completions.create(**asked(server, answers[0]))
    assert said.choices[0].message.content == answers[0].text
    usage = said.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(answers[0].prompt_ids), len(answers[0].text_ids))


def test_a_stream_is_the_native_answer(server, client, answers):
    with client.chat.completions.create(**asked(server, answers[1], stream=True)) as stream:
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == answers[1].text and len(list(filter(None, pieces))) > 10


def test_an_answer_is_the_json_that_was_asked_for(server, client, answers):
    properties = {"city": {"type": "string", "maxLength": 12}, "large": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": ["city", "large"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    said = client.chat.completions.create(**asked(server, answers[0], response_format=form))
    assert said.choices[0].finish_reason == "stop"
    assert set(json.loads(said.choices[0].message.content)) == {"city", "large"}


def test_what_vllm_refuses_is_said_before_anything_runs(server, client, answers):
    with pytest.raises(openai.BadRequestError, match="logprobs"):
        client.chat.completions.create(**asked(server, answers[0], logprobs=True, top_logprobs=20, stream=True))


def test_lists_fork_by_rule(server, client, listed):
    said = client.chat.completions.create(**asked(server, listed, extra_body={"apar": {"fork": "lists"}}))
    assert said.choices[0].message.content == listed.text


def test_a_client_that_leaves_leaves_nothing_running(server, client, answers):
    with client.chat.completions.create(**asked(server, answers[2], max_tokens=400, stream=True)) as stream:
        next(chunk for chunk in stream if chunk.choices and chunk.choices[0].delta.content)
        assert metric(server, "num_requests_running") == 1
    until = time.monotonic() + 20
    while metric(server, "num_requests_running") or metric(server, "threads_running"):
        assert time.monotonic() < until, "it still runs"
        time.sleep(0.1)
    said = client.chat.completions.create(**asked(server, answers[3]))
    assert said.choices[0].message.content == answers[3].text


def metric(server, name):
    page = httpx.get(f"{server.url}/metrics", timeout=30, **PLAIN).text
    (value,) = re.findall(rf"^\w+:{name}(?:{{.*}})? (.+)$", page, re.MULTILINE)
    return float(value)
