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
import shlex
import shutil
import subprocess
import sys
from ctypes import POINTER, c_double, c_float, c_int, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from medusa_apar.models import hub

FOLDER = Path(__file__).parent
SOURCES = tuple(sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".cpp", ".h")))
TABLES = 2  # of rotary embeddings, in a step
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno")
PHASES = ("norm", "qkv", "attention", "output", "gate_up", "down", "unembedding")


class Matrix(ctypes.Structure):
    _fields_ = (
        *(("kind", c_int32), ("outputs", c_int32), ("inputs", c_int32)),
        *(("panels", c_void_p), ("scales", c_void_p), ("bias", c_void_p)),
    )


class Heads(ctypes.Structure):
    _fields_ = (("heads", c_int32), ("kv_heads", c_int32), ("head_dim", c_int32), ("scale", c_float), ("cap", c_float))


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("attention_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm")),
        *(("query_norm", c_void_p), ("key_norm", c_void_p)),
        *(("qkv", Matrix), ("output", Matrix), ("gate_up", Matrix), ("down", Matrix)),
        *(("keys", c_void_p), ("values", c_void_p), ("scales", c_void_p)),
        *(("window", c_int32), ("aux_layer", c_int32), ("boundary", c_int32), ("rotary", c_int32)),
    )


class Model(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("layers", "hidden", "intermediate", "vocabulary", "table_kind")),
        *(("turned", c_int32), ("whole_norms", c_int32), ("gelu", c_int32), ("heads", Heads)),
        *((name, c_float) for name in ("eps", "embedding_scale", "residual_scale", "logit_scale", "logit_cap")),
        *(("norm", c_void_p), ("table", c_void_p)),
        *(("layer", POINTER(Layer)), ("unembedding", Matrix)),
    )


class Step(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("rows", "verified", "aux_layers", "boundaries", "longest")),
        *(("tokens", c_void_p), ("cos", c_void_p * TABLES), ("sin", c_void_p * TABLES)),
        *((name, c_void_p) for name in ("positions", "slots", "slot_lists", "runs")),
        *((name, c_void_p) for name in ("verified_rows", "hidden", "states", "logits", "x", "qkv", "wide")),
        *((name, c_void_p) for name in ("steps", "groups")),
        ("seconds", c_void_p),
    )


class Hydra(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("heads", "blocks", "hidden", "inputs", "vocabulary", "tokens", "table_kind")),
        *(("eps", c_float), ("table", c_void_p), ("token_map", c_void_p), ("states", Matrix), ("unembedding", Matrix)),
        *(("token", POINTER(Matrix)), ("block", POINTER(Matrix))),
    )


class Tree(ctypes.Structure):
    _fields_ = (
        *(("levels", c_int32), ("nodes", c_int32)),
        *((name, c_void_p) for name in ("sizes", "inner_sizes", "top", "node", "parent", "rank", "inner")),
    )


class Eagle3(ctypes.Structure):
    _fields_ = (
        *(("model", Model), ("hidden_norm", c_void_p), ("token_map", c_void_p)),
        *((name, c_int32) for name in ("vocabulary", "norm_before_residual", "norm_output", "states", "target")),
        *(("fc", Matrix), ("input_norm", c_void_p), ("state_norms", c_void_p)),
    )


class Pool(ctypes.Structure):
    _fields_ = (("keys", c_void_p), ("values", c_void_p), ("scales", c_void_p))


class Written(ctypes.Structure):
    _fields_ = (
        *(("slots", c_void_p), ("starts", c_void_p), ("pools", POINTER(Pool))),
        *((name, c_void_p) for name in ("features", "cos", "sin")),
    )


class NewRows(ctypes.Structure):
    _fields_ = (
        *(("rows", c_int32), ("states", c_void_p)),
        *((name, c_void_p) for name in ("tokens", "positions", "slots", "parents", "features")),
        *(("pool", Pool), ("cos", c_void_p), ("sin", c_void_p)),
    )


class Operation(ctypes.Structure):
    _fields_ = (
        *(("kind", c_int32), ("count", c_int32), ("length", c_int32), ("value", c_float)),
        *(("ids", c_void_p), ("values", c_void_p)),
    )


class Recipe(ctypes.Structure):
    _fields_ = (
        *(("count", c_int32), ("sampled", c_int32), ("judged", c_int32)),
        *(("seed", c_uint64), ("operations", POINTER(Operation))),
    )


class Choice(ctypes.Structure):
    _fields_ = tuple(
        (name, c_int64)
        for name in (
            *("place", "recipe", "parent", "token", "path", "length"),
            *("key", "position", "fork_banned", "held", "mask"),
        )
    )


class Choices(ctypes.Structure):
    _fields_ = (
        *(("count", c_int32), ("vocabulary", c_int32), ("rows", c_void_p), ("recipes", POINTER(Recipe))),
        *(("paths", c_void_p), ("logits", c_void_p), ("masks", c_void_p), ("words", c_int64), ("tokens", c_void_p)),
        *(("log_probs", c_void_p), ("entropies", c_void_p)),
    )


class Span(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("bytes", c_int64))


def floats(*shape: int) -> Tensor:
    """float32 on the CPU, whatever the defaults are: another Python thread may be changing them."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def address(tensor: Tensor, dtype: torch.dtype, size: int) -> int:
    """Where compiled code finds `size` numbers of a type, one after the other; ValueError where they are not there.

    Nothing else gives compiled code an address of a tensor. Arrays of numpy go through `torch.from_numpy`.
    """
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"compiled code cannot read a {type(tensor).__name__} on {tensor.device} as it lies there.")
    if tensor.dtype != dtype or tensor.numel() < size:
        raise ValueError(f"compiled code needs {size} of {dtype}, and was given {tensor.numel()} of {tensor.dtype}.")
    return tensor.data_ptr()


def compilers() -> list[list[str]]:
    """C++ compilers that are there, as commands: `$CXX` alone if it is set, else g++, then clang++."""
    names = [shlex.split(os.environ["CXX"])] if os.environ.get("CXX") else [["g++"], ["clang++"]]
    return [[found, *more] for name, *more in names if (found := shutil.which(name))]


def library() -> ctypes.CDLL:
    """The library, compiled if it has not been; RuntimeError, in a sentence, where that cannot be."""
    found = outcome()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def build() -> str:
    """Names the compiled code: a hash of its sources, its compiler and the machine."""
    return Path(library()._name).parent.name


@functools.cache
def outcome() -> ctypes.CDLL | str:
    """The library, or why there is none: a compiler that fails is not asked again by every call."""
    why = "there is no C++ compiler (g++ or clang++; or name one in CXX)"
    for command in compilers():
        try:
            return _open(_compiled(command))
        except (OSError, RuntimeError) as error:
            why = " ".join(str(error).split())
    return why


def _open(path: Path) -> ctypes.CDLL:
    opened = ctypes.CDLL(str(path))
    mirrors = (
        *(Matrix, Layer, Model, Step, Hydra, Tree, Span, Operation, Recipe, Choice, Choices),
        *(Eagle3, Written, NewRows),
    )
    for index, struct in enumerate(mirrors):
        assert opened.mapar_sizes(index) == ctypes.sizeof(struct), f"{struct.__name__} differs from step.cpp's"
    assert opened.mapar_phases() == len(PHASES)
    opened.mapar_step.argtypes = (POINTER(Model), POINTER(Step), c_int, c_int)
    opened.mapar_step.restype = c_int
    opened.mapar_linear.argtypes = (
        *(POINTER(Matrix), c_void_p, c_int, c_int, c_void_p, c_int),
        *(c_void_p, c_void_p, c_int),
    )
    opened.mapar_linear.restype = None
    opened.mapar_hydra.argtypes = (
        *(POINTER(Hydra), POINTER(Tree), c_void_p, c_void_p, c_int),
        *(c_float, c_void_p, c_void_p, c_int),
    )
    opened.mapar_hydra.restype = c_int
    opened.mapar_eagle3.argtypes = (
        *(POINTER(Eagle3), POINTER(Tree), POINTER(Written), c_void_p, c_int),
        *(c_float, c_void_p, c_void_p, c_int),
    )
    opened.mapar_eagle3.restype = c_int
    opened.mapar_eagle3_rows.argtypes = (POINTER(Eagle3), POINTER(NewRows), c_int)
    opened.mapar_eagle3_rows.restype = c_int
    opened.mapar_choose.argtypes = (POINTER(Choices), c_int)
    opened.mapar_choose.restype = None
    opened.mapar_top.argtypes = (c_void_p, c_void_p, c_int, c_int, c_int, c_void_p, c_void_p, c_void_p, c_int)
    opened.mapar_top.restype = None
    opened.mapar_pack_int8.argtypes = (c_void_p, c_int, c_int, c_int, c_void_p, c_void_p, c_int)
    opened.mapar_pack_int8.restype = None
    opened.mapar_sums.argtypes = (POINTER(Span), c_int, c_int, c_void_p, c_int)
    opened.mapar_sums.restype = None
    return opened


def _compiled(command: list[str], machine: str = "") -> Path:
    """The library's file. `machine` is the compiler's option for the instructions to use, by default all there are."""
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    options = [*command, *FLAGS, machine or native, "-fopenmp"]
    openmp = _openmp_in_use()
    key = hashlib.sha256()
    for name in SOURCES:
        key.update((FOLDER / name).read_bytes())
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
    key.update(repr((options, version, openmp, processor())).encode())
    target = hub.cache_dir() / "cpu" / key.hexdigest()[:16]

    def build(scratch: Path, folder: Path) -> None:
        objects, made = str(scratch / "step.o"), str(folder / "step.so")
        _run([*options, "-c", str(FOLDER / "step.cpp"), "-o", objects])
        strict = ["-Wl,-z,defs"] if sys.platform == "linux" else []  # what is missing is found now, not when loaded
        try:
            # torch's own OpenMP, by name: a second one would keep threads of its own spinning on the same cores.
            _run([*command, "-shared", objects, openmp or "-fopenmp", *strict, "-o", made])
        except RuntimeError:  # another family's than the compiler's
            _run([*command, "-shared", objects, "-fopenmp", *strict, "-o", made])
        (folder / "step.so.sha256").write_text(hub.sha256_of(folder / "step.so"))

    made = hub.build_once(target, build, _intact) / "step.so"
    if hasattr(os, "getuid") and made.stat().st_uid not in (0, os.getuid()):
        raise RuntimeError(f"{made} belongs to another user, and is code: set MEDUSA_APAR_CACHE to a folder of yours")
    return made


def _intact(folder: Path) -> bool:
    """Whether the library is what was compiled: to open one that was cut short ends the process."""
    try:
        return (folder / "step.so.sha256").read_text() == hub.sha256_of(folder / "step.so")
    except (OSError, UnicodeDecodeError):  # a cleaner of caches took one of them, or the digest is what is damaged
        return False


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        first = next(iter((done.stderr or done.stdout).strip().splitlines()), f"exit status {done.returncode}")
        raise RuntimeError(f"{Path(command[0]).name} cannot compile {FOLDER / 'step.cpp'}: {first}")


def _openmp_in_use() -> str:
    """The OpenMP library that torch has loaded into this process, or ""."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    files = dict.fromkeys(fields[5] for line in lines if len(fields := line.split(None, 5)) == 6)
    found = [file for file in files if re.search(r"/lib(g|i|)omp[^/]*$", file)]
    return next((file for file in found if "/torch" in file), found[0] if found else "")


def processor(info: Path = Path("/proc/cpuinfo")) -> str:
    """What -march=native, or Arm's -mcpu=native, looks at, as text: a cache may be shared by machines.

    On x86 these are the models and their flags. On Arm they are the features, asimddp and i8mm among them, and who made
    which parts.
    """
    text = info.read_text() if info.is_file() else ""
    found = re.findall(r"^(?:model name|flags|Features|CPU implementer|CPU part)\s*:.*", text, re.MULTILINE)
    return "".join(dict.fromkeys(found)) or repr(platform.uname())


# Where a phase's time is added up: see Step.seconds.
Seconds = c_double * len(PHASES)
