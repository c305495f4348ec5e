"""The page's files over HTTP, and what a stream says of events; test_browser.py has the page itself in a browser."""

import json
import re
from dataclasses import fields

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from medusa_apar import attach, events
from medusa_apar.events.recording import Recording
from medusa_apar.heads import HydraHeads
from medusa_apar.serve.event_texts import EventTexts, GuessTexts
from medusa_apar.serve.page import page_files, router
from tests.support.models import CONTROL, forking_model
from tests.support.tokenizers import tiny_tokenizer


@pytest.fixture(scope="module")
def client():
    app = FastAPI()
    app.include_router(router())
    return TestClient(app)


def test_the_page_and_all_that_it_names_are_there_and_from_nowhere_else(client):
    index = client.get("/")
    assert index.status_code == 200 and index.headers["content-type"].startswith("text/html")
    named = set(re.findall(r'(?:href|src)="(?!#)([^"]+)"', index.text))
    for name in page_files():
        text = client.get(f"/page/{name}").text
        named |= {f"page/{its}" for its in re.findall(r'from "\./([^"]+)"', text)}
        assert not re.findall(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)[\w-]+\.\w", re.sub(r"(?m)// .*$", "", text))
    assert {name.removeprefix("page/") for name in named} | {"index.html"} == set(page_files())


def test_nothing_in_the_files_reads_text_as_html_or_as_code():
    for name, file in page_files().items():
        forbidden = rb"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\(|new Function"
        assert not re.search(forbidden, file.content), name
    index = page_files()["index.html"].content
    assert not re.search(rb"<style| style=| on\w+=|<script(?![^>]* src=)", index)


def contrast(one, other):
    """As WCAG 2 has it."""

    def luminance(colour):
        parts = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_all_text_is_dark_or_light_enough(scheme):
    style = b"".join(page_files()[name].content for name in ("style.css", "answer.css")).decode()
    pairs = re.findall(r"(?:--|hue-\d { --)(\w+): light-dark\(#(\w{6}), #(\w{6})\)", style)
    named = [(name, tuple(part / 255 for part in bytes.fromhex(its[scheme]))) for name, *its in pairs]
    grounds = [colour for name, colour in named if name in ("ground", "surface")]
    texts = [colour for name, colour in named if name in ("ink", "soft", "guess", "wrong")]
    hues = [colour for name, colour in named if name == "hue"]
    assert (len(grounds), len(texts), len(hues)) == (2, 4, 7)
    for ground in grounds:
        assert all(contrast(text, ground) >= 4.5 for text in texts)
        for hue in hues:  # of a chip
            mixed = [0.14 * own + 0.86 * its for own, its in zip(hue, ground, strict=True)]
            assert contrast(hue, mixed) >= 4.5, hue


def test_every_figure_says_whose_it_is(client):
    figures = re.findall(r"<dd.*?>(.*)</dd>", client.get("/").text)
    said = [re.sub(r"<[^>]*>", "", figure) for figure in figures]
    assert said == ["with threads –", "one thread –"] * 4


def test_every_answer_carries_the_policy(client):
    for path in ("/", "/page/main.js"):
        headers = client.get(path).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'" and policy["require-trusted-types-for"] == "'script'"
        for kind in ("script-src", "style-src", "connect-src"):
            assert policy[kind] == "'self'"
        assert headers["x-content-type-options"] == "nosniff"


def test_what_has_not_changed_is_not_sent_again(client):
    first = client.get("/page/style.css")
    again = client.get("/page/style.css", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/page/style.css", headers={"If-None-Match": '"other"'}).status_code == 200
    assert client.head("/").status_code == 200


@pytest.mark.parametrize("name", ["nothing.js", "..%2fpage.py", "__init__.py", "..", "%00"])
def test_nothing_else_is_handed_out(client, name):
    answer = client.get(f"/page/{name}")
    assert answer.status_code == 404 or answer.text == client.get("/").text


# ---- events as a stream carries them


@pytest.fixture(scope="module")
def told():
    """A tokenizer, and the events of an answer with threads and guesses."""
    model, told = forking_model(24), []
    apar = attach(model, HydraHeads.random(model), CONTROL, tokenizer=tiny_tokenizer())
    with apar.engine(budget=24) as engine:
        engine.add(apar.request("one", [7, 8, 9], max_new_tokens=40, events=told.append))
        while engine.unfinished:
            engine.step()
    return apar.tokenizer, told


def test_written_events_are_the_events_and_the_texts_of_their_tokens(told):
    tokenizer, originals = told
    write = EventTexts(tokenizer, GuessTexts(tokenizer))
    written = json.loads(json.dumps([write(event) for event in originals]))
    recording, texts = Recording.of(originals), {}
    for event, its in zip(originals, written, strict=True):
        assert its.pop("event") == type(event).__name__ and hasattr(events, type(event).__name__)
        pieces = its.pop("texts", None)
        if isinstance(event, (events.TokensAccepted, events.TokensInserted)):
            texts.setdefault(event.thread, []).extend(pieces)
        if isinstance(event, events.TokensRejected):
            assert len(pieces) == len(event.token_ids)
        if isinstance(event, events.StepStarted):
            for drafted, its_drafted in zip(event.drafted, its["drafted"], strict=True):
                assert len(its_drafted["texts"]) == len(its_drafted["token_ids"]) == len(drafted.token_ids)
        assert list(its) == [field.name for field in fields(event)]
    (tree,) = recording.trees
    assert len(tree.threads) > 3 and any(d.token_ids for e in originals for d in getattr(e, "drafted", ()))
    for thread in tree.threads:
        said = tokenizer.decode(thread.token_ids, skip_special_tokens=True)
        assert "".join(texts.get(thread.index, [])).split() == said.split()


def test_a_guess_has_its_space_and_is_decoded_once(monkeypatch):
    tokenizer = tiny_tokenizer()
    guesses = GuessTexts(tokenizer)
    texts = {token: guesses.of(token) for token in (9, 10, 11)}
    assert all(tokenizer.decode([8, token]).endswith(text) and text for token, text in texts.items())
    monkeypatch.setattr(guesses, "_decode", lambda ids: pytest.fail("decoded again"))
    assert texts == {token: guesses.of(token) for token in texts}
