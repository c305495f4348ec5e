"""The endpoint of a judge: what it refuses, which model, whose key."""

import pytest

from medusa_apar.eval.chat_endpoint import ChatEndpoint


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
