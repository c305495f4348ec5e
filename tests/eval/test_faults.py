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
from medusa_apar.eval import fault_judge, fault_kinds, faults, prompts
from medusa_apar.eval.fault_cases import CHAT, COMPLETION, Case, cases_of, malformed
from medusa_apar.eval.fault_host import Host, Wrong
from medusa_apar.eval.fault_judge import Gone, When, judge
from medusa_apar.eval.fault_kinds import FAULTS, World
from medusa_apar.eval.fault_memory import BOUND, growth
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
        pace = faults.Pace(0.0, round_seconds=60.0, cases=6, at_once=2, round_faults=6)
        report = faults.campaign(apar, pace, seed=7)
    assert report.wrong == [] and report.rounds == 3
    assert report.growth is not None and [report.growth.warm, report.growth.end] == report.memory[1:]
    assert report.faults > 3 * 6 and report.counts["right"] > 6
    assert {"kill", "drain"} <= set(report.events) and len(set(report.events) & {kind.__name__ for kind in FAULTS}) > 3
    said = {record.getMessage() for record in caplog.records}
    assert said <= {"the engine has died"}  # a client that goes is no error


@pytest.mark.campaign
def test_a_server_stands_a_minute(apar):
    """A tenth of what the command does, of which a thousand faults are asked."""
    report = faults.campaign(apar, faults.Pace(60.0, round_seconds=4.0, cases=8), seed=1)
    assert report.wrong == [] and report.faults >= 100 and report.counts["right"] > 100
    assert report.rounds > 3 and set(report.events) >= {kind.__name__ for kind in FAULTS}
    assert report.growth is not None and not report.growth.too_much


MIB = 1 << 20


@pytest.mark.parametrize(
    ("memory", "warm", "end", "slope"),
    [
        ([500, 500, 500, 500, 500, 500, 500, 500], 500, 500, 0),
        ([100, 300, 500, 500, 500, 500, 500, 500], 500, 500, 0),  # a warm-up may take what it likes
        ([500, 500, 500, 500, 900, 500, 500, 500], 500, 500, None),  # and one look is none
        ([500, 500, 500, 510, 520, 530, 540, 550], 510, 540, 100),
        ([500, 510, 600], 510, 600, 900),
    ],
)
def test_memory_that_grows_is_told(memory, warm, end, slope):
    found = growth([MIB * each for each in memory], [100 * n for n in range(1, len(memory) + 1)])
    assert (found.warm, found.end, found.too_much) == (MIB * warm, MIB * end, MIB * (end - warm) > BOUND)
    assert slope is None or found.per_thousand_faults == pytest.approx(MIB * slope, rel=0.1)
    assert growth([MIB], [1]) is growth([MIB, MIB], [1, 2]) is None


def test_the_command_says_what_it_found(apar, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(faults, "load", lambda model, quantize: apar)
    grown = growth([MIB] * 8, range(8))
    report = faults.Report(3, faults=5, growth=grown, wrong=["a slot is lost"])
    monkeypatch.setattr(faults, "campaign", lambda *its: seen.append(its[1:]) or report)
    out = tmp_path / "new" / "faults.json"
    assert faults.main(["--seconds", "5", "--seed", "3", "--out", str(out)]) == 1
    assert seen == [(faults.Pace(5.0), 3)] and json.loads(out.read_text())["wrong"] == ["a slot is lost"]
    said = json.loads(capsys.readouterr().out)
    assert said["faults"] == 5 and (said["growth"]["warm"], said["growth"]["bound"]) == (MIB, BOUND)
    report.wrong.clear()
    assert faults.main(["--seconds", "5", "--seed", "3"]) == 0


# ---- what it notices


def case(**more):
    return Case(CHAT, {"max_tokens": 3}, [7], ids=[[5, 6]], texts=["ab"], reasons=["length"], **more)


def world(transport, ending=""):
    http = httpx.AsyncClient(transport=httpx.MockTransport(transport))
    return World("http://x", 0, http, [case()], lambda case: 9, random.Random(0), 1, ending, Counter(), Counter())


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


DRAINED, DRAINING = When("", "drain"), When("drain", "drain")
KILLED, DEAD = When("", "kill"), When("kill", "kill")


@pytest.mark.parametrize(
    ("status", "headers", "content", "streams", "when", "count"),
    [
        (200, {}, whole(), False, When(), "right"),
        (200, {}, stream(*RIGHT), True, When(alone=True), "right"),
        (429, LATER, REFUSED, False, When(), "HTTP 429"),
        (429, LATER, REFUSED, False, DRAINED, "HTTP 429"),
        (503, LATER, REFUSED, True, DRAINING, "HTTP 503"),
        (503, LATER, REFUSED, True, KILLED, "HTTP 503"),
        (200, {}, stream(RIGHT[0], error="the engine has died"), True, KILLED, "error in the stream"),
    ],
)
def test_a_right_answer_or_a_clear_refusal_is_fine(status, headers, content, streams, when, count):
    assert judge(case(), status, headers, content, streams, when) == count


@pytest.mark.parametrize(
    ("status", "headers", "content", "streams", "when", "says"),
    [
        (200, {}, whole(ids=(5, 7)), False, When(), "engine alone gives"),
        (200, {}, whole(text="ac"), False, When(), "is not"),
        (200, {}, whole(reason="stop"), False, When(), "is not"),
        (200, {}, whole(tokens=3), False, When(), "usage has 3"),
        (200, {}, b"{}", False, When(), "an answer that is none"),
        (200, {}, stream(*RIGHT[:1], RIGHT[2]), True, DEAD, "engine alone gives"),  # an end that is none
        (200, {}, stream(*RIGHT, ends=False), True, When(), "without its end"),
        (200, {}, b"data: 5\n\ndata: [DONE]\n\n", True, When(), "a stream that is none"),
        (200, {}, stream(RIGHT[0], error="it broke"), True, When(), "it broke"),
        (200, {}, stream(RIGHT[0], error="it broke"), True, DRAINED, "it broke"),
        (429, {}, REFUSED, False, When(), "Retry-After None"),
        (429, LATER, REFUSED, False, When(alone=True), "HTTP 429"),
        (503, LATER, REFUSED, False, When(), "HTTP 503"),
        (503, LATER, REFUSED, False, DRAINED, "HTTP 503"),  # it came before the drain
        (500, {}, REFUSED, False, DEAD, "HTTP 500"),
        (400, {}, REFUSED, False, When(), "HTTP 400"),
        (429, LATER, b"busy", False, When(), "HTTP 429 with b'busy'"),
    ],
)
def test_anything_else_is_wrong(status, headers, content, streams, when, says):
    with pytest.raises(Wrong, match=says):
        judge(case(), status, headers, content, streams, when)


class Parts(httpx.AsyncByteStream):
    """An answer that comes in pieces, and is torn off where it is to be."""

    def __init__(self, parts, error=None):
        self.parts, self.error = parts, error

    async def __aiter__(self):
        for part in self.parts:
            await asyncio.sleep(0)
            yield part
        if self.error is not None:
            raise self.error


TORN = Parts([whole()[:10]], httpx.ReadError("reset"))


def refuses(request):
    raise httpx.ConnectError("refused")


def drops(request):
    raise httpx.ReadError("reset")


@pytest.mark.parametrize(
    ("transport", "before", "after", "raises"),
    [
        (refuses, "", "", Wrong),
        (refuses, "", "drain", Gone),
        (refuses, "kill", "kill", Wrong),  # a server whose engine has died still says so
        (drops, "", "drain", Wrong),  # taken, and lost
        (drops, "drain", "drain", Gone),
        (lambda request: httpx.Response(200, stream=TORN), "drain", "drain", Wrong),
        (lambda request: httpx.Response(200, stream=TORN), "", "kill", Wrong),
    ],
)
def test_only_what_the_server_has_never_seen_may_be_lost(transport, before, after, raises):
    def then(request):
        place.ending = after
        return transport(request)

    place = world(then, before)
    with pytest.raises(raises):
        asyncio.run(fault_kinds.ask(place, case(), stream=False))
    assert place.counts == ({"not connected": 1} if raises is Gone else {})
    place.ending = before
    report = faults.Report(0)
    assert asyncio.run(faults._event(place, "asked", fault_kinds.whole_answer(place), report)) == (raises is Wrong)
    assert len(report.wrong) == place.events["asked"] == (raises is Wrong)


def test_a_client_that_hangs_up_notices_that_it_was_refused():
    def hang_ups(*response):
        place = world(lambda request: httpx.Response(response[0], stream=Parts(response[1:])))

        async def some():
            for _ in range(20):
                await fault_kinds.hang_up(place)

        asyncio.run(some())
        return place.counts

    with pytest.raises(Wrong, match="HTTP 400"):
        hang_ups(400, REFUSED)
    found = hang_ups(200, *[b"x"] * 3)
    assert found.total() == 20 and {"hung up in the middle of its answer", "hung up after its answer"} <= set(found)


def test_what_an_event_breaks_by_is_kept():
    async def broken():
        raise KeyError("texts")

    report = faults.Report(0)
    assert asyncio.run(faults._event(world(refuses), "broken", broken(), report))
    assert report.wrong == ["broken: KeyError('texts')"]


def test_a_server_without_metrics_is_not_idle():
    with pytest.raises(Wrong, match="tells nothing of"):
        asyncio.run(faults._is_idle(world(lambda request: httpx.Response(200, text="x 0\n"))))


def test_cases_know_their_texts_with_stop_strings_and_for_each_choice(apar):
    cases = cases_of(apar, prompts.read(prompts.DEFAULT), 16, random.Random(3))
    several = [its for its in cases if its.body.get("n", 1) > 1]
    assert several and all(len(its.ids) == len(its.texts) == its.body["n"] for its in several)
    assert any(len(set(its.texts)) > 1 for its in several if its.body["temperature"])
    stopped = [its for its in cases if "stop" in its.body]
    assert any(its.reasons == ["stop"] for its in stopped)
    for its in stopped:
        assert its.body["stop"][0] not in its.texts[0]
        whole_text = apar.tokenizer.decode(its.ids[0], skip_special_tokens=True)
        assert whole_text == its.texts[0] or whole_text.startswith(its.texts[0] + its.body["stop"][0])


def test_disconnects_ask_for_as_much_as_fits(apar):
    its = Case(COMPLETION, {"max_tokens": 2, "prompt": [7]}, [7])
    small, large = (faults._room(apar, its, slots) for slots in (64, None))
    assert 24 < small < large
    assert faults._fits(apar, its, small, 64) and not faults._fits(apar, its, small + 1, 64)


def test_a_server_that_leaves_something_behind_is_noticed(apar):
    host = Host(apar, ServeOptions(access_log=False))
    host.start()
    with socket.create_connection(("127.0.0.1", host.port)):
        assert len(host._left_sockets()) > 1 and "medusa-apar engine" in host._left_threads()
    host.backend.native.ledger.pool.allocate(np.zeros(1, dtype=np.int64), [("nobody", 1)])
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
                fault_judge.refusal(answer.status_code, answer.headers, answer.content)
            assert http.get(f"{host.url}/health").status_code == 200
    finally:
        host.stop()
    assert len(bodies) > 120


def test_a_chunked_answer_is_read_as_it_was_written():
    head = b"HTTP/1.1 200 OK\r\nContent-Type: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    content = head + b"3\r\nabc\r\n5\r\nde\r\nf\r\n0\r\n\r\n"
    assert fault_judge.parse(content) == (200, {"content-type": "x", "transfer-encoding": "chunked"}, b"abcde\r\nf")
    for broken in (b"", content[:-9], b"x"):
        with pytest.raises(Wrong, match="begins with"):
            fault_judge.parse(broken)
    assert asyncio.run(fault_kinds.together([asyncio.sleep(0, 3)])) == [3]
