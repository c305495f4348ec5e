"""The endpoint of a judge: what it refuses, which model, whose key."""

import itertools
import threading
import time

import pytest

from medusa_apar.eval import chat_endpoint
from medusa_apar.eval.chat_endpoint import ChatEndpoint
from medusa_apar.job import append_lines


def test_what_the_judge_refuses_is_said(player, slept):
    endpoint = ChatEndpoint(player.url)
    player.play = lambda messages: (400, {"error": {"message": "the context is too long", "param": "messages"}})
    with pytest.raises(ValueError, match=r"refuses the question \(HTTP 400\): the context is too long"):
        endpoint.complete([])
    player.play = lambda messages: (404, b"no such page")
    with pytest.raises(ValueError, match=r"\(HTTP 404\): no such page"):
        endpoint.complete([])
    player.play = lambda messages: (200, {"error": "x"})
    with pytest.raises(ValueError, match="answers otherwise than OpenAI's chat completions do"):
        endpoint.complete([])
    player.play = lambda messages: (200, b"<html>")
    with pytest.raises(ValueError, match="something that is not JSON"):
        endpoint.complete([])
    assert slept == []


def test_what_no_file_can_hold_is_replaced(player, tmp_path):
    player.play = lambda messages: (
        200,
        rb"""{"choices": [{"message": {"content": "\ud800 good \ud83d\ude00 [[5]]"}}]}""",
    )
    answer = ChatEndpoint(player.url).complete([])
    append_lines(tmp_path / "kept.jsonl", [{"answer": answer}])
    assert answer == "? good \U0001f600 [[5]]"


def test_an_option_that_a_model_does_not_take_is_left_out(player):
    def play(messages):
        body = player.requests[-1][2]
        refused = next((name for name in ("max_tokens", "temperature") if name in body), None)
        return (400, {"error": {"message": "unsupported", "param": refused}}) if refused else "fine"

    player.play = play
    endpoint = ChatEndpoint(player.url)
    player.requests.clear()
    assert endpoint.complete([]) == endpoint.complete([]) == "fine" and len(player.requests) == 4


def test_the_model_is_the_only_one_there_is_or_named(player):
    assert ChatEndpoint(f"{player.url}/").model == "judge-1"
    player.models = ["m1", "m2"]
    with pytest.raises(ValueError, match="lists m1, m2: say with --judge-model"):
        ChatEndpoint(player.url)
    assert ChatEndpoint(player.url, "m3").model == "m3"
    player.models = 404  # many servers have no list
    with pytest.raises(ValueError, match="lists no models: say with --judge-model"):
        ChatEndpoint(player.url)
    assert ChatEndpoint(f"{player.url}/chat/completions", "m").complete([]) == "[[5]]"


def test_the_key_is_sent_and_its_refusal_said(player, monkeypatch):
    ChatEndpoint(player.url)
    assert "Authorization" not in player.requests[0][1]
    monkeypatch.setenv("OPENAI_API_KEY", "k1")
    ChatEndpoint(player.url).complete([])
    assert {headers.get("Authorization") for _, headers, _ in player.requests[1:]} == {"Bearer k1"}
    player.models = 401
    with pytest.raises(PermissionError, match=r"refuses the key \(HTTP 401\): set OPENAI_API_KEY"):
        ChatEndpoint(player.url, "m")


# ---- answers without an end


def started(handler, status=200):
    handler.send_response(status)
    handler.end_headers()


def trickling(handler):
    started(handler)
    for _ in range(200):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.02)


def trickling_headers(handler):
    for number in range(200):
        handler.wfile.write(f"HTTP/1.1 200 OK\r\nX-{number}: ".encode() if number == 0 else b"a")
        handler.wfile.flush()
        time.sleep(0.02)


def trickling_refusal(handler):
    started(handler, 400)
    trickling(handler)


def endless(status):
    def play(handler):
        started(handler, status)
        for _ in itertools.count():
            handler.wfile.write(bytes(1 << 16))

    return play


@pytest.mark.parametrize("play", [trickling, trickling_headers, trickling_refusal])
def test_an_answer_has_a_time_for_all_of_it(player, slept, monkeypatch, play):
    monkeypatch.setattr(chat_endpoint, "TIMEOUT", 0.2)
    monkeypatch.setattr(chat_endpoint, "WAITS", (1.0,))
    player.play = lambda messages: play
    endpoint, began = ChatEndpoint(player.url), time.monotonic()
    with pytest.raises(ConnectionError, match=r"failed 2 times, at last with timed out after 0\.2 seconds"):
        endpoint.complete([])
    assert time.monotonic() - began < 2 and slept == [1.0]


@pytest.mark.parametrize(("status", "sentence"), [(200, "answers with over 4 MiB"), (400, r"refuses the question")])
def test_an_answer_has_a_size(player, status, sentence):
    player.play = lambda messages: endless(status)
    with pytest.raises(ValueError, match=sentence):
        ChatEndpoint(player.url).complete([])


def test_an_answer_without_an_end_leaves_nothing_running(player, monkeypatch):
    monkeypatch.setattr(chat_endpoint, "TIMEOUT", 0.2)
    monkeypatch.setattr(chat_endpoint, "WAITS", ())
    player.play = lambda messages: trickling
    with pytest.raises(ConnectionError):
        ChatEndpoint(player.url).complete([])
    fetching = [thread for thread in threading.enumerate() if thread.name.startswith("judge")]
    for thread in fetching:
        thread.join(2)
    assert fetching and not any(thread.is_alive() for thread in fetching)


@pytest.mark.parametrize("content", [5, ["x"], {"text": "x"}, True])
def test_an_answer_that_is_no_text_is_refused(player, content):
    player.play = lambda messages: content
    with pytest.raises(ValueError, match="answers otherwise than OpenAI's chat completions do"):
        ChatEndpoint(player.url).complete([])


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b"\xff", b"1" * 9999, b"null", b"[]", b'{"choices": {}}', b'{"choices": [5]}', b""]
)
@pytest.mark.parametrize("status", [200, 400])
def test_whatever_an_answer_holds_is_a_sentence(player, body, status):
    player.play = lambda messages: (status, body)
    with pytest.raises(ValueError, match="answers otherwise|is not JSON|refuses the question") as refusal:
        ChatEndpoint(player.url).complete([])
    assert len(str(refusal.value)) < 600


@pytest.mark.parametrize(
    "url", ["localhost:8000", "http://", "http://a:b/v1", "http://[::1/v1", "http://é/v1", "ftp://a"]
)
def test_what_is_no_address_is_said(url):
    with pytest.raises(ValueError, match="is no address of a judge"):
        ChatEndpoint(url)


@pytest.mark.parametrize("key", ["a\nb", "é", "a\0"])
def test_a_key_that_cannot_be_one_is_not_shown(player, monkeypatch, key):
    monkeypatch.setattr(chat_endpoint.os, "environ", {"OPENAI_API_KEY": f"secret{key}"})
    with pytest.raises(ValueError, match="OPENAI_API_KEY holds what no key has") as refusal:
        ChatEndpoint(player.url)
    assert "secret" not in str(refusal.value) and player.requests == []
