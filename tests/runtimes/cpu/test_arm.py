"""Compiled code for 64-bit Arm: all of it compiles; products and attention are right, on an emulated processor."""

import functools
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from medusa_apar.runtimes.cpu import library
from medusa_apar.runtimes.cpu.weights import PackedMatrix
from tests.support import arm
from tests.support.attention import TILE, Case
from tests.support.products import KINDS, assert_close_to_its_specification, fused, operands

# What multiplies int8 and bfloat16, by machine.
DOTS = {"armv8-a": set(), "armv8.2-a+dotprod": {"sdot"}, "armv8.6-a": {"sdot", "smmla", "bfdot"}}
machines = pytest.mark.parametrize("machine", arm.MACHINES)
FLOATS = 9 * (128 + 80)  # of whole_step.cpp: hidden states and logits


@arm.compiles
@machines
def test_the_whole_step_compiles(machine, tmp_path):
    arm.compiled(machine, library.FOLDER / "step.cpp", tmp_path / "step.o", "-fsyntax-only")


@arm.runs
@machines
def test_products_take_the_instructions_that_there_are(machine):
    command = [arm.DISASSEMBLER, "-d", str(arm.program(machine))]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert {name for name in ("sdot", "smmla", "bfdot") if f"\t{name}\t" in listed} == DOTS[machine]


@arm.runs
@machines
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 16, 64), (13, 88, 200), (9, 33, 129), (6, 5, 3)])
def test_products_are_those_of_the_stored_weight_and_a_row_has_the_same_bits_alone(machine, kind, shape):
    x, weight, bias = operands(*shape, seed=sum(shape), bias=True)
    x[-1] *= 1000
    packed = PackedMatrix(weight, kind, bias)
    together, *alone = arm.products(machine, packed, [x, *x.split(1)])
    assert_close_to_its_specification(together, packed, x)
    assert torch.equal(torch.cat(alone), together)
    if kind == "int8" and fused():
        assert torch.equal(together, packed(x))  # as every instruction set has them


@arm.runs
@machines
def test_the_largest_steps_do_not_saturate(machine):
    first = torch.zeros(128)
    first[::64] = 1  # becomes 64 equal ones
    rows = first.expand(7, 128).contiguous()
    for sign in (1, -1):
        packed = PackedMatrix(first.expand(16, 128) * sign, "int8")
        assert (packed.panels.abs() == 127).all()
        for other, made in zip((1, -1), arm.products(machine, packed, [rows, -rows]), strict=True):
            torch.testing.assert_close(made, torch.full((7, 16), 2.0 * sign * other), rtol=1e-6, atol=0)


@arm.runs
@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("kv_heads, group, dim, lengths", [(2, 3, 64, [1, 70, 131, 131]), (1, 4, 96, [67, 9])])
def test_attention_is_within_what_its_bits_allow_and_a_row_has_the_same_bits_alone(
    steps, kv_heads, group, dim, lengths
):
    case = Case(kv_heads, group, dim, lengths, seed=dim)
    among = case.attend(steps, "armv8-a")[0]
    for row in range(len(lengths)):
        assert np.array_equal(case.attend(steps, "armv8-a", rows=[row])[0][0], among[row])
        for head in range(case.heads):
            expected, bound = case.expected(row, head)
            assert np.all(np.abs(among[row, head] - expected) <= (bound if steps else 1e-4 + 1e-4 * np.abs(expected)))


@arm.runs
@pytest.mark.parametrize("rows", [1, 2])  # two share their tiles
def test_sums_of_attention_do_not_leave_int32(rows):
    """Every product at its largest, in the scores and, all weights being equal, in a tile of values."""
    case = Case(1, 3, 64, [2 * TILE] * rows)
    case.keys[:], case.queries[:], case.values[:] = 3, 2, -5
    case.keys[case.paths[0, :TILE]] = -3  # these scores are the lowest there can be
    np.testing.assert_allclose(case.attend(True, "armv8-a")[0], -5, rtol=1e-5)


@functools.cache
def whole_step(native):
    made = Path(tempfile.mkdtemp()) / "whole_step"
    source, options = arm.FOLDER / "whole_step.cpp", ("-O0", "-fopenmp")
    if not native:
        return [*arm.emulated("armv8.6-a"), str(arm.compiled("armv8.6-a", source, made, *options, "-static"))]
    flags = [*library.FLAGS, *options, "-march=native", f"-I{library.FOLDER}"]
    subprocess.run([*library.compilers()[0], *flags, str(source), "-o", str(made)], check=True)
    return [str(made)]


@arm.runs
@pytest.mark.parametrize(
    "kind, steps, off", [("float32", 0, 1e-4), ("float32", 1, 5e-3), ("bfloat16", 0, 0.05), ("int8", 0, 0.1)]
)
def test_a_step_and_its_choices_are_this_processors(kind, steps, off):
    """off: of logits that a number rounded the other way, among all, may move."""
    arguments = [str(KINDS.index(kind)), str(steps)]
    made, expected = (
        subprocess.run([*whole_step(native), *arguments], stdout=subprocess.PIPE, check=True).stdout
        for native in (False, True)
    )
    floats, expected_floats = (np.frombuffer(data, np.float32, FLOATS) for data in (made, expected))
    assert expected_floats.std() > 0.5
    np.testing.assert_allclose(floats, expected_floats, rtol=0, atol=off)
    if kind == "float32" and not steps:
        chosen, expected_chosen = (np.frombuffer(data, np.int64, offset=4 * FLOATS) for data in (made, expected))
        assert len(set(chosen)) > 9 and np.array_equal(chosen, expected_chosen)
