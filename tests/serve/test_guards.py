"""What every request passes: keys, origins, lengths, ids, and the log."""

import asyncio
import json
import logging
import re
import socket

import pytest

from medusa_apar import __version__
from medusa_apar.serve import guards
from medusa_apar.serve.guards import PageGuard, needs_key
from medusa_apar.serve.options import ServeOptions
from tests.support.serving import SECONDS, running, sent, tiny_apar, wait_until

PROMPT = [7, 8, 9, 10]
KEYS = ("first-key", "second-key")
ORIGIN = "https://chat.example.org"


@pytest.fixture(scope="module")
def server():
    apar = tiny_apar()
    with running(lambda: apar, api_keys=KEYS, cors_origins=(ORIGIN,), max_body_bytes=2000) as server:
        yield server


@pytest.fixture
def client(server):
    with server.client(headers={"Authorization": f"Bearer {KEYS[0]}"}) as client:
        yield client


@pytest.fixture
def stranger(server):
    with server.client() as client:
        yield client


def routes_of(app):
    """Every path and method, those of included routers and of mounted applications too."""
    for route in app.routes:
        path = re.sub(r"{[^}]*}", "x", getattr(route, "path", ""))
        if hasattr(route, "methods"):
            yield from ((path or "/", method) for method in route.methods)
        else:
            inside = route.original_router if hasattr(route, "original_router") else route.app
            yield from ((path + inner, method) for inner, method in routes_of(inside))


def test_every_route_but_health_and_the_page_needs_a_key(server, stranger, client):
    """vLLM guards its routes by a list of prefixes, which leaves holes."""
    routes = list(routes_of(server.server.config.app))
    assert {"/v1/tokens", "/metrics", "/version", "/openapi.json", "/health"} <= {path for path, _ in routes}
    for path, method in [*routes, ("/nothing/there", "GET"), ("/health/", "GET"), ("/PAGE/x", "GET")]:
        status = stranger.request(method, path).status_code
        assert (status == 401) == needs_key(path), (method, path)
        assert client.request(method, path).status_code != 401
    assert [path for path, _ in routes if not needs_key(path)].count("/health") == 2
    assert all(path in ("/", "/health") or path.startswith("/page/") for path, _ in routes if not needs_key(path))


@pytest.mark.parametrize("sent", ["", "Bearer", "Bearer first", "Bearer first-keys", "Basic first-key", "first-key"])
def test_a_wrong_key_is_refused(stranger, sent):
    refused = stranger.get("/version", headers={"Authorization": sent})
    assert refused.status_code == 401 and refused.headers["WWW-Authenticate"] == "Bearer"
    assert refused.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens(stranger, key):
    assert stranger.get("/version", headers={"Authorization": f"bearer {key}"}).json()["version"] == __version__


def test_a_preflight_needs_no_key_and_another_origin_may_not_ask(stranger):
    def preflight(origin):
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        return stranger.options("/v1/tokens", headers={"Origin": origin} | asked)

    allowed = preflight(ORIGIN)
    assert allowed.status_code == 200 and allowed.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert "authorization" in allowed.headers["Access-Control-Allow-Headers"].lower()
    assert "Access-Control-Allow-Origin" not in preflight("https://elsewhere.example.org").headers
    refused = stranger.get("/version", headers={"Origin": ORIGIN})  # which the page is to read too
    assert refused.status_code == 401 and refused.headers["Access-Control-Allow-Origin"] == ORIGIN


def test_without_the_option_no_origin_may_ask():
    apar = tiny_apar()
    with running(lambda: apar) as server, server.client() as client:
        assert "Access-Control-Allow-Origin" not in client.get("/version", headers={"Origin": ORIGIN}).headers


OWN = "http://127.0.0.1:8000"
TLS = {"Origin": "https://chat.example.org", "Host": "chat.example.org"}


@pytest.mark.parametrize(
    ("allowed", "headers", "may"),
    [
        ((), {}, True),
        ((), {"Host": "apar:8000"}, True),  # a container's name, and no browser
        ((), {"Origin": OWN, "Host": "127.0.0.1:8000"}, True),
        ((), {"Origin": "http://[::1]:8000", "Host": "[::1]:8000"}, True),
        ((), {"Origin": "http://localhost:8000", "Host": "localhost:8000"}, True),
        ((), TLS, True),
        ((), TLS | {"Host": "127.0.0.1:8000", "Sec-Fetch-Site": "same-origin"}, True),  # a proxy with a Host of its own
        (("http://chat.lan",), {"Origin": "http://chat.lan", "Host": "chat.lan"}, True),
        (("*",), {"Origin": ORIGIN}, True),
        ((), {"Origin": ORIGIN}, False),
        ((), {"Origin": "null"}, False),
        ((), {"Origin": "http://127.0.0.1:3000", "Host": "127.0.0.1:8000", "Sec-Fetch-Site": "same-site"}, False),
        ((), {"Origin": "http://evil.example:8000", "Host": "evil.example:8000"}, False),  # DNS rebinding
        ((), {"Origin": "http://[", "Host": "["}, False),
    ],
)
def test_only_pages_of_its_own_may_ask_a_server_without_a_key(allowed, headers, may):
    passed = []

    async def route(scope, receive, send):
        passed.append(scope)

    async def send(message):
        assert message.get("status", 403) == 403

    lines = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "path": "/v1/tokens", "headers": lines}
    asyncio.run(PageGuard(route, ServeOptions(cors_origins=allowed))(scope, None, send))
    assert bool(passed) == may
    asyncio.run(PageGuard(route, ServeOptions(cors_origins=allowed, api_keys=KEYS))(scope, None, send))
    assert len(passed) == 1 + may  # a key says enough


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "text/json"])
def test_a_body_that_does_not_say_that_it_is_json_is_refused(client, kind):
    refused = client.post("/v1/tokens", content=b"{}", headers={"Content-Type": kind} if kind else {})
    assert refused.status_code == 415 and "'Content-Type: application/json'" in refused.json()["error"]["message"]
    named = client.post("/v1/tokens", content=b"{}", headers={"Content-Type": "Application/JSON; charset=utf-8"})
    assert named.json()["error"]["param"] == "prompt"


def test_a_body_that_does_not_come_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(guards, "_BODY_SECONDS", 0.05)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS[0]}\r\n"
    with socket.create_connection(("127.0.0.1", server.port), SECONDS) as slow:
        slow.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{{".encode())
        answer = b"".join(iter(lambda: slow.recv(1 << 16), b""))  # to its end: the connection is closed
    assert answer.startswith(b"HTTP/1.1 408") and b"within 0.05 seconds" in answer


def test_a_stream_whose_client_goes_is_logged_so(server, caplog, monkeypatch):
    log = logging.getLogger("medusa_apar.access")
    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level(logging.INFO, log.name):
        headers = f"Authorization: Bearer {KEYS[0]}\r\n"
        for number, limit in enumerate((200, 5)):
            with sent(server, PROMPT, headers, stream=True, max_tokens=limit, pause=0.002) as client:
                said = client.recv(100)
                while limit == 5 and not said.endswith(b"\r\n0\r\n\r\n"):
                    said += client.recv(100)
            wait_until(lambda number=number: len(caplog.records) > number)
    assert [json.loads(record.getMessage())["status"] for record in caplog.records] == [499, 200]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_long_is_refused(client, chunked):
    body = json.dumps({"prompt": PROMPT, "max_tokens": 1}).encode()
    pieces = [body, *([b" " * 500] * 20)]
    json_type = {"Content-Type": "application/json"}
    refused = client.post("/v1/tokens", content=iter(pieces) if chunked else b"".join(pieces), headers=json_type)
    assert refused.status_code == 413 and "2000 bytes" in refused.json()["error"]["message"]
    fits = [body, b" " * (2000 - len(body))]
    taken = client.post("/v1/tokens", content=iter(fits) if chunked else b"".join(fits), headers=json_type)
    assert taken.status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [(b"{", None), (b"\xff", None), (b"[" * 1900, None), (b"{}", "prompt"), (b'{"prompt": [7, "x"]}', "prompt.1")],
)
def test_a_body_that_is_none_is_a_400_that_names_the_field(client, body, param):
    refused = client.post("/v1/tokens", content=body, headers={"Content-Type": "application/json"})
    error = refused.json()["error"]
    assert (refused.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("GET", "/v1/tokens", 405)])
def test_what_is_not_there_is_said_in_the_same_shape(client, method, path, status):
    refused = client.request(method, path)
    assert refused.status_code == status and path in refused.json()["error"]["message"]


def test_ids_are_echoed_or_made(client):
    assert client.get("/version", headers={"X-Request-Id": "mine-1"}).headers["X-Request-Id"] == "mine-1"
    made = [
        client.get("/version", headers={"X-Request-Id": bad}).headers["X-Request-Id"] for bad in ("", "a b", "x" * 129)
    ]
    assert len(set(made)) == 3 and all(re.fullmatch("[0-9a-f]{32}", id) for id in made)


def test_the_log_has_a_line_a_request_and_nothing_of_what_was_said(client, stranger, caplog, monkeypatch):
    log = logging.getLogger("medusa_apar.access")
    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level(logging.INFO, log.name):
        ids = client.post("/v1/tokens", json={"prompt": PROMPT}, headers={"X-Request-Id": "logged"}).json()["token_ids"]
        wait_until(lambda: caplog.records)  # the line follows the answer
        stranger.get("/v1/tokens?key=secret", headers={"Authorization": "Bearer wrong-secret"})
        wait_until(lambda: len(caplog.records) == 2)
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == log.name]
    answered, refused = lines
    assert list(answered) == ["time", "id", "method", "path", "status", "ms", "prompt_tokens", "answer_tokens"]
    assert answered["id"] == "logged" and answered["ms"] > 0
    assert [answered[name] for name in ("method", "path", "status")] == ["POST", "/v1/tokens", 200]
    assert [answered["prompt_tokens"], answered["answer_tokens"]] == [len(PROMPT), len(ids)]
    assert (refused["path"], refused["status"], refused["answer_tokens"]) == ("/v1/tokens", 401, 0)
    assert "secret" not in caplog.text and str(PROMPT[1:]) not in caplog.text and KEYS[0] not in caplog.text


def test_the_openai_client_is_told_what_it_understands(server):
    import openai

    wrong = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="asks for an API key"):
        wrong.models.list()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"api_keys": ("",)}, "an API key is empty"),
        ({"api_keys": ("a b",)}, "an API key is empty, or holds spaces"),
        ({"port": 65536}, "port is 65536"),
        ({"max_body_bytes": 0}, "max_body_bytes is 0, must be 1 or more"),
        ({"shutdown_timeout": float("nan")}, "shutdown_timeout is nan"),
        ({"max_queue": -1}, "max_waiting is -1"),
    ],
)
def test_options_that_cannot_be_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        ServeOptions(**options)
