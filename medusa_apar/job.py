"""A long command's footprint: a log, a progress bar, a report, and files that are never half written."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError

from .reading import out_of_memory

if TYPE_CHECKING:
    from accelerate import Accelerator

TORCH_WRITER = re.compile("inline_container|PytorchStreamWriter")  # of torch.save, whose errors are RuntimeErrors


def launched(folder: Path) -> Accelerator:
    """This process's part in `accelerate launch`, or that of one alone.

    folder: where all of them write. ValueError where several were started that know nothing of each other.
    """
    from accelerate import Accelerator

    found = Accelerator()
    if (started := int(os.environ.get("WORLD_SIZE") or 1)) > 1 and found.num_processes == 1:
        raise ValueError(
            f"{started} processes were started, but each would train alone into {folder}: "
            "set ACCELERATE_USE_CPU=true to train together on a CPU."
        )
    return found


class Job:
    """One run of a command in its output folder.

    `log.jsonl` gets a line per event and is appended to by a resumed run; `report.json` says at the end what was done,
    with what, on which machine. The bar is drawn on standard error, and only where that is a terminal; elsewhere
    `say` prints a plain line.
    """

    def __init__(self, folder: Path, name: str, settings: dict[str, Any], speaks: bool = True) -> None:
        """speaks: whether this process says, logs and reports; of several that train together, one does."""
        folder.mkdir(parents=True, exist_ok=True)
        self.speaks = speaks
        self.folder, self.name = folder, name
        self.settings = {key: _plain(value) for key, value in settings.items()}
        self.started = time.monotonic()
        self.earlier_seconds = 0.0  # of the runs that this one resumes; the command sets it
        self.console = Console(stderr=True, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
            console=self.console,
            disable=not (speaks and self.console.is_terminal),
        )

    def __enter__(self) -> Job:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if error is not None:
            with suppress(OSError):  # a full disk, say, of which `error` already tells
                self.log("stopped", reason=f"{type(error).__name__}: {error}")

    @property
    def seconds(self) -> float:
        """Wall-clock time, earlier runs included."""
        return self.earlier_seconds + time.monotonic() - self.started

    def log(self, event: str, **entry: Any) -> None:
        if not self.speaks:
            return
        line = json.dumps(_finite({"event": event, "seconds": round(self.seconds, 1), **entry}), ensure_ascii=False)
        with (self.folder / "log.jsonl").open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a killed run left half a line
                    line = f"\n{line}"
            file.write(f"{line}\n".encode("utf-8", "replace"))

    def say(self, text: str) -> None:
        """A line for people."""
        if self.speaks:
            self.console.print(text, highlight=False, markup=False)

    @contextmanager
    def bar(self, description: str, total: int | None, done: int = 0) -> Iterator[Bar]:
        """A progress bar that stands at `done` of `total`."""
        task = self._progress.add_task(description, total=total, completed=done, shown="")
        try:
            yield Bar(self, task)
        finally:
            self._progress.remove_task(task)

    def report(self, **results: Any) -> dict[str, Any]:
        """Writes `report.json`, where this process speaks, and returns it."""
        report: dict[str, Any] = {
            "command": f"medusa-apar {self.name}",
            "settings": self.settings,
            "seconds": round(self.seconds, 1),
            **machine(),
            **results,
        }
        report = _finite(report)
        if self.speaks:
            text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
            write_text(self.folder / "report.json", text + "\n")
        return report


class Bar:
    """The handle `Job.bar` gives out."""

    def __init__(self, job: Job, task: Any) -> None:
        self._job, self._task = job, task

    def advance(self, count: int = 1, shown: str = "") -> None:
        self._job._progress.update(self._task, advance=count, shown=shown)

    def at(self, done: float, shown: str = "") -> None:
        self._job._progress.update(self._task, completed=done, shown=shown)


def machine() -> dict[str, Any]:
    """Where a figure came from: date, commit, processor, versions."""
    import torch
    import transformers

    here = Path(__file__).resolve().parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=here, check=False
    ).stdout.strip()
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "date": date.today().isoformat(),
        "commit": commit,
        "cpu": f"{processor()}, {torch.get_num_threads()} threads, {capability}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


def cores() -> int:
    """How many cores this process may use; on macOS and Windows, how many the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fast_dtype(device: str | None = None) -> str:
    """bfloat16 where products in it take half the time of float32: on "cuda" and on "cpu" with instructions for it.

    device: None is CUDA where there is one.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        return "bfloat16"
    fast = device == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported() and _has_bf16_units()
    return "bfloat16" if fast else "float32"


def _has_bf16_units() -> bool:
    """oneDNN also emulates bfloat16 on processors without the instructions, slowly."""
    info = Path("/proc/cpuinfo")
    return info.exists() and any(flag in info.read_text() for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def on_a_terminal() -> bool:
    """Whether somebody sees what is written to standard error, which a daemon does not have."""
    return sys.stderr is not None and sys.stderr.isatty()


def quiet() -> None:
    """Silences the libraries but for errors. Progress bars stay on a terminal, where somebody watches a download."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # the Hub's too
    if on_a_terminal():
        enable_progress_bars()


@contextmanager
def slow(what: str, seconds: float = 2.0) -> Iterator[None]:
    """Says on a terminal what is being waited for, once it has taken so long."""
    timer = threading.Timer(seconds, print, [f"{what} ..."], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if on_a_terminal():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        with writing(path):
            yield temporary
            with_ordinary_permissions(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` whose files move into it, one by one, when the block ends well."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}-{threading.get_ident()}")
    temporary.mkdir(parents=True)
    try:
        with writing(folder):
            yield temporary
            with_ordinary_permissions(temporary)
            folder.mkdir(exist_ok=True)
            for file in temporary.iterdir():
                os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(temporary)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What a library raises because `path` cannot be written, as on a full disk, becomes an OSError that names it."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else "for no reason given"
        if isinstance(error, RuntimeError) and not TORCH_WRITER.search(reason):
            raise
        full = shutil.disk_usage(_existing(path)).free < 1 << 20
        raise OSError(f"{path} cannot be written ({'the disk is full' if full else reason})") from error


def with_ordinary_permissions(path: Path) -> None:
    """A file, or all that a folder holds, made readable for whom the umask allows: safetensors writes for its owner.

    The umask itself cannot be asked for without changing it, so a new file beside `path` tells.
    """
    probe = path.with_name(f"{path.name}-permissions")
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file() and not file.is_symlink():
            # Who may read a program may run it.
            runs = (mode & 0o444) >> 2 if file.stat().st_mode & stat.S_IXUSR else 0
            file.chmod(mode | runs)


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def read_checkpoint(path: Path, needed: Sequence[str]) -> dict[str, Any]:
    """A state that a command saved, its tensors on the CPU: they may come from a GPU that is not here.

    ValueError where it is damaged or lacks one of the `needed` entries.
    """
    import torch

    advice = "delete it to start anew, or give another --out"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # its dozen kinds; their words would advise to run whatever code the file holds
        if out_of_memory(error):
            raise
        raise ValueError(f"{path} is damaged: {advice}") from None
    if not isinstance(state, dict) or not set(needed) <= set(state):
        raise ValueError(f"{path} is of another command or version, without {', '.join(needed)}: {advice}")
    return state


def append_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A line of JSON per row at the end of a file: all of them, or none where the disk is full."""
    left = memoryview("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8"))
    with path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(before)
            raise


def cut_half_a_line(path: Path) -> None:
    """Takes away what a killed run left behind the last line's end."""
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _finite(value: Any) -> Any:
    """With null for the infinities and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
