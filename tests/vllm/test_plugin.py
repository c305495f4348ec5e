"""The endpoint plugin on vLLM's own server: threads on a route of ours, and its own routes as they were."""

import sys

import httpx
import pytest

from medusa_apar.eval.serve_servers import HOST, Launch, running
from tests.support.serving import PLAIN


@pytest.fixture(scope="module")
def server(merged, answers, tmp_path_factory):
    command = (
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(merged)),
        *("--host", HOST, "--port", "{port}", "--served-model-name", "apar", "--dtype", "float32"),
        *("--enforce-eager", "--block-size", "32", "--max-model-len", "512", "--scheduling-policy", "priority"),
    )
    log = tmp_path_factory.mktemp("server") / "log"
    plugins = {"VLLM_PLUGINS": "medusa_apar"}
    with running(Launch("vllm", "vLLM's own", "float32", log, command, plugins, pooled=True)) as its:
        yield its


def ask(server, path, answer, **more):
    messages = [{"role": "user", "content": answer.question}]
    body = {"model": server.model, "messages": messages, "temperature": 0, "max_tokens": 96, **more}
    said = httpx.post(f"{server.url}{path}", json=body, timeout=120, **PLAIN)
    assert said.status_code == 200, said.text
    return said.json()["choices"][0]


def test_threads_on_a_route_of_their_own(server, answers):
    assert ask(server, "/v1/apar/chat/completions", answers[0])["message"]["content"] == answers[0].text


def test_vllms_own_route_is_untouched(server, answers):
    """It writes one thread, control tokens and all, and still takes what vLLM alone knows."""
    answer = answers[0]
    its = ask(server, "/v1/chat/completions", answer, return_token_ids=True)
    assert len(its["token_ids"]) <= 96
    assert its["token_ids"] != answer.text_ids and answer.options.rule.fork_id in its["token_ids"]
