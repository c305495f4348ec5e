"""From loading to draining: what is answered when, and what a signal does."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from medusa_apar.serve import service as services
from medusa_apar.serve.app import create_app
from medusa_apar.serve.errors import ApiError
from medusa_apar.serve.options import ServeOptions
from medusa_apar.serve.server import serve
from medusa_apar.serve.service import Service
from tests.support.serving import PLAIN, SECONDS, running, sent, tiny_apar, wait_until

ROOT = Path(__file__).parents[2]
PROMPT = [7, 8, 9, 10]


@pytest.fixture(scope="module")
def apar():
    return tiny_apar()


def health(server):
    with server.client() as client:
        answer = client.get("/health")
    assert answer.status_code == (200 if answer.json()["status"] == "ready" else 503)
    return answer.json()["status"]


def test_requests_are_refused_until_the_model_is_there(apar):
    loaded = threading.Event()
    with running(lambda: loaded.wait(SECONDS) and apar, ready=False) as server:
        assert health(server) == "loading"
        refused = server.ask(PROMPT)
        assert refused.status_code == 503 and refused.headers["Retry-After"]
        assert "being loaded" in refused.json()["error"]["message"]
        loaded.set()
        wait_until(lambda: health(server) == "ready")
        assert server.service.engine.stats().steps  # the first has run
        assert server.ask(PROMPT).status_code == 200


def test_a_model_that_cannot_be_loaded_ends_the_server():
    def load():
        raise FileNotFoundError("no such model")

    with running(load, ready=False) as server:
        server.thread.join(SECONDS)
        assert not server.thread.is_alive()
        with pytest.raises(FileNotFoundError, match="no such model"):
            raise server.service.failure


def test_a_first_signal_lets_what_runs_come_to_its_end(apar):
    """vllm#24885, smg PR 1172: new requests are told, streams flow on, and then the server ends."""
    with running(lambda: apar) as server, server.client() as client, ThreadPoolExecutor() as pool:
        asked = {"prompt": PROMPT, "held": True, "max_tokens": 6, "stream": True}
        with client.stream("POST", "/v1/tokens", json=asked) as answer:
            lines = answer.iter_lines()
            assert json.loads(next(lines)) == []
            # Only now: one that came before it would hold the engine, which would not take the stream.
            plain = pool.submit(server.ask, PROMPT, held=True, max_tokens=6)
            wait_until(lambda: server.service.num_in_flight == 2)
            server.server.handle_exit(signal.SIGTERM, None)
            wait_until(lambda: health(server) == "draining")
            refused = server.ask(PROMPT)
            assert refused.status_code == 503 and "shutting down" in refused.json()["error"]["message"]
            server.hold.allowed.release(8)
            first = json.loads(next(lines))  # while the server drains
            assert first and server.thread.is_alive()
            server.hold.allowed.release(100)
            ids = first + sum(map(json.loads, lines), [])
        assert len(ids) == 6 and plain.result().json()["token_ids"] == ids
        server.thread.join(SECONDS)
        assert not server.thread.is_alive()
        with pytest.raises(httpx.ConnectError):
            server.ask(PROMPT)


def test_a_drain_ends_after_its_time(apar):
    with running(lambda: apar, shutdown_timeout=0.1) as server, ThreadPoolExecutor() as pool:
        cut = pool.submit(server.ask, PROMPT, pause=0.01, max_tokens=250)
        wait_until(lambda: server.service.engine.stats().running)
        server.server.handle_exit(signal.SIGTERM, None)
        assert cut.result().status_code == 503
        server.thread.join(SECONDS)
        assert not server.thread.is_alive()


def test_a_drain_waits_for_no_client_that_neither_reads_nor_sends(apar, monkeypatch):
    monkeypatch.setattr(services, "_GRACE", 0.05)
    with running(lambda: apar, shutdown_timeout=10 * SECONDS) as server:
        unread = sent(server, PROMPT, max_tokens=240, stream=True, padding=1 << 20, pause=1e-5)
        wait_until(lambda: server.service.engine.stats().running)
        unsent = socket.create_connection(("127.0.0.1", server.port), SECONDS)
        head = b"POST /v1/tokens HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        unsent.sendall(head + b"Content-Length: 9\r\n\r\n{")
        wait_until(lambda: server.service.num_in_flight == 2)
        server.server.handle_exit(signal.SIGTERM, None)
        server.thread.join(SECONDS)
        assert not server.thread.is_alive()
        unread.close()
        unsent.close()


def test_a_server_whose_first_step_has_failed_is_not_ready(apar, monkeypatch):
    monkeypatch.setattr(services, "engine_request", lambda *_, **__: 1 / 0)

    async def start():
        service = Service(lambda: apar, "tiny")
        with pytest.raises(ZeroDivisionError):
            await service.start()
        assert service.engine.healthy and service.state == "broken"
        with pytest.raises(ApiError) as told:
            service.check_answers()
        assert "Retry-After" not in told.value.headers  # it would be for ever
        await service.close()

    asyncio.run(start())


def test_a_model_whose_code_ends_the_process_says_how():
    with pytest.raises(SystemExit, match="^3$"):
        serve(Service(lambda: sys.exit(3), "tiny", ServeOptions(port=0)))


def test_an_application_that_is_cancelled_while_it_ends_says_so():
    async def cancelled():
        service, asked, over = Service(tiny_apar, "tiny"), asyncio.Event(), asyncio.Event()

        async def start():  # goes on for a while, as a model that is loaded does
            try:
                await over.wait()
            except asyncio.CancelledError:
                asked.set()
                await over.wait()

        async def live():
            async with app.router.lifespan_context(app):
                await asyncio.sleep(0)

        service.start = start
        app = create_app(service)
        task = asyncio.create_task(live())
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        over.set()

    asyncio.run(asyncio.wait_for(cancelled(), SECONDS))


def test_a_process_from_its_first_line_to_its_second_signal():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.support.serving"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        try:
            begin, url = process.stdout.readline().rsplit(maxsplit=1)
            assert begin == "medusa-apar serves tiny at"
            with httpx.Client(base_url=url, timeout=SECONDS, **PLAIN) as client:
                assert client.get("/health").json() == {"status": "loading"}
                process.stdin.write("\n")
                process.stdin.flush()
                assert process.stdout.readline() == "ready\n"
                assert client.get("/health").json() == {"status": "ready"}
                asked = {"prompt": PROMPT, "max_tokens": 250, "pause": 0.2, "stream": True}
                with client.stream("POST", "/v1/tokens", json=asked) as answer:
                    lines = answer.iter_lines()
                    assert any(map(json.loads, lines))
                    process.send_signal(signal.SIGTERM)
                    wait_until(lambda: httpx.get(f"{url}/health", **PLAIN).json() == {"status": "draining"})
                    assert json.loads(next(lines))
                    process.send_signal(signal.SIGINT)
                    with pytest.raises(httpx.RemoteProtocolError):
                        list(lines)
            assert process.wait(SECONDS) == 128 + signal.SIGINT
            logged = process.stderr.read().splitlines()
            assert [json.loads(line)["path"] for line in logged if line.startswith("{")][0] == "/health"
            assert any(line.startswith("draining for at most 30 seconds") for line in logged)
        finally:
            process.kill()
