"""vLLM behind our server, as far as it goes without vLLM: the model that it is given, and when it answers."""

import json
import signal
import threading
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_apar.heads import MedusaHeads
from medusa_apar.loading import load
from medusa_apar.serve.options import ServeOptions
from medusa_apar.serve.vllm_backend import Served, VllmBackend
from tests.support.eagle3_files import LAYOUTS, checkpoint
from tests.support.folders import forking_folder, lora_of
from tests.support.models import CHILD, FORK, VOCAB
from tests.support.serving import SECONDS, running, wait_until
from tests.support.vllm_client import client_of, speak_plainly

PROMPT, LIMIT = [7, 8, 9, 10], 40


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return forking_folder(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapter(base):
    folder = base.parent / "adapter"
    lora_of(base, folder, target_modules=["v_proj"])
    control = {"fork_token_id": FORK, "child_token_id": CHILD, "max_depth": 2, "base": "../base"}
    (folder / "apar_config.json").write_text(json.dumps(control))
    return folder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDUSA_APAR_CACHE", str(tmp_path))
    speak_plainly(monkeypatch)


def backend(served, started):
    named = ("revision", "hf_token", "tokenizer", "tokenizer_revision", "served_model_name", "speculative_config")
    args = Namespace(model=served.model, trust_remote_code=False, **dict.fromkeys(named))
    return VllmBackend(served, args, ServeOptions(), started)


class Started:
    """Keeps the arguments that vLLM would start with, and answers with the model that they name."""

    def __call__(self, args):
        self.args = Namespace(**vars(args))
        self.client = client_of(load(args.model, heads=None, speculation="off"), args.model)
        return self.client, None


def answer(server, **body):
    with server.client() as client:
        asked = {"prompt": PROMPT, "temperature": 0, "return_token_ids": True} | body
        said = client.post("/v1/completions", json=asked)
    assert said.status_code == 200, said.text
    return said.json()


def test_an_adapter_is_merged_once_and_answered_with_as_by_our_own_engine(adapter):
    apar, started = load(adapter, heads=None, speculation="off"), Started()
    alone = apar.request("alone", PROMPT, max_new_tokens=LIMIT)
    with apar.engine() as engine:
        engine.add(alone)
        while engine.unfinished:
            engine.step()
    assert len(alone.tree.threads) > 1
    folders = []
    for _ in range(2):
        with running(backend(Served(str(adapter)), started)) as server:
            facts = server.service.facts
            assert facts.control_token_ids == apar.control_token_ids and facts.max_depth == 2
            assert (facts.context, facts.vocabulary) == (apar.facts.context, apar.facts.vocabulary)
            assert facts.generation_config.max_new_tokens == 9  # as vLLM was told to
            assert answer(server, max_tokens=LIMIT)["choices"][0]["token_ids"] == alone.text_ids
            with server.client() as client:
                assert client.get("/version").json()["engine"] == "vllm"
        folders.append(Path(started.args.model))
        assert not (folders[-1] / "adapter_config.json").exists() and not (folders[-1] / "medusa").exists()
    assert folders[0] == folders[1] != adapter


def test_an_eagle3_drafter_goes_along_with_rows_of_the_base(base, tmp_path):
    heads, started = tmp_path / "drafter", Started()
    model = load(base, heads=None, speculation="off").model
    layout = replace(LAYOUTS["its authors'"], unembedding=False, states=2, more={"boundaries": [1, 2]})
    state, config = checkpoint(layout, hidden=model.config.hidden_size, vocab=VOCAB)
    heads.mkdir()
    save_file(state, heads / "model.safetensors")
    (heads / "config.json").write_text(json.dumps(config))
    with running(backend(Served(str(base), heads=str(heads)), started)) as server:
        answer(server, max_tokens=2)
    asked = started.args.speculative_config
    assert asked["method"] == "eagle3" and asked["num_speculative_tokens"] == 3
    written = load_file(Path(asked["model"]) / "model.safetensors")
    assert torch.equal(written["midlayer.mlp.up_proj.weight"], state["midlayer.mlp.up_proj.weight"])
    ids = state["d2t"] + torch.arange(len(state["d2t"]))
    assert torch.equal(written["lm_head.weight"], model.get_output_embeddings().weight[ids])


def test_a_plain_model_is_left_where_it_is_and_medusa_heads_go_along(base, tmp_path):
    heads, started = tmp_path / "heads", Started()
    MedusaHeads.random(load(base, heads=None, speculation="off").model, num_heads=2).save_pretrained(heads)
    its = backend(Served(str(base), heads=str(heads)), started)
    with running(its) as server:
        answer(server, max_tokens=2)
    assert started.args.model == str(base)
    drafter = started.args.speculative_config
    assert (drafter["method"], drafter["num_speculative_tokens"]) == ("medusa", 2)
    assert (Path(drafter["model"]) / "model.safetensors").is_file()


def test_a_server_answers_for_itself_while_vllm_loads_and_ends_without_waiting_for_it(base):
    loaded = threading.Event()
    with running(backend(Served(str(base)), lambda args: loaded.wait(SECONDS)), ready=False) as server:
        with server.client() as client:
            assert client.get("/health").json() == {"status": "loading"}
            assert client.get("/metrics").status_code == 200
            refused = client.post("/v1/completions", json={"prompt": PROMPT})
            assert refused.status_code == 503 and "being loaded" in refused.json()["error"]["message"]
        server.server.handle_exit(signal.SIGTERM, None)
        server.thread.join(SECONDS)
        assert not server.thread.is_alive() and not loaded.is_set()
    loaded.set()


def test_a_vllm_that_does_not_start_is_one_sentence(base):
    def started(args):
        raise RuntimeError("Engine core initialization failed.")

    with running(backend(Served(str(base)), started), ready=False) as server:
        server.thread.join(SECONDS)
        with pytest.raises(ValueError, match="^vLLM did not start: Engine core initialization failed"):
            raise server.service.failure


def test_an_engine_that_dies_is_told_to_health(base):
    started = Started()
    with running(backend(Served(str(base)), started)) as server, server.client() as client:
        started.client.dies_after = started.client.written + 3
        told = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 40, "temperature": 0})
        assert told.status_code == 503 and "engine has died" in told.json()["error"]["message"]
        wait_until(lambda: client.get("/health").status_code == 503)
        assert client.get("/health").json() == {"status": "broken"}
