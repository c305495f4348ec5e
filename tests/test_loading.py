"""`load`: what a name stands for, and that every part of it arrives in the model."""

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from medusa_apar import attach
from medusa_apar.heads import Eagle3Heads, MedusaHeads
from medusa_apar.job import Job, quiet, slow
from medusa_apar.loading import _check_devices, load
from medusa_apar.models import hub
from medusa_apar.runtimes.cpu import library, pack_files
from medusa_apar.threads.control_tokens import ControlTokens
from tests.support.folders import PROMPT, forking_folder, word_adapter, word_folder, word_model

FORK, CHILD = 3, 4


@pytest.fixture
def base(tmp_path):
    return word_folder(tmp_path / "base")


@pytest.fixture
def adapter(base, tmp_path):
    """Over `base`, which it names relative to itself, and its logits before merging."""
    return word_adapter(base, tmp_path / "adapter")


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


def test_of_a_drafter_and_medusa_heads_beside_a_model_the_drafter_is_its_own(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    MedusaHeads.random(model, num_heads=2).save_pretrained(base / "medusa")
    assert load(base).heads.kind == "medusa"
    Eagle3Heads.random(model).save_pretrained(base / "eagle3")
    assert load(base).heads.kind == "eagle3"
    assert load(base, heads="medusa").heads.kind == "medusa"
    assert load(base, heads="eagle3").heads.kind == "eagle3"


def test_heads_alone_name_their_base(base, tmp_path):
    heads = MedusaHeads.random(AutoModelForCausalLM.from_pretrained(base), num_heads=2)
    heads.save_pretrained(tmp_path / "heads")
    apar = load(tmp_path / "heads")
    assert apar.heads.num_heads == 2
    assert torch.equal(logits(apar), word_model()(PROMPT).logits)
    assert load(base, heads=tmp_path / "heads").heads.num_heads == 2


def test_the_embedded_name_takes_weights_from_the_package(base, adapter, monkeypatch):
    folder, expected = adapter
    monkeypatch.setattr(hub, "embedded_model_dir", lambda name: base)
    monkeypatch.setattr("medusa_apar.models.sources.shipped_weights", lambda name: folder)
    apar = load()
    torch.testing.assert_close(logits(apar), expected)
    assert apar.control_token_ids == ControlTokens(FORK, CHILD)


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


def test_every_part_of_the_package_is_there_after_one_import():
    script = "import medusa_apar; print(medusa_apar.heads.MedusaHeads, medusa_apar.events, medusa_apar.display)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])
    script = "import sys; from medusa_apar.commands import cli; cli.parser().format_help()"
    script += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])


# ---- what is refused, before any weight is read


@pytest.fixture
def no_weights(monkeypatch):
    def fail(*args, **options):
        raise AssertionError("weights were read before the arguments were checked")

    monkeypatch.setitem(load.__globals__, "read_model", fail)


@pytest.mark.usefixtures("no_weights")
class TestRefusals:
    def test_several_gpus(self, base):
        with pytest.raises(NotImplementedError, match="over 2 GPUs.*vLLM"):
            load(base, device_map={"model.embed_tokens": 0, "model.layers": "cuda:1", "lm_head": "cpu"})
        with pytest.raises(ValueError, match="device_map names 'gpu', which is no device"):
            load(base, device_map={"": "gpu"})
        with pytest.raises(ValueError, match="device or device_map, not both"):
            load(base, device_map="auto", device="cpu")

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


@pytest.mark.real
def test_the_default_forks_and_drafts():
    apar = load()
    assert apar.control_token_ids == ControlTokens(15, 16, max_depth=2)
    assert apar.heads is not None
    assert apar.model.get_input_embeddings().weight is apar.model.get_output_embeddings().weight


# ---- packed weights that the next start finds


@pytest.fixture
def cache(tmp_path, monkeypatch):
    library.library()  # compiled before there is another cache
    monkeypatch.setenv("MEDUSA_APAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packs"


def test_packed_weights_are_kept_where_that_is_asked_for_or_worth_it(tmp_path, cache, monkeypatch):
    folder, call = forking_folder(tmp_path / "model", "wide_llama"), {"max_new_tokens": 20, "do_sample": False}
    options = {"quantize": "int8", "speculation": "off"}
    expected = load(folder, **options).generate(PROMPT, **call)
    assert not cache.exists()
    monkeypatch.setattr(pack_files, "WORTH", 1000)
    load(folder, **options, keep_packed=False)
    assert not cache.exists()
    for keep in (None, True):
        assert torch.equal(load(folder, **options, keep_packed=keep).generate(PROMPT, **call), expected)
    assert len(list(cache.glob("*/packed.safetensors"))) == 1
    load(folder, speculation="off", keep_packed=True, runtime="cpu")
    load(folder, speculation="off")
    assert len(list(cache.glob("*/packed.safetensors"))) == 2


def test_what_is_attached_later_is_not_kept(tmp_path, cache):
    """A model that is the caller's may be trained and attached again and again."""
    model = load(forking_folder(tmp_path / "model", "wide_llama"), keep_packed=True, quantize="int8").model
    model.lm_head.weight.data.neg_()
    attach(model, quantize="int8")
    assert len(list(cache.glob("*/packed.safetensors"))) == 1


@pytest.mark.parametrize("options", [{}, {"runtime": "torch"}])
def test_keeping_packed_weights_needs_the_runtime_that_packs(options):
    with pytest.raises(
        ValueError, match="keep_packed=True needs the CPU runtime: give quantize='int8' or runtime='cpu'"
    ):
        load("/no/such/folder", keep_packed=True, **options)
