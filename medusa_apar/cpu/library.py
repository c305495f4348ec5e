"""The compiled code: made once per machine with the C++ compiler that is there, kept in the cache, called with ctypes.

ctypes and no torch headers: it compiles in seconds, serves every torch version, and a step is one call.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
from ctypes import POINTER, c_double, c_float, c_int, c_int32, c_void_p
from pathlib import Path

from medusa_apar import hub

FOLDER = Path(__file__).parent
SOURCES = ("step.cpp", "team.h", "attention.h", "matrix.h")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno")
PHASES = ("norm", "qkv", "attention", "output", "gate_up", "down", "unembedding")


class Matrix(ctypes.Structure):
    _fields_ = (
        *(("kind", c_int32), ("outputs", c_int32), ("inputs", c_int32)),
        *(("panels", c_void_p), ("scales", c_void_p), ("bias", c_void_p)),
    )


class Heads(ctypes.Structure):
    _fields_ = (("heads", c_int32), ("kv_heads", c_int32), ("head_dim", c_int32), ("scale", c_float))


class Layer(ctypes.Structure):
    _fields_ = (
        *(("attention_norm", c_void_p), ("mlp_norm", c_void_p)),
        *(("qkv", Matrix), ("output", Matrix), ("gate_up", Matrix), ("down", Matrix)),
        *(("keys", c_void_p), ("values", c_void_p), ("window", c_int32), ("tap", c_int32)),
    )


class Model(ctypes.Structure):
    _fields_ = (
        *(("layers", c_int32), ("hidden", c_int32), ("intermediate", c_int32), ("heads", Heads), ("eps", c_float)),
        *(("norm", c_void_p), ("layer", POINTER(Layer)), ("unembedding", Matrix)),
    )


class Step(ctypes.Structure):
    _fields_ = (
        *(("rows", c_int32), ("verified", c_int32), ("taps", c_int32), ("longest", c_int32)),
        *((name, c_void_p) for name in ("x", "cos", "sin", "slots", "slot_lists", "runs", "verified_rows")),
        *((name, c_void_p) for name in ("hidden", "tapped", "logits", "qkv", "wide", "act", "act_scales")),
        ("seconds", c_void_p),
    )


def compiler() -> str | None:
    """The C++ compiler: `$CXX`, else g++, else clang++; None where there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next((found for name in names if (found := shutil.which(name))), None)


@functools.cache
def library() -> ctypes.CDLL:
    """The library, compiled if it has not been; RuntimeError, in a sentence, where that cannot be."""
    found = compiler()
    if found is None:
        raise RuntimeError("there is no C++ compiler (g++ or clang++; or name one in CXX)")
    return _open(_compiled(found, "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"))


def _open(path: Path) -> ctypes.CDLL:
    opened = ctypes.CDLL(str(path))
    for index, struct in enumerate((Matrix, Layer, Model, Step)):
        assert opened.mapar_sizes(index) == ctypes.sizeof(struct), f"{struct.__name__} differs from step.cpp's"
    assert opened.mapar_phases() == len(PHASES)
    opened.mapar_step.argtypes = (POINTER(Model), POINTER(Step), c_int, c_int)
    opened.mapar_step.restype = None
    opened.mapar_linear.argtypes = (
        *(POINTER(Matrix), c_void_p, c_int, c_int, c_void_p, c_int),
        *(c_void_p, c_void_p, c_int),
    )
    opened.mapar_linear.restype = None
    opened.mapar_top.argtypes = (c_void_p, c_int, c_int, c_int, c_void_p, c_void_p, c_void_p, c_int)
    opened.mapar_top.restype = None
    return opened


def _compiled(command: str, machine: str) -> Path:
    openmp = _openmp_in_use()
    key = hashlib.sha256()
    for name in SOURCES:
        key.update((FOLDER / name).read_bytes())
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout
    key.update(repr((command, version, FLAGS, machine, openmp, _cpu())).encode())
    target = hub.cache_dir() / "cpu" / key.hexdigest()[:16]

    def build(scratch: Path, folder: Path) -> None:
        objects = scratch / "step.o"
        _run([command, *FLAGS, machine, "-fopenmp", "-c", str(FOLDER / "step.cpp"), "-o", str(objects)])
        # torch's own OpenMP, by name: a second one would keep threads of its own spinning on the same cores.
        link = [openmp] if openmp else ["-fopenmp"]
        _run([command, "-shared", str(objects), *link, "-o", str(folder / "step.so")])

    return hub.build_once(target, build) / "step.so"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        first = next(iter((done.stderr or done.stdout).strip().splitlines()), f"exit status {done.returncode}")
        raise RuntimeError(f"{Path(command[0]).name} cannot compile {FOLDER / 'step.cpp'}: {first}")


def _openmp_in_use() -> str:
    """The OpenMP library that torch has loaded into this process, or ""."""
    import torch  # noqa: F401  (loads it)

    maps = Path("/proc/self/maps")
    text = maps.read_text() if maps.is_file() else ""
    return next(iter(re.findall(r"(/\S*/lib(?:g|i|)omp\S*)", text)), "")


def _cpu() -> str:
    """What -march=native looks at: a cache may be shared by machines."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else platform.processor()
    return "".join(re.findall(r"(?:model name|flags|Features|CPU part)\s*:.*", text)[:2])


# Where a phase's time is added up: see Step.seconds.
Seconds = c_double * len(PHASES)
