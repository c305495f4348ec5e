"""Requests over HTTP: each is answered right or refused with a word, and leaves nothing behind when its client goes."""

import asyncio
import json
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from medusa_apar.serve.exchange import exchange_of
from tests.support.serving import PLAIN, SECONDS, running, sent, tiny_apar, wait_until

PROMPTS = [[7, 8, 9 + n, 10] for n in range(8)]


@pytest.fixture(scope="module")
def apar():
    return tiny_apar()


@pytest.fixture(scope="module")
def server(apar):
    with running(lambda: apar, max_requests=64, max_queue=None) as server:
        yield server


@pytest.fixture(scope="module")
def written(apar):
    """What the engine writes for a prompt that it has alone."""

    def alone(prompt, limit=40):
        request = apar.request("alone", prompt, max_new_tokens=limit)
        with apar.engine() as engine:
            engine.add(request)
            while engine.unfinished:
                engine.step()
        return request.text_ids

    return alone


def test_streams_and_plain_answers_have_the_engines_tokens(server, written):
    for prompt in PROMPTS[:3]:
        assert server.ask(prompt).json()["token_ids"] == written(prompt)
        lines = server.ask(prompt, stream=True).text.splitlines()
        assert sum(map(json.loads, lines), []) == written(prompt)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_ends_its_request_within_a_step(server, monkeypatch, stream):
    """sglang#36475, ATOM PR 1441: streams and plain answers alike."""
    engine, aborted = server.service.engine, threading.Event()
    abort = engine.abort
    monkeypatch.setattr(engine, "abort", lambda request: (abort(request), aborted.set()))
    before = server.hold.asked
    with sent(server, PROMPTS[0], max_tokens=200, held=True, stream=stream) as client:
        server.hold.allowed.release(3)
        wait_until(lambda: server.hold.asked == before + 4)
        if stream:
            assert client.recv(100)
    assert aborted.wait(SECONDS)
    server.hold.allowed.release()  # the step that runs comes to its end
    server.wait_until_idle()
    assert server.hold.asked == before + 4


def test_clients_that_go_at_any_time_leave_nothing_behind(server, written):
    """sglang#36475, lmdeploy#548: slots, places and threads are free again, and the next answer is right."""
    draw = random.Random(0)
    threads = threading.active_count()
    for n in range(60):
        forks = {"pause": 0.001} if n % 4 else {}
        close = "Connection: close\r\n"  # at the answer's end, or who reads on would wait for the keep-alive's
        with sent(server, draw.choice(PROMPTS), close, max_tokens=200, stream=n % 2 == 0, **forks) as client:
            if n % 2:
                time.sleep(draw.random() * 0.01)
            for _ in range(0 if n % 2 else draw.randrange(5)):
                client.recv(1 << 16)
    server.wait_until_idle()
    assert server.ask(PROMPTS[1]).json()["token_ids"] == written(PROMPTS[1])
    assert threading.active_count() == threads


def test_equal_ids_of_clients_never_mix(server, written):
    """vllm#10583, #15041: the id is echoed and names nothing inside; after an abort it can be used again."""
    headers = "X-Request-Id: mine\r\n"
    with sent(server, PROMPTS[0], headers, max_tokens=100, pause=0.001):
        with ThreadPoolExecutor() as pool, server.client(headers={"X-Request-Id": "mine"}) as client:
            ask = [pool.submit(client.post, "/v1/tokens", json={"prompt": prompt}) for prompt in PROMPTS[:4]]
            answers = [its.result() for its in ask]
        assert [its.json()["token_ids"] for its in answers] == list(map(written, PROMPTS[:4]))
        assert {its.headers["X-Request-Id"] for its in answers} == {"mine"}
        assert len({its.json()["id"] for its in answers}) == 4
    server.wait_until_idle()
    with server.client() as client:
        again = client.post("/v1/tokens", json={"prompt": PROMPTS[0]}, headers={"X-Request-Id": "mine"})
    assert again.json()["token_ids"] == written(PROMPTS[0])


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("length", [256, 257])
def test_what_can_never_be_answered_is_said(server, stream, length):
    """mini-sglang logs a prompt that is too long and lets its client wait for ever."""
    refused = server.ask([7] * length, stream=stream)
    said = f"The prompt has {length} tokens, but the model's context ends at 256."
    assert (refused.status_code, refused.json()["error"]["message"]) == (400, said)
    assert refused.json()["error"]["type"] == "invalid_request_error"


def test_one_request_that_fails_harms_no_other(server, written, monkeypatch):
    monkeypatch.setattr(server.hold.__class__, "__call__", lambda *_: 1 / 0)
    failed = server.ask(PROMPTS[0], held=True)
    assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
    assert failed.headers["x-should-retry"] == "false"
    assert server.ask(PROMPTS[0]).json()["token_ids"] == written(PROMPTS[0])


def test_one_reader_that_never_reads_costs_one_answer(server, written):
    """transformers#42943: its request ends, gives everything back, and 49 others are answered."""
    stuck = sent(server, PROMPTS[0], max_tokens=240, stream=True, padding=1 << 20, pause=1e-5)
    with ThreadPoolExecutor(49) as pool:
        answers = list(pool.map(lambda n: server.ask(PROMPTS[n % 8], stream=n % 2 == 0), range(49)))
    for n, answer in enumerate(answers):
        ids = answer.json()["token_ids"] if n % 2 else sum(map(json.loads, answer.text.splitlines()), [])
        assert ids == written(PROMPTS[n % 8])
    engine = server.service.engine
    wait_until(lambda: not engine.stats().live_slots)  # all that it has yet to read is in one output
    wait_until(lambda: server.service.num_in_flight == 1)
    (connection,) = server.server.server_state.connections
    wait_until(lambda: connection.flow.write_paused)
    assert connection.transport.get_write_buffer_size() < 3 << 20
    stuck.close()
    server.wait_until_idle()


def asked_at_once(server, fields):
    async def ask():
        limits = httpx.Limits(max_connections=len(fields))
        async with httpx.AsyncClient(base_url=server.url, timeout=SECONDS, limits=limits, **PLAIN) as client:
            return await asyncio.gather(*(client.post("/v1/tokens", json=its) for its in fields))

    return asyncio.run(ask())


def test_a_flood_is_refused_in_time_and_what_was_taken_is_answered(apar, written):
    """vllm#18826: 200 requests at once, a queue of 8."""
    with running(lambda: apar, max_requests=2, max_queue=8) as server:
        held = [sent(server, PROMPTS[0], held=True, max_tokens=1) for _ in range(2)]  # both places are taken
        wait_until(lambda: server.hold.asked)
        flood = ThreadPoolExecutor(1)
        prompts = [PROMPTS[n % 8] for n in range(200)]
        answers = flood.submit(asked_at_once, server, [{"prompt": prompt} for prompt in prompts])
        # All of them stand behind the step that is held, so that each meets the same queue.
        wait_until(lambda: server.service.num_in_flight == 202)
        wait_until(lambda: server.service.engine._calls.qsize() >= 200)
        server.hold.allowed.release(2)
        answers = answers.result()
        taken = [n for n, answer in enumerate(answers) if answer.status_code == 200]
        refused = [answer for answer in answers if answer.status_code != 200]
        assert 8 <= len(taken) <= 10
        for n in taken:
            assert answers[n].json()["token_ids"] == written(prompts[n])
        for answer in refused:
            assert answer.status_code == 429 and 1 <= int(answer.headers["Retry-After"]) <= 60
            assert answer.json()["error"]["type"] == "rate_limit_error"
        for client in held:
            client.close()
        server.wait_until_idle()


def test_a_full_queue_is_seen_before_a_body_is_read_and_what_never_fits_is_told(apar):
    with running(lambda: apar, max_requests=1, max_queue=1) as server, server.client() as client:
        body = {"prompt": PROMPTS[0], "max_tokens": 4}

        def ask(n):
            return client.post("/v1/completions", json=body | {"n": n})

        def ended():
            return re.findall(r'request_success_total{finished_reason="(\w+)"} (\S+)', client.get("/metrics").text)

        before, steps = ended(), []
        with sent(server, PROMPTS[0], held=True, max_tokens=200) as held, ThreadPoolExecutor() as pool:

            def step(calls=0):  # after which the next one is held
                wait_until(lambda: server.service.engine._calls.qsize() >= calls)
                server.hold.allowed.release()
                steps.append(1)
                wait_until(lambda: server.hold.asked == len(steps) + 1)

            step()
            refused = pool.submit(ask, 2)
            step(calls=2)
            assert refused.result().status_code == 429 and refused.result().headers["Retry-After"]
            step()  # at its end the other choice is aborted, if not before
            waits = sent(server, PROMPTS[1])
            step(calls=1)
            assert server.service.engine.stats().waiting == 1
            unread = client.post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
            assert unread.status_code == 429 and client.get("/v1/models").status_code == 200
            held.close()
            waits.close()
            wait_until(lambda: server.service.engine._calls.qsize() == 2)
            server.hold.allowed.release()
            server.wait_until_idle()
        assert sorted({*ended()} - {*before}) == [("abort", "3.0")]  # nothing that was refused is a success
        said = ask(3).json()["error"]["message"]
        assert said == "3 answers are asked for at once, but this server takes 2 at most."
        fits = ask(2)
        assert fits.status_code == 200
        log = exchange_of(None)
        assert [log.count_prompt(PROMPTS[n]) for n in (0, 0, 1)] == [4, 0, 4] and log.prompt_tokens == 8


def test_a_pool_for_one_answer_and_a_half_answers_all(apar, written):
    """vllm#40004, #41951: nobody starves, forking wide or not."""
    with running(lambda: apar, pool_slots=120, max_queue=None) as server:
        answers = asked_at_once(server, [{"prompt": prompt, "max_tokens": 40} for prompt in PROMPTS])
        server.wait_until_idle()
        stats = server.service.engine.stats()
    ids = [its.json().get("token_ids") for its in answers]
    assert ids == list(map(written, PROMPTS))
    assert stats.preemptions < sum(map(len, ids))  # between two of them something was written


def test_an_engine_that_breaks_is_told_to_all_and_to_health(apar, monkeypatch):
    with running(lambda: apar) as server, server.client() as client, ThreadPoolExecutor() as pool:
        waiting = [pool.submit(server.ask, prompt, held=True, stream=False) for prompt in PROMPTS[:3]]
        wait_until(lambda: server.hold.asked)

        def broken(*_):
            raise MemoryError("of the machine")

        monkeypatch.setattr(type(apar.runtime), "step", broken)
        server.hold.allowed.release(100)
        told = [its.result() for its in waiting] + [server.ask(PROMPTS[0])]
        assert [its.status_code for its in told] == [503] * 4
        assert "engine has died" in told[-1].json()["error"]["message"]
        health = client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "broken"})
        assert client.get("/metrics").status_code == client.get("/version").status_code == 200
