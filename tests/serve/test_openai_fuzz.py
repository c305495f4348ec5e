"""Bodies that nobody would write: each is answered, or refused with a word, and the next one is served as ever."""

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medusa_apar.serve.schemas import Apar, ChatBody, CompletionBody, Message
from tests.support.openai_answers import CHAT, COMPLETION, QUESTION, byte_server

PLAIN = {CHAT: {"messages": QUESTION, "max_tokens": 3}, COMPLETION: {"prompt": "a", "max_tokens": 3}}
SCHEMAS = {CHAT: ChatBody, COMPLETION: CompletionBody}
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from([-1, 0, 1, 2, 260, 261, 2**31, 2**63, 2**70, 0.5, -0.0, 1e308, "auto", "off", "", "a", "text"]),
        st.floats(),
        st.text(max_size=4),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=5,
)
quickly = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def fields(schema):
    return st.dictionaries(st.sampled_from(sorted(schema.model_fields)), VALUES, min_size=1, max_size=2)


@pytest.fixture(scope="module")
def server(engine):
    with byte_server(seed=3, engine=engine, max_requests=4, max_queue=4) as server:
        yield server
        server.its.wait_until_idle()


@pytest.mark.parametrize("path", PLAIN)
@quickly
@given(st.data())
def test_any_values_in_any_fields(server, path, data):
    body = PLAIN[path] | data.draw(fields(SCHEMAS[path]))
    if data.draw(st.booleans()):
        body["apar"] = data.draw(fields(Apar))
    if path == CHAT and data.draw(st.booleans()):
        body["messages"] = [QUESTION[0] | data.draw(fields(Message))]
    response = server.client.post(path, content=json.dumps(body).encode("utf-8", "surrogatepass"))
    assert response.status_code in (200, 400, 404, 429), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 500
    elif body.get("stream"):
        assert response.content.endswith(b"data: [DONE]\n\n") and b'"error"' not in response.content
    else:
        assert response.json()["choices"]


def test_the_description_describes_what_is_taken(server):
    """What schemathesis makes of /openapi.json never breaks the server."""
    described = schemathesis.openapi.from_url(f"{server.its.url}/openapi.json")
    for path in (*PLAIN, "/tokenize", "/detokenize"):
        _ask_as_described(server, described[path]["POST"].as_strategy(), path)


def _ask_as_described(server, cases, path):
    @settings(quickly, max_examples=8)
    @given(cases)
    def ask(case):
        response = server.client.post(path, json=case.body)
        assert response.status_code in (200, 400, 404, 429), response.text

    ask()
