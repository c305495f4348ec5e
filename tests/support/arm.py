"""Compiled code for 64-bit Arm: made by a cross compiler, run by an emulator."""

import functools
import math
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from medusa_apar.runtimes.cpu import library

COMPILER, DISASSEMBLER, EMULATOR = "aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump", "qemu-aarch64"
# The compiler's name of a machine, and the emulator's of a processor that has what it needs.
MACHINES = {"armv8-a": "cortex-a53", "armv8.2-a+dotprod": "max", "armv8.6-a": "max"}
CPUINFO = """\
processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd atomics fphp asimdhp cpuid asimddp sve i8mm bf16
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x1
CPU part\t: 0xd40
CPU revision\t: 1

"""  # as Linux tells of one core
FOLDER = Path(__file__).parents[1] / "runtimes" / "cpu"

compiles = pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason="there is no compiler for Arm (apt-get install g++-aarch64-linux-gnu)"
)
runs = pytest.mark.skipif(
    None in (shutil.which(COMPILER), shutil.which(EMULATOR)),
    reason="there is no compiler for Arm or no emulator (apt-get install g++-aarch64-linux-gnu qemu-user)",
)


def compiled(machine, source, made, *options):
    flags = [*library.FLAGS, f"-march={machine}", "-fopenmp", f"-I{library.FOLDER}", *options]
    subprocess.run([COMPILER, *flags, str(source), "-o", str(made)], check=True)
    return made


@functools.cache
def program(machine, *options):
    """`arm.cpp` for such a machine."""
    return compiled(machine, FOLDER / "arm.cpp", Path(tempfile.mkdtemp()) / "arm", *options, "-O1", "-static")


def emulated(machine):
    """The command that runs a program on such a machine."""
    return [EMULATOR, "-cpu", MACHINES[machine]]


def _run(machine, calls, *options):
    """What `arm.cpp` writes about calls, each a list of operands in bytes."""
    read = b""
    for operands in calls:
        read += struct.pack("<i", len(operands)) + b"".join(struct.pack("<q", len(each)) + each for each in operands)
    command = [*emulated(machine), str(program(machine, *options))]
    return subprocess.run(command, input=read, stdout=subprocess.PIPE, check=True).stdout


def products(machine, packed, inputs):
    """What `packed`, a `PackedMatrix`, makes of each of float32 [rows, inputs] on such a machine."""

    def data(tensor):
        return b"" if tensor is None else tensor.contiguous().view(torch.uint8).numpy().tobytes()

    matrix, weights = packed.struct, [data(tensor) for tensor in (packed.panels, packed.scales, packed.bias)]
    sizes = (matrix.kind, matrix.outputs, matrix.inputs)
    calls = [[struct.pack("<6i", *sizes, *x.shape, packed.outputs), *weights, data(x)] for x in inputs]
    made = torch.frombuffer(bytearray(_run(machine, calls)), dtype=torch.float32)
    return [part.view(-1, packed.outputs) for part in made.split([len(x) * packed.outputs for x in inputs])]


def attend(machine, heads, steps, longest, keys, values, paths, lengths, queries):
    """`attend` of `attend.cpp` on such a machine: its result, and the pool's keys, values and scales."""
    capacity = len(keys)
    sizes = struct.pack("<4i", capacity, len(lengths), longest, steps)
    operands = [bytes(heads), sizes, *(x.tobytes() for x in (keys, values, paths, lengths, queries))]
    made = _run(machine, [operands], "-DATTENTION")
    kept = np.int16 if steps else np.float32
    shapes = ((queries.shape, np.float32), (keys.shape, kept), (values.shape, kept))
    found, start = [], 0
    for shape, dtype in (*shapes, ((capacity, heads.kv_heads, 2), np.float32)):
        found.append(np.frombuffer(made, dtype, math.prod(shape), start).reshape(shape))
        start += found[-1].nbytes
    assert start == len(made)
    return found
