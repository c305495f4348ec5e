"""`medusa-apar doctor`: what this machine and this installation have to offer."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name
from rich.console import Console
from rich.table import Table

from medusa_apar import __version__
from medusa_apar.generate import MedusaApar
from medusa_apar.heads import checkpoints
from medusa_apar.job import quiet, slow
from medusa_apar.loading import load
from medusa_apar.models import hub
from medusa_apar.models.sources import Source, locate, shipped_weights
from medusa_apar.runtimes.cpu.library import library
from medusa_apar.runtimes.cpu.runtime import unsupported_reason
from medusa_apar.runtimes.devices import device_of

PACKAGES = ("torch", "transformers", "peft", "safetensors", "gguf", "triton", "fschat")
CPU_FLAGS = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "bf16", "i8mm"),  # of Arm
)
CPUINFO = Path("/proc/cpuinfo")


def doctor(console: Console, model: str | None = None, **options: Any) -> None:
    """options: of `load`, for `model`."""
    _show(console, findings())
    if model is not None:
        quiet()
        console.print()
        _show(console, model_findings(model, **options))


def _show(console: Console, found: Iterator[tuple[str, str]]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, finding in found:
        table.add_row(name, finding)
    console.print(table)


def findings() -> Iterator[tuple[str, str]]:
    """Findings about the machine. A finding that fails does not hide the others."""
    yield "medusa-apar", f"{__version__} in {Path(__file__).parent.parent}"
    yield "python", f"{platform.python_version()} at {sys.executable}"
    for package in PACKAGES:
        yield package, _version(package)
    yield "system", platform.platform()
    yield "cpu", f"{_cpu_model()}, {os.cpu_count()} logical cores, torch uses {torch.get_num_threads()} threads"
    yield "cpu features", f"{' '.join(_cpu_flags()) or 'unknown'}; torch runs {torch.backends.cpu.get_cpu_capability()}"
    yield "memory", f"{_size(psutil.virtual_memory().available)} free of {_size(psutil.virtual_memory().total)}"
    yield "cpu runtime", _or_reason(_cpu_runtime)
    yield "gpu", _or_reason(_gpu)
    yield "kernels", _kernels()
    yield "cache", _or_reason(_cache)
    for name in hub.EMBEDDED:
        yield name, _or_reason(partial(_embedded, name))


def model_findings(name: str, **options: Any) -> Iterator[tuple[str, str]]:
    """Findings about a model: what runs it and what it takes. Nothing is generated."""
    yield "model", name
    source = locate(name)
    messages = _Messages()
    logger = logging.getLogger("medusa_apar.runtimes.pick")
    level = logger.level
    logger.addHandler(messages)
    logger.setLevel(logging.INFO)
    before = psutil.Process().memory_info().rss
    try:
        with slow(f"loading {name}"):
            apar = load(name, **options)
    finally:
        logger.removeHandler(messages)
        logger.setLevel(level)
    taken = psutil.Process().memory_info().rss - before
    model = apar.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    yield "architecture", f"{type(model).__name__}, {parameters / 1e6:,.0f} million parameters"
    yield "runtime", "; ".join([apar.runtime.description, *(messages.said or _why_torch(apar))])
    yield "dtype", f"{str(model.dtype).removeprefix('torch.')} as loaded, {apar.runtime.facts.kind} where it runs"
    yield "heads", _heads(apar)
    yield "control tokens", _control_tokens(apar)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    yield "memory", f"{_size(weights)} of weights; loading it took {_size(max(taken, 0))} in all"
    yield "disk", _or_reason(partial(_on_disk, source))


def _on_disk(source: Source) -> str:
    """What each of a model's parts takes."""
    if source.base in hub.EMBEDDED:
        base = hub.embedded_model_path(source.base)
    elif not (base := Path(source.base)).exists():
        base = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=source.base, repo_type="model")
    sizes = {"base": _bytes(base)}
    if source.adapter:
        sizes["adapter"] = sum(map(_bytes, source.adapter.glob("adapter_model.*")))
    if source.heads:
        sizes["heads"] = sum(map(_bytes, checkpoints.find(source.heads)))
    return ", ".join(f"{part} {_size(size)}" for part, size in sizes.items() if size)


def _why_torch(apar: MedusaApar) -> list[str]:
    if apar.runtime.facts.backend == "cpu" or device_of(apar.model).type != "cpu":
        return []
    return [
        unsupported_reason(apar.model) or "for the CPU runtime's copy of the weights there is too little free memory"
    ]


def _heads(apar: MedusaApar) -> str:
    if apar.heads is None:
        return "none" if apar.options.speculation is None else "none: guesses come from n-grams"
    ids = apar.heads.draft_vocab_size
    return f"{apar.heads.num_heads} {apar.heads.kind} heads over {ids} ids"


def _control_tokens(apar: MedusaApar) -> str:
    control, tokenizer = apar.control_token_ids, apar.tokenizer
    if control is None:
        return "none: it forks by rule alone (--fork lists)"
    texts: Any = tokenizer and tokenizer.convert_ids_to_tokens([control.fork_id, control.child_id])
    names = zip(("[Fork]", "[Child]"), (control.fork_id, control.child_id), texts or ("", ""), strict=True)
    return ", ".join(f"{name} is {id} {text}".rstrip() for name, id, text in names)


class _Messages(logging.Handler):
    """What is logged while a model is loaded: why it runs as it does."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(" ".join(record.getMessage().split()))


def _or_reason(find: Callable[[], str]) -> str:
    try:
        return find()
    except (OSError, RuntimeError, ValueError) as error:
        return f"cannot be told: {error}"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _bytes(place: Path) -> int:
    """The size of a file or of all files in a folder. Each file counts once: the Hub's cache links to its blobs."""
    found = [path.stat() for path in ([place] if place.is_file() else place.rglob("*")) if path.is_file()]
    return sum({(file.st_dev, file.st_ino): file.st_size for file in found}.values())


def _cache() -> str:
    place = hub.cache_dir()
    return f"{place}, {_size(_bytes(place))}" if place.is_dir() else f"{place}, empty"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpuinfo(key: str) -> str:
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()  # x86, Arm
    return [flag for flag in CPU_FLAGS if flag in flags]


def _gpu() -> str:
    if not torch.cuda.is_available():
        return f"none that torch sees (built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU'})"
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor})" for gpu in found)


def _cpu_runtime() -> str:
    try:
        made = Path(library()._name)
        return f"compiled, {made}, {_size(made.stat().st_size)}"
    except RuntimeError as error:
        return f"torch only: {error}"


def _kernels() -> str:
    if _version("triton") == "not installed":
        return "sdpa only: triton is not installed"
    return "triton" if torch.cuda.is_available() else "sdpa only: triton needs a GPU"


def _embedded(name: str) -> str:
    weights = shipped_weights(name)
    parts = {"base": hub.embedded_model_path(name) / "model.safetensors"}
    parts |= {"tuned": weights / "adapter_model.safetensors", "heads": weights / "medusa_lm_head.safetensors"}
    absent = {"base": "not downloaded yet"}
    return ", ".join(
        f"{part} {_size(path.stat().st_size) if path.is_file() else absent.get(part, 'missing')}"
        for part, path in parts.items()
    )
