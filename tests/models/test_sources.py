"""What a model's name stands for, and that nothing of what lies there is made up or missed."""

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from medusa_apar.loading import load
from medusa_apar.models.sources import locate
from medusa_apar.threads.control_tokens import ControlTokens
from tests.support.folders import PROMPT, word_adapter, word_folder, word_model
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tokenizers import WORDS, save_tokenizer


@pytest.fixture
def base(tmp_path):
    return word_folder(tmp_path / "base")


@pytest.fixture
def adapter(base, tmp_path):
    return word_adapter(base, tmp_path / "adapter")


@pytest.fixture
def no_weights(monkeypatch):
    def fail(*args, **options):
        raise AssertionError("weights were read before the arguments were checked")

    monkeypatch.setitem(load.__globals__, "read_model", fail)


def logits(apar):
    with torch.no_grad():
        return apar.model(PROMPT).logits


def test_tokens_of_released_apar_models_are_found(base):
    save_tokenizer(base, [*WORDS[:-2], "[SplitMask]", "[SplitSop]"])
    assert load(base).control_token_ids == ControlTokens(len(WORDS) - 2, len(WORDS) - 1)
    assert load(base, apar=True).control_token_ids is not None
    assert load(base, apar=None).control_token_ids is None


def test_a_gguf_file(tmp_path):
    write_tiny_gguf(tmp_path / "tiny.gguf")
    apar = load(tmp_path / "tiny.gguf")
    ids = apar.tokenizer('!"#', return_tensors="pt")
    expected = apar.model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(apar.generate(**ids, max_new_tokens=4, do_sample=False), expected)


def test_a_hub_repository_is_read_like_a_folder(base, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(base))
    assert locate("someone/tiny").base == "someone/tiny"


@pytest.mark.parametrize("whole_model", [True, False])
def test_a_hub_repository_with_an_adapter_is_taken_as_a_folder_is(base, adapter, tmp_path, monkeypatch, whole_model):
    """The first download has the small files alone."""
    small = tmp_path / "small"
    small.mkdir()
    names = ["adapter_config.json", "adapter_model.safetensors"]
    for place in (*(adapter[0] / name for name in names), base / "config.json"):
        (small / place.name).write_bytes(place.read_bytes())
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(small))
    names += ["model.safetensors"] if whole_model else []
    kept = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, **options: kept)
    if whole_model:
        with pytest.raises(ValueError, match="someone/tiny holds a model's weights and an adapter too"):
            locate("someone/tiny")
    else:
        assert locate("someone/tiny").adapter == small


def test_revision_and_token_arrive_at_the_hub(base, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options) or str(base)
    )
    assert locate("someone/tiny", revision="v2", token="secret").revision == "v2"
    assert asked["revision"] == "v2" and asked["token"] == "secret"


def test_paths_of_every_kind(tmp_path, monkeypatch):
    folder = tmp_path / "a böse name"
    word_model().save_pretrained(folder)
    save_tokenizer(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in (folder, str(folder), f"~/{folder.name}", f"./{folder.name}", f"{folder}/", Path(folder.name)):
        assert torch.equal(logits(load(name)), word_model()(PROMPT).logits)
    write_tiny_gguf(tmp_path / "TINY.GGUF")
    assert load("~/TINY.GGUF").model.config.vocab_size == load(tmp_path / "TINY.GGUF").tokenizer.vocab_size


def without(name):
    state = word_model().state_dict()
    del state[name]
    return state


def test_missing_weights_are_not_made_up(base):
    save_file(
        {k: v.clone() for k, v in without("lm_head.weight").items()}, base / "model.safetensors", {"format": "pt"}
    )
    assert torch.equal(logits(load(base)), word_model()(PROMPT).logits)  # tied to the embedding
    state = without("model.layers.1.mlp.up_proj.weight")
    del state["lm_head.weight"]
    save_file(state, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"base lacks 1 of the model's weights, model.layers.1.mlp.up_proj.weight"):
        load(base)
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(state, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"1 of .* in another shape: .*up_proj.weight for one has \[3, 3\] and needs \[32, 16\]"
    ):
        load(base)
    (base / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"base cannot be read \(.*no file named"):
        load(base)


@pytest.mark.parametrize(
    "place", ["../outside.safetensors", "/outside.safetensors", "", 5, "inner/../../x.safetensors"]
)
def test_an_index_names_no_file_outside_of_its_folder(base, place):
    index = {"weight_map": dict.fromkeys(word_model().state_dict(), place)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index.json says that .* which is no file of its folder"):
        load(base)


@pytest.mark.usefixtures("no_weights")
class TestSources:
    def test_missing_paths(self):
        with pytest.raises(ValueError, match="name is empty"):
            load("")
        for name in ("./nothing", "/no/such/folder", "~/nothing", "model.gguf"):
            with pytest.raises(FileNotFoundError, match="does not exist"):
                load(name)

    def test_unknown_name(self, monkeypatch):
        def offline(name, **options):
            raise LocalEntryNotFoundError("cannot reach the Hub\nand more")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
        with pytest.raises(
            ConnectionError, match=r"unknown model 'smollm3'.*cannot be reached \(cannot reach the Hub\)"
        ):
            load("smollm3")
        monkeypatch.undo()
        with pytest.raises(ValueError, match="unknown model 'not a name!': not smollm2-135m"):
            load("not a name!")

    def test_files_and_folders_that_are_no_model(self, tmp_path):
        (tmp_path / "notes.txt").write_text("")
        with pytest.raises(ValueError, match="no GGUF file"):
            load(tmp_path / "notes.txt")
        with pytest.raises(ValueError, match="holds no model"):
            load(tmp_path)
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(ValueError, match="config.json is not valid JSON"):
            load(tmp_path)

    def test_an_adapter_whose_base_is_gone(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/gone"}')
        with pytest.raises(FileNotFoundError, match="names /gone as its base model, but /gone does not exist"):
            load(tmp_path)

    def test_an_adapter_without_weights(self, adapter):
        (adapter[0] / "adapter_model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="adapter holds adapter_config.json, but neither adapter_model"):
            load(adapter[0])

    def test_an_adapter_among_a_models_weights(self, base, adapter):
        (base / "adapter_config.json").write_text((adapter[0] / "adapter_config.json").read_text())
        with pytest.raises(ValueError, match="holds a model's weights and an adapter too"):
            load(base)

    @pytest.mark.parametrize("named", [(".",), ("",), ("../two", "../one"), ("../two", "../two")])
    def test_bases_that_go_round_in_circles(self, tmp_path, named):
        for folder, base in zip(("one", "two"), named, strict=False):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        with pytest.raises(ValueError, match="builds on|names a base model"):
            load(tmp_path / "one")

    def test_a_revision_of_a_folder(self, base):
        with pytest.raises(ValueError, match="revision='main' is of a Hub repository"):
            load(base, revision="main")


def test_code_of_a_repository_does_not_run_by_itself(base, tmp_path):
    config = json.loads((base / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
    }
    (base / "config.json").write_text(json.dumps(config))
    (base / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(base)
    assert not Path(tmp_path / "ran").exists()
