"""Packs on disk: the bits of what is packed in memory, made anew where they are damaged or another's."""

import copy
import multiprocessing
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from medusa_apar.eval.check import logits_alone
from medusa_apar.models import hub
from medusa_apar.runtimes.cpu import pack_files
from medusa_apar.runtimes.cpu.pack_files import FILE, read_pack
from medusa_apar.runtimes.cpu.packed_model import packs_of
from medusa_apar.runtimes.cpu.runtime import CpuRuntime
from medusa_apar.runtimes.cpu.weights import PackedMatrix
from tests.support.models import COMPILED, model_of, random_model

IDS = [5, 9, 17, 30, 44, 12, 8]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDUSA_APAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packs"


def logits(model, kind="int8", keep=None):
    """Of a model that was just read, or with `keep` None of one that is somebody's."""
    packs_of(model).kinds.clear()
    runtime = CpuRuntime(model, kind)
    if keep is not None:
        with pack_files.loading(model, keep), runtime.session():
            pass
    return logits_alone(runtime, IDS, 0)


def packs(cache):
    return sorted(folder for folder in cache.iterdir() if not folder.name.startswith("."))


@pytest.fixture
def no_packing(monkeypatch):
    def refuse(*_):
        raise AssertionError("a matrix is packed")

    return lambda: monkeypatch.setattr(PackedMatrix, "of", refuse)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["llama, biases", "gemma3", "phi3"])
def test_a_mapped_pack_has_the_bits_of_one_in_memory(name, kind, cache, no_packing):
    model = model_of(name, seed=2)
    expected = logits(model, kind)
    assert torch.equal(logits(model, kind, keep=False), expected) and not cache.exists()
    assert torch.equal(logits(model, kind, keep=True), expected)
    no_packing()
    assert torch.equal(logits(copy.deepcopy(model), kind, keep=True), expected)
    matrices = read_pack(packs(cache)[0] / FILE, packs(cache)[0].name, kind)
    for matrix in matrices.values():
        assert all(tensor.data_ptr() % 64 == 0 for tensor in matrix.stored.values())
    assert ("bias" in matrices["layers.0.down"].stored) == (name == "llama, biases")


def test_a_pack_is_read_from_its_file(cache):
    model = model_of(seed=2)
    logits(model, keep=True)
    assert str(packs(cache)[0] / FILE) in Path("/proc/self/maps").read_text()


def test_other_weights_kinds_and_settings_never_find_a_pack(cache):
    model = model_of("granite", seed=2)
    before = logits(model, keep=True)
    for change in (
        lambda: model.model.layers[1].mlp.up_proj.weight.data[3, 4].add_(2),
        lambda: model.lm_head.weight.data.mul_(1.01),
        lambda: model.model.norm.weight.data.neg_(),
        lambda: [setattr(layer.self_attn, "scaling", 0.3) for layer in model.model.layers],
    ):
        change()
        found = logits(model, keep=True)
        assert torch.equal(found, logits(model)) and not torch.equal(found, before)
        before = found
    logits(model, "float32", keep=True)
    assert len(packs(cache)) == 6


def test_the_same_weights_in_other_modules_are_another_pack(cache):
    config = COMPILED["llama, no groups"]()
    config.num_hidden_layers, config.hidden_size = 1, config.num_attention_heads * config.head_dim
    models = [random_model(config, 2, 6.0) for _ in range(2)]
    for model, (shared, other) in zip(models, [("k_proj", "v_proj"), ("v_proj", "k_proj")], strict=True):
        attention = model.model.layers[0].self_attn
        getattr(attention, other).weight = nn.Parameter(attention.o_proj.weight.detach().clone())
        getattr(attention, shared).weight = attention.q_proj.weight
    first, second = (logits(model, keep=True) for model in models)
    assert torch.equal(second, logits(models[1])) and not torch.equal(second, first)
    assert len(packs(cache)) == 2


def test_weights_that_change_after_loading_are_noticed(cache):
    model = model_of(seed=2)
    packs_of(model)
    runtime = CpuRuntime(model, "int8")
    with pack_files.loading(model, True), runtime.session():
        pass
    before = logits_alone(runtime, IDS, 0)
    model.model.layers[0].mlp.down_proj.weight.data.neg_()
    found = logits_alone(runtime, IDS, 0)
    assert torch.equal(found, logits(copy.deepcopy(model))) and not torch.equal(found, before)
    assert len(packs(cache)) == 1  # what changes later is not kept


def cut(size):
    def damage(folder):
        os.truncate(folder / FILE, size if size >= 0 else (folder / FILE).stat().st_size + size)

    return damage


def flip(place):
    def damage(folder):
        data = bytearray((folder / FILE).read_bytes())
        data[place] ^= 1
        (folder / FILE).write_bytes(data)

    return damage


HEADER = pack_files._HEADER
DAMAGE = {
    "an empty file": cut(0),
    "cut in the header's length": cut(5),
    "cut in the header": cut(200),
    "cut behind the header": cut(HEADER),
    "cut in the first matrix": cut(HEADER + 100),
    "its last byte cut": cut(-1),
    "a bit of the length": flip(2),
    "a bit of a name": flip(60),
    "a bit of the space behind the header": flip(HEADER - 1),
    "a bit of a weight": flip(HEADER + 77),
    "the last bit": flip(-1),
    "no file": lambda folder: (folder / FILE).unlink(),
    "no digest": lambda folder: (folder / f"{FILE}.sha256").unlink(),
    "a damaged digest": lambda folder: (folder / f"{FILE}.sha256").write_bytes(b"\xff\xfe"),
}


@pytest.fixture
def kept(cache):
    model = model_of(seed=2)
    return model, logits(model, keep=True), packs(cache)[0]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_pack_is_made_anew(damage, kept, cache, capfd):
    model, expected, folder = kept
    whole = (folder / FILE).read_bytes()
    DAMAGE[damage](folder)
    assert torch.equal(logits(model, keep=True), expected)
    assert capfd.readouterr().err == f"medusa-apar: {folder} is damaged and is made anew\n"
    assert (folder / FILE).read_bytes() == whole and len(packs(cache)) == 1


@pytest.mark.parametrize("other", ["another model's", "of another kind"])
def test_a_pack_in_anothers_place_is_made_anew(other, kept, cache, capfd):
    model, expected, folder = kept
    logits(*((model_of(seed=3), "int8") if other == "another model's" else (model, "float32")), keep=True)
    (stranger,) = set(packs(cache)) - {folder}
    shutil.rmtree(folder)
    shutil.copytree(stranger, folder)
    assert torch.equal(logits(model, keep=True), expected)
    assert "is damaged and is made anew" in capfd.readouterr().err


@pytest.mark.parametrize("size", [0, 5, 200, HEADER, HEADER + 100, -1])
def test_a_file_that_is_cut_says_so_where_no_digest_is_asked_for(size, kept):
    folder = kept[2]
    cut(size)(folder)
    with pytest.raises((ValueError, OSError), match=FILE):
        read_pack(folder / FILE, folder.name, "int8")


def test_a_stranger_is_refused_in_a_sentence(kept):
    folder = kept[2]
    with pytest.raises(ValueError, match="holds other weights than its place says"):
        read_pack(folder / FILE, "0" * 32, "int8")
    with pytest.raises(ValueError, match="is in int8, and float32 was asked for"):
        read_pack(folder / FILE, folder.name, "float32")


def test_two_that_begin_at_once_make_one_pack(cache):
    models = [model_of(seed=2), model_of(seed=2)]
    found = [None, None]

    def start(index):
        found[index] = logits(models[index], keep=True)

    starts = [threading.Thread(target=start, args=(index,)) for index in range(2)]
    for each in starts:
        each.start()
    for each in starts:
        each.join()
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], logits(models[0]))
    assert len(packs(cache)) == 1


def test_where_it_cannot_be_kept_it_is_packed_in_memory(cache, monkeypatch, caplog, tmp_path):
    model = model_of(seed=2)
    expected = logits(model)
    with monkeypatch.context() as patch:
        patch.setattr(pack_files.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        assert torch.equal(logits(model, keep=True), expected)
    assert "has 0 MB free" in caplog.text and not packs(cache)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEDUSA_APAR_CACHE", str(tmp_path / "file"))
    assert torch.equal(logits(model, keep=True), expected)
    assert "set MEDUSA_APAR_CACHE to a folder you may write to" in caplog.text


@pytest.mark.parametrize("error", [RuntimeError("can't allocate memory"), MemoryError("no addresses are left")])
def test_where_a_pack_cannot_be_mapped_it_is_packed_in_memory(error, cache, monkeypatch, caplog, capfd):
    model = model_of(seed=2)
    expected = logits(model)

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(pack_files, "safe_open", refuse)
    for _ in range(2):  # one that was just written, and one that was there, which stays
        assert torch.equal(logits(model, keep=True), expected)
        assert str(error) in caplog.text and "damaged" not in capfd.readouterr().err and len(packs(cache)) == 1
        caplog.clear()


def test_where_nothing_can_be_locked_it_is_packed_in_memory(cache, monkeypatch, caplog):
    model = model_of(seed=2)
    expected = logits(model)

    def refuse(*_, **__):
        raise NotImplementedError("no locks here")

    monkeypatch.setattr(hub.FileLock, "acquire", refuse)
    assert torch.equal(logits(model, keep=True), expected)
    assert "no locks here" in caplog.text and not packs(cache)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["llama, biases", "phi3"])
def test_as_much_room_is_asked_for_as_a_pack_takes(name, kind, cache, monkeypatch, caplog):
    model = model_of(name, seed=2)
    logits(model, kind, keep=True)
    (folder,) = packs(cache)
    size = (folder / FILE).stat().st_size
    for free, kept in ((size - 1, False), (size + (size - HEADER) // 50, True)):
        shutil.rmtree(folder, ignore_errors=True)
        monkeypatch.setattr(pack_files.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        logits(model, kind, keep=True)
        assert bool(packs(cache)) == kept == (not caplog.text)
        caplog.clear()


def test_weights_that_change_while_they_are_packed_are_not_kept(cache, monkeypatch, caplog):
    model = model_of(seed=2)
    of = PackedMatrix.of

    def changed(source, kind):
        model.lm_head.weight.data.mul_(1.5)
        return of(source, kind)

    monkeypatch.setattr(PackedMatrix, "of", changed)
    runtime = CpuRuntime(model, "int8")
    with pack_files.loading(model, True), runtime.session():
        pass
    assert "were changed while they were packed" in caplog.text and not packs(cache)
    monkeypatch.undo()
    assert torch.equal(logits_alone(runtime, IDS, 0), logits(copy.deepcopy(model)))


def test_the_longest_unused_go_where_there_are_too_many(cache, monkeypatch):
    models = [model_of(seed=seed) for seed in range(3)]
    logits(models[0], keep=True)
    (first,) = packs(cache)
    size = (first / FILE).stat().st_size
    monkeypatch.setattr(pack_files, "MOST", 2 * size)
    logits(models[1], keep=True)
    (second,) = set(packs(cache)) - {first}
    os.utime(second, (0, 0))
    os.utime(first, (1, 1))
    logits(models[1], keep=True)  # used again
    logits(models[2], keep=True)
    assert len(packs(cache)) == 2 and second in packs(cache) and first not in packs(cache)
    monkeypatch.setattr(pack_files, "MOST", 0)
    logits(models[0], keep=True)
    assert len(packs(cache)) == 1  # the one that is in use


def test_what_goes_makes_room_for_smaller_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(pack_files, "MOST", 16)
    for age, size in enumerate([10, 10, 5, 3, 1]):
        folder = tmp_path / f"{age}"
        folder.mkdir()
        (folder / FILE).write_bytes(bytes(size))
        os.utime(folder, (-age, -age))
    pack_files._make_room(tmp_path / "0")
    assert [folder.name for folder in packs(tmp_path)] == ["0", "2", "4"]


def test_what_a_killed_start_left_goes_and_what_is_being_made_stays(cache):
    def killed():
        hub.build_once(cache / ("a" * 32), lambda scratch, new: os._exit(9))

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == 9 and list(cache.glob(".a*-*"))

    def build(scratch, new):
        logits(model_of(seed=2), keep=True)
        assert scratch.is_dir() and not list(cache.glob(".a*-*"))

    hub.build_once(cache / ("b" * 32), build)
    assert len(packs(cache)) == 2 and not list(cache.glob(".*-*"))


def test_large_rounded_models_are_worth_it(monkeypatch):
    model = model_of()
    assert not pack_files.worth_keeping(model, "int8")
    monkeypatch.setattr(pack_files, "WORTH", 1000)
    assert pack_files.worth_keeping(model, "int8") and not pack_files.worth_keeping(model, None)
