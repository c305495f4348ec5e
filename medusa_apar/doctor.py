"""`medusa-apar doctor`: what this machine and this installation have to offer."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from . import __version__, hub
from .cpu.library import library

PACKAGES = ("torch", "transformers", "peft", "safetensors", "gguf", "triton", "fschat")
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm")


def doctor(console: Console) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, finding in findings():
        table.add_row(name, finding)
    console.print(table)


def findings() -> Iterator[tuple[str, str]]:
    yield "medusa-apar", f"{__version__} in {Path(__file__).parent}"
    yield "python", f"{platform.python_version()} at {sys.executable}"
    for package in PACKAGES:
        yield package, _version(package)
    yield "system", platform.platform()
    yield "cpu", f"{_cpu_model()}, {os.cpu_count()} logical cores, torch uses {torch.get_num_threads()} threads"
    yield "cpu features", f"{' '.join(_cpu_flags()) or 'unknown'}; torch runs {torch.backends.cpu.get_cpu_capability()}"
    yield "cpu runtime", _cpu_runtime()
    yield "gpu", _gpu()
    yield "kernels", _kernels()
    yield "cache", str(hub.cache_dir())
    for name in hub.EMBEDDED:
        yield name, _embedded(name)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()  # x86, ARM
    return [flag for flag in CPU_FLAGS if flag in flags]


def _gpu() -> str:
    if not torch.cuda.is_available():
        return f"none that torch sees (built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU'})"
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor})" for gpu in found)


def _cpu_runtime() -> str:
    try:
        return f"compiled, {library()._name}"
    except RuntimeError as error:
        return f"torch only: {error}"


def _kernels() -> str:
    if _version("triton") == "not installed":
        return "sdpa only: triton is not installed"
    return "triton" if torch.cuda.is_available() else "sdpa only: triton needs a GPU"


def _embedded(name: str) -> str:
    weights = Path(str(files("medusa_apar.heads"))) / "weights" / name
    parts = {"base": hub.embedded_model_path(name) / "model.safetensors"}
    parts |= {"tuned": weights / "adapter_model.safetensors", "heads": weights / "medusa_lm_head.safetensors"}
    absent = {"base": "not downloaded yet"}
    return ", ".join(
        f"{part} {f'{path.stat().st_size / 1e6:.0f} MB' if path.is_file() else absent.get(part, 'missing')}"
        for part, path in parts.items()
    )
