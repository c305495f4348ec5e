"""`load`: what a name stands for, and that every part of it arrives in the model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from medusa_apar import attach
from medusa_apar.heads import MedusaHeads
from medusa_apar.job import Job, quiet, slow
from medusa_apar.loading import _check_devices, load
from medusa_apar.models import hub
from medusa_apar.models.sources import locate
from medusa_apar.threads.control_tokens import ControlTokens
from tests.support.folders import PROMPT, forking_folder, word_model
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tokenizers import WORDS, save_tokenizer

FORK, CHILD = 3, 4


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    word_model().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def adapter(base, tmp_path):
    """A LoRA with both control rows over `base`, which it names relative to itself, and its logits before merging."""
    folder = tmp_path / "adapter"
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj"],
        trainable_token_indices=[FORK, CHILD],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "trainable_tokens" in name:
                parameter.normal_()
    tuned.save_pretrained(folder)
    ids = {"fork_token_id": FORK, "child_token_id": CHILD, "base": "../base"}
    (folder / "apar_config.json").write_text(json.dumps(ids))
    with torch.no_grad():
        return folder, tuned(PROMPT).logits


def logits(apar):
    with torch.no_grad():
        return apar.model(PROMPT).logits


# ---- what is loaded


def test_nothing_is_drawn_where_nobody_watches(tmp_path, capsys):
    """Neither transformers' bar nor the line that a terminal shows."""
    logging.enable_progress_bar()
    folder = forking_folder(tmp_path / "model")
    capsys.readouterr()
    load(folder, speculation="off")
    assert capsys.readouterr().err == "" and logging.is_progress_bar_enabled()


def test_a_folder_is_a_plain_model(base):
    apar = load(base)
    assert apar.heads is None and apar.control_token_ids is None
    assert apar.model.dtype == torch.float32
    assert not apar.model.training
    assert apar.tokenizer.convert_ids_to_tokens(9) == "w4"
    assert torch.equal(logits(apar), word_model()(PROMPT).logits)
    expected = apar.model.generate(PROMPT, max_new_tokens=8, do_sample=False)
    assert torch.equal(apar.generate(PROMPT, max_new_tokens=8, do_sample=False), expected)


def test_a_batch_is_padded_where_no_answer_goes_on(base):
    tokenizer = load(base).tokenizer
    tokenizer.pad_token = "<unk>"
    rows = tokenizer(["w1 w2 w3", "w4"], padding=True)["attention_mask"]
    assert tokenizer.padding_side == "left" and rows[1] == [0, 0, 1]


def test_dtype_and_attach_options_arrive(base):
    apar = load(str(base), dtype="bfloat16", max_threads=2, budget=5)
    assert apar.model.dtype == torch.bfloat16
    assert apar.max_threads == 2 and apar.options.budget == 5


def test_an_adapter_is_merged_into_the_base_it_names(adapter):
    folder, expected = adapter
    apar = load(folder)
    assert apar.control_token_ids == ControlTokens(FORK, CHILD)
    assert apar.tokenizer is not None
    torch.testing.assert_close(logits(apar), expected)
    # One matrix still serves both ends, control rows included.
    assert apar.model.get_output_embeddings().weight.data_ptr() == apar.model.get_input_embeddings().weight.data_ptr()


def test_an_adapter_passed_as_apar(base, adapter):
    folder, expected = adapter
    apar = load(base, apar=folder)
    torch.testing.assert_close(logits(apar), expected)
    assert apar.control_token_ids == ControlTokens(FORK, CHILD)


def test_apar_none_leaves_the_base_as_it_was_released(adapter):
    apar = load(adapter[0], apar=None)
    assert apar.control_token_ids is None
    assert torch.equal(logits(apar), word_model()(PROMPT).logits)


def test_control_tokens_given_by_hand(base):
    assert load(base, apar=ControlTokens(5, 6)).control_token_ids == ControlTokens(5, 6)


@pytest.mark.parametrize("place", [".", "medusa"])
def test_heads_beside_a_model(base, place):
    heads = MedusaHeads.random(word_model(), num_heads=2, seed=3)
    if place == ".":  # whose config.json is the model's own
        heads.save_pretrained(base / "elsewhere", dtype=torch.float32)
        (base / "elsewhere" / "medusa_lm_head.safetensors").rename(base / "medusa_lm_head.safetensors")
    else:
        heads.save_pretrained(base / "medusa", dtype=torch.float32)
    apar = load(base)
    assert apar.heads.num_heads == 2
    assert torch.equal(apar.heads.tensors().weight, heads.tensors().weight)
    assert load(base, heads=None).heads is None


def test_other_heads_that_come_with_a_model_are_named(base):
    first, second = (MedusaHeads.random(word_model(), num_heads=count, seed=count) for count in (2, 3))
    first.save_pretrained(base / "elsewhere")
    (base / "elsewhere" / "medusa_lm_head.safetensors").rename(base / "medusa_lm_head.safetensors")
    second.save_pretrained(base / "second")
    assert load(base).heads.num_heads == 2
    assert load(base, heads="second").heads.num_heads == 3
    with pytest.raises(FileNotFoundError, match="heads='third' is no file, folder or Hub id"):
        load(base, heads="third")


def test_heads_alone_name_their_base(base, tmp_path):
    heads = MedusaHeads.random(AutoModelForCausalLM.from_pretrained(base), num_heads=2)
    heads.save_pretrained(tmp_path / "heads")
    apar = load(tmp_path / "heads")
    assert apar.heads.num_heads == 2
    assert torch.equal(logits(apar), word_model()(PROMPT).logits)
    assert load(base, heads=tmp_path / "heads").heads.num_heads == 2


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


def test_the_embedded_name_takes_weights_from_the_package(base, adapter, monkeypatch):
    folder, expected = adapter
    monkeypatch.setattr(hub, "embedded_model_dir", lambda name: base)
    monkeypatch.setattr("medusa_apar.models.sources.shipped_weights", lambda name: folder)
    apar = load()
    torch.testing.assert_close(logits(apar), expected)
    assert apar.control_token_ids == ControlTokens(FORK, CHILD)


def test_a_hub_repository_is_read_like_a_folder(base, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(base))
    assert locate("someone/tiny").base == "someone/tiny"


def test_dtype_auto_is_the_one_that_is_stored(base):
    word_model().to(torch.bfloat16).save_pretrained(base)
    assert load(base, dtype="auto").model.dtype == torch.bfloat16
    assert load(base).model.dtype == torch.float32


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"": torch.device("cpu")}])
def test_a_device_map_of_one_device(base, device_map):
    assert torch.equal(logits(load(base, device_map=device_map)), word_model()(PROMPT).logits)


@pytest.mark.parametrize(
    ("device_map", "gpu", "wanted"),
    [
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float32),
        ("cuda:1", True, torch.bfloat16),
        ("cpu", True, torch.float32),
        ({"": "cpu"}, True, torch.float32),
        ({"a": "cpu", "b": "disk"}, True, torch.float32),
        ({"a": "cpu", "b": 0}, True, torch.bfloat16),
        ({"a": torch.device("cuda"), "b": "disk"}, True, torch.bfloat16),
    ],
)
def test_the_dtype_follows_the_device_map(base, monkeypatch, device_map, gpu, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)

    class Stop(Exception):
        pass

    def read(name, dtype, **options):
        raise Stop(dtype)

    monkeypatch.setitem(load.__globals__, "read_model", read)
    with pytest.raises(Stop) as stopped:
        load(base, device_map=device_map)
    assert stopped.value.args == (wanted,)


@pytest.mark.parametrize(
    "device_map",
    [{"a": 0, "b": "cuda:0"}, {"a": "cuda", "b": "cuda:0"}, {"a": torch.device("cuda", 1), "b": 1, "c": "disk"}],
)
def test_one_gpu_by_several_names_is_one(device_map):
    _check_devices(device_map)


@pytest.mark.parametrize("whole_model", [True, False])
def test_a_hub_repository_with_an_adapter_is_taken_as_a_folder_is(base, adapter, tmp_path, monkeypatch, whole_model):
    """Of which the first download has the small files alone."""
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


def test_the_token_arrives_where_heads_are_downloaded(base, tmp_path, monkeypatch):
    MedusaHeads.random(word_model(), num_heads=2).save_pretrained(tmp_path / "heads")
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **options: asked.append((name, options.get("token"))) or str(tmp_path / "heads"),
    )
    assert load(base, heads="someone/private", token="secret").heads.num_heads == 2
    assert asked == [("someone/private", "secret")]


@pytest.mark.parametrize("stream", [None, open(os.devnull, "w")])  # noqa: SIM115
def test_a_daemon_without_standard_error_loads(base, tmp_path, monkeypatch, capsys, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    quiet()
    with slow("loading"):
        apar = load(base)
    with Job(tmp_path / "job", "train-heads", {}) as job:
        job.say("done")
    assert torch.equal(logits(apar), word_model()(PROMPT).logits)
    assert capsys.readouterr().out == ""


def test_weights_on_disk_are_read_as_they_are_needed(base):
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    spread = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}
    apar = load(base, device_map=spread)
    expected = word_model().generate(PROMPT, max_new_tokens=8, do_sample=False)
    assert torch.equal(apar.generate(PROMPT, max_new_tokens=8, do_sample=False), expected)


def test_revision_and_token_arrive_at_the_hub(base, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options) or str(base)
    )
    assert locate("someone/tiny", revision="v2", token="secret").revision == "v2"
    assert asked["revision"] == "v2" and asked["token"] == "secret"


def test_a_saved_model_forks_and_drafts_again(adapter, tmp_path):
    MedusaHeads.random(word_model(), num_heads=2, seed=3).save_pretrained(tmp_path / "heads", dtype=torch.float32)
    apar = load(adapter[0], heads=tmp_path / "heads")
    for _ in range(2):  # onto itself too
        apar.save_pretrained(tmp_path / "saved")
        again = load(tmp_path / "saved")
        assert torch.equal(logits(again), logits(apar))
        assert again.control_token_ids == apar.control_token_ids is not None
        assert torch.equal(again.heads.tensors().weight, apar.heads.tensors().weight)
        assert torch.equal(logits(load(tmp_path / "saved" / "medusa")), logits(apar))
        apar = again
    assert torch.equal(logits(load(tmp_path / "saved", apar=None)), logits(apar))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no model"):
        apar.save_pretrained(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_what_transformers_saves_of_a_loaded_model_forks_again(adapter, tmp_path):
    apar = load(adapter[0])
    apar.model.save_pretrained(tmp_path / "saved")
    apar.tokenizer.save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved").control_token_ids == apar.control_token_ids is not None
    assert ControlTokens.from_pretrained(tmp_path / "saved") == apar.control_token_ids
    plain = load(tmp_path / "saved", apar=None)
    assert plain.control_token_ids is None
    plain.save_pretrained(tmp_path / "plain")
    plain.model.save_pretrained(tmp_path / "by transformers")
    apar.tokenizer.save_pretrained(tmp_path / "by transformers")
    attach(apar.model, apar=None, tokenizer=apar.tokenizer).save_pretrained(tmp_path / "attached")
    for folder in ("plain", "by transformers", "attached"):
        assert load(tmp_path / folder).control_token_ids is None


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


def test_every_part_of_the_package_is_there_after_one_import():
    script = "import medusa_apar; print(medusa_apar.heads.MedusaHeads, medusa_apar.events, medusa_apar.display)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])
    script = "import sys; from medusa_apar.commands import cli; cli.parser().format_help()"
    script += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])


# ---- weights that are not the model's


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


# ---- what is refused, before any weight is read


@pytest.fixture
def no_weights(monkeypatch):
    def fail(*args, **options):
        raise AssertionError("weights were read before the arguments were checked")

    monkeypatch.setitem(load.__globals__, "read_model", fail)


@pytest.mark.usefixtures("no_weights")
class TestRefusals:
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

    def test_several_gpus(self, base):
        with pytest.raises(NotImplementedError, match="over 2 GPUs.*vLLM"):
            load(base, device_map={"model.embed_tokens": 0, "model.layers": "cuda:1", "lm_head": "cpu"})
        with pytest.raises(ValueError, match="device_map names 'gpu', which is no device"):
            load(base, device_map={"": "gpu"})
        with pytest.raises(ValueError, match="device or device_map, not both"):
            load(base, device_map="auto", device="cpu")

    def test_a_revision_of_a_folder(self, base):
        with pytest.raises(ValueError, match="revision='main' is of a Hub repository"):
            load(base, revision="main")

    def test_control_tokens_insisted_on_but_missing(self, base):
        with pytest.raises(ValueError, match="has no control tokens"):
            load(base, apar=True)
        with pytest.raises(FileNotFoundError, match="holds neither apar_config.json nor adapter_config.json"):
            load(base, apar=base)
        (base / "apar_config.json").write_text('{"fork_token_id": 3}')
        with pytest.raises(ValueError, match="child_token_id"):
            load(base)

    def test_missing_heads(self, base):
        with pytest.raises(FileNotFoundError, match="heads='./nothing' is no file, folder or Hub id"):
            load(base, heads="./nothing")

    def test_empty_names(self, base):
        with pytest.raises(ValueError, match="heads is empty"):
            load(base, heads="")
        with pytest.raises(ValueError, match="apar is empty"):
            load(base, apar="")
        with pytest.raises(ValueError, match="name of the heads is empty"):
            attach(word_model(), heads="")
        with pytest.raises(ValueError, match="name of the control tokens' folder is empty"):
            attach(word_model(), apar="")

    @pytest.mark.parametrize("dtype", ["float33", "int8", torch.int64])
    def test_dtype(self, base, dtype):
        with pytest.raises(ValueError, match="must be float32, bfloat16, float16, float64 or auto"):
            load(base, dtype=dtype)


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


@pytest.mark.real
def test_the_default_forks_and_drafts():
    apar = load()
    assert apar.control_token_ids == ControlTokens(15, 16, max_depth=2)
    assert apar.heads is not None
    assert apar.model.get_input_embeddings().weight is apar.model.get_output_embeddings().weight
