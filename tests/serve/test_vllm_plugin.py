"""Our application mounted in another, as vLLM's server has it."""

import re
from argparse import Namespace
from contextlib import asynccontextmanager

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from medusa_apar.loading import load
from medusa_apar.serve.page import page_files
from medusa_apar.serve.vllm_plugin import Plugin
from tests.support.folders import forking_folder
from tests.support.vllm_client import client_of, speak_plainly

PROMPT, LIMIT, KEY = [7, 8, 9, 10], 40, "a-key"


@pytest.fixture(scope="module")
def apar(tmp_path_factory):
    return load(forking_folder(tmp_path_factory.mktemp("model")), heads=None, speculation="off")


@pytest.fixture(scope="module")
def mounted(apar):
    """The outer server's client."""
    plugin, client = Plugin(), client_of(apar, apar.model.name_or_path)
    args = Namespace(model="m", served_model_name=["its-name"], host=None, api_key=[KEY], allowed_origins=[])

    @asynccontextmanager
    async def lifespan(app):
        await plugin.init_state(client, app.state, args)
        yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/v1/models")
    def models():
        return "the outer server's"

    plugin.attach_router(app)
    with pytest.MonkeyPatch.context() as patch:
        speak_plainly(patch)
        with TestClient(app, headers={"Authorization": f"Bearer {KEY}"}) as outer:
            yield outer
    assert client.open == 0 and not client.errored


def test_its_routes_answer_beside_the_outer_servers(mounted, apar):
    alone = apar.request("alone", PROMPT, max_new_tokens=LIMIT)
    with apar.engine() as engine:
        engine.add(alone)
        while engine.unfinished:
            engine.step()
    assert len(alone.tree.threads) > 1
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": LIMIT, "return_token_ids": True}
    said = mounted.post("/v1/apar/completions", json=body)
    assert said.status_code == 200, said.text
    assert said.json()["choices"][0]["token_ids"] == alone.text_ids
    assert mounted.get("/v1/apar/models").json()["data"][0]["id"] == "its-name"
    assert mounted.get("/v1/models").json() == "the outer server's"
    assert mounted.get("/v1/apar/health").json() == {"status": "ready"}
    gone = mounted.post("/v1/apar/responses", json={})
    assert gone.status_code == 404 and "/chat/completions" in gone.json()["error"]["message"]
    assert mounted.post("/v1/completions", json=body).status_code == 404


def test_the_page_asks_the_api_where_it_is_mounted(mounted):
    page = mounted.get("/v1/apar")
    assert page.status_code == 200 and page.url.path == "/v1/apar/"
    (api,) = re.findall(r'<meta name="api" content="(.*)" />', page.text)
    assert api == ""  # beside the page itself
    for name in set(re.findall(r'(?:href|src)="(page/[^"]+)"', page.text)):
        assert mounted.get(f"/v1/apar/{name}").content == page_files()[name.removeprefix("page/")].content
    assert mounted.get("/v1/apar/page/index.html").content == page.content


def test_its_guards_know_where_it_is_mounted(mounted):
    stranger = {"Authorization": ""}
    for path in ("/v1/apar/", "/v1/apar/health", "/v1/apar/page/main.js"):
        assert mounted.get(path, headers=stranger).status_code == 200
    for path in ("/v1/apar/models", "/v1/apar/metrics", "/v1/apar/page", "/v1/apar/nothing"):
        assert mounted.get(path, headers=stranger).status_code == 401
