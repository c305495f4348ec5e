"""The fault campaign, in little: a server of a tiny model stands it, and what it should notice it does."""

import asyncio
import json
import logging
import random
import socket
import threading
from collections import Counter

import httpx
import numpy as np
import pytest

import medusa_apar
from medusa_apar.eval import fault_kinds, faults
from medusa_apar.eval.fault_cases import CHAT, COMPLETION, Case, malformed
from medusa_apar.eval.fault_host import Host, Wrong
from medusa_apar.eval.fault_kinds import FAULTS, World, judge
from medusa_apar.heads import HydraHeads
from medusa_apar.serve.options import ServeOptions
from tests.support.models import CONTROL, forking_model
from tests.support.tokenizers import tiny_tokenizer


@pytest.fixture(scope="module")
def apar():
    model = forking_model(24)
    return medusa_apar.attach(model, HydraHeads.random(model), CONTROL, tokenizer=tiny_tokenizer())


def test_a_server_stands_a_campaign(apar, caplog):
    """Idle, killed, drained: a round of each."""
    with caplog.at_level(logging.ERROR):
        report = faults.campaign(apar, faults.Pace(0.0, round_seconds=0.7, cases=12, at_once=4), seed=7)
    assert report.wrong == [] and report.rounds == 3
    assert report.faults >= 20 and report.counts["right"] > 12
    assert {"kill", "drain"} <= set(report.events) and len(set(report.events) & {kind.__name__ for kind in FAULTS}) > 4
    said = {record.getMessage() for record in caplog.records}
    assert said <= {"the engine has died"}  # a client that goes is no error


def test_the_command_says_what_it_found(apar, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(faults, "load", lambda model, quantize: apar)
    report = faults.Report(3, faults=5, wrong=["a slot is lost"])
    monkeypatch.setattr(faults, "campaign", lambda *its: seen.append(its[1:]) or report)
    out = tmp_path / "new" / "faults.json"
    assert faults.main(["--seconds", "5", "--seed", "3", "--out", str(out)]) == 1
    assert seen == [(faults.Pace(5.0), 3)] and json.loads(out.read_text())["wrong"] == ["a slot is lost"]
    assert json.loads(capsys.readouterr().out)["faults"] == 5
    report.wrong.clear()
    assert faults.main(["--seconds", "5", "--seed", "3"]) == 0


# ---- what it notices


def case(**more):
    return Case(CHAT, {"max_tokens": 3}, [7], ids=[5, 6], texts=["ab"], reasons=["length"], **more)


def world(ending=""):
    return World("", 0, None, [], random.Random(0), 1, ending, Counter(), Counter())


def whole(text="ab", ids=(5, 6), reason="length", tokens=2):
    choice = {"index": 0, "message": {"content": text}, "token_ids": list(ids), "finish_reason": reason}
    return json.dumps({"choices": [choice], "usage": {"completion_tokens": tokens}}).encode()


def stream(*parts, error=None, ends=True):
    """Parts: (text, ids, reason)."""
    events = [
        {"choices": [{"index": 0, "delta": {"content": text}, "token_ids": list(ids), "finish_reason": reason}]}
        for text, ids, reason in parts
    ]
    events.append({"choices": [], "usage": {"completion_tokens": sum(len(ids) for _, ids, _ in parts)}})
    events += [{"error": {"message": error}}] * (error is not None)
    content = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    return (content + ("data: [DONE]\n\n" if ends else "")).encode()


RIGHT = [("a", [5], None), ("b", [6], None), ("", [], "length")]
REFUSED = b'{"error": {"message": "full", "type": "rate_limit_error"}}'
LATER = {"retry-after": "1"}


@pytest.mark.parametrize(
    ("status", "headers", "content", "streams", "ending", "count"),
    [
        (200, {}, whole(), False, "", "right"),
        (200, {}, stream(*RIGHT), True, "", "right"),
        (429, LATER, REFUSED, False, "", "HTTP 429"),
        (503, LATER, REFUSED, True, "drain", "HTTP 503"),
        (200, {}, stream(RIGHT[0], error="the engine has died"), True, "kill", "error in the stream"),
    ],
)
def test_a_right_answer_or_a_clear_refusal_is_fine(status, headers, content, streams, ending, count):
    place = world(ending)
    judge(place, case(), status, headers, content, streams)
    assert place.counts == {count: 1}


@pytest.mark.parametrize(
    ("status", "headers", "content", "streams", "ending", "says"),
    [
        (200, {}, whole(ids=(5, 7)), False, "", "engine alone gives"),
        (200, {}, whole(text="ac"), False, "", "is not"),
        (200, {}, whole(reason="stop"), False, "", "is not"),
        (200, {}, whole(tokens=3), False, "", "usage has 3"),
        (200, {}, stream(*RIGHT[:1], RIGHT[2]), True, "kill", "engine alone gives"),  # an end that is none
        (200, {}, stream(*RIGHT, ends=False), True, "", "without its end"),
        (200, {}, stream(RIGHT[0], error="it broke"), True, "", "it broke"),
        (200, {}, stream(RIGHT[0], error="it broke"), True, "drain", "it broke"),
        (429, {}, REFUSED, False, "", "Retry-After None"),
        (503, LATER, REFUSED, False, "", "HTTP 503"),
        (500, {}, REFUSED, False, "kill", "HTTP 500"),
        (400, {}, REFUSED, False, "", "HTTP 400"),
        (429, LATER, b"busy", False, "", "HTTP 429 with b'busy'"),
    ],
)
def test_anything_else_is_wrong(status, headers, content, streams, ending, says):
    with pytest.raises(Wrong, match=says):
        judge(world(ending), case(), status, headers, content, streams)


def test_what_is_not_known_of_an_answer_becomes_known():
    its = case()
    its.ids, its.texts, its.reasons = None, [], []
    judge(world(), its, 200, {}, whole(), False)
    assert (its.texts, its.reasons) == (["ab"], ["length"])
    with pytest.raises(Wrong):
        judge(world(), its, 200, {}, stream(("ax", [5, 6], "length")), True)


def test_a_server_that_leaves_something_behind_is_noticed(apar):
    host = Host(apar, ServeOptions(access_log=False))
    host.start()
    with socket.create_connection(("127.0.0.1", host.port)):
        assert len(host._left_sockets()) > 1 and "medusa-apar engine" in host._left_threads()
    host.service.native.ledger.pool.allocate(np.zeros(1, dtype=np.int64), [("nobody", 1)])
    with pytest.raises(AssertionError, match="a slot is leaked"):
        host.stop()
    assert host._left_sockets() == host._left_threads() == []
    ended = threading.Event()
    threading.Thread(target=ended.wait, name="forgotten").start()
    assert host._left_threads() == ["forgotten"]
    ended.set()


def test_bad_bodies_are_bad_in_many_ways_and_refused_in_all(apar):
    """Each of them once, since a campaign draws only some."""
    rng, bodies = random.Random(1), set()
    for path, start in ((CHAT, {"messages": [{"role": "user", "content": "a"}]}), (COMPLETION, {"prompt": [7, 8]})):
        for _ in range(600):
            bodies.add((path, malformed(Case(path, start | {"max_tokens": 2}, [7]), rng)))
    host = Host(apar, ServeOptions(access_log=False, max_body_bytes=1 << 16))
    host.start()
    try:
        with httpx.Client(trust_env=False) as http:
            for path, body in sorted(bodies):
                answer = http.post(host.url + path, content=body, headers={"Content-Type": "application/json"})
                assert 400 <= answer.status_code < 500, (path, body[:200], answer.text)
                fault_kinds.refusal(answer.status_code, answer.headers, answer.content)
            assert http.get(f"{host.url}/health").status_code == 200
    finally:
        host.stop()
    assert len(bodies) > 150


def test_a_chunked_answer_is_read_as_it_was_written():
    head = b"HTTP/1.1 200 OK\r\nContent-Type: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    content = head + b"3\r\nabc\r\n5\r\nde\r\nf\r\n0\r\n\r\n"
    assert fault_kinds._parse(content) == (200, {"content-type": "x", "transfer-encoding": "chunked"}, b"abcde\r\nf")
    with pytest.raises(Wrong, match="begins with"):
        fault_kinds._parse(b"")
    assert asyncio.run(fault_kinds.together([asyncio.sleep(0, 3)])) == [3]
