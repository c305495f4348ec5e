"""Packed matrices against torch, and a row's bits against itself alone."""

import ctypes
import functools
import platform
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_apar.runtimes.cpu import library, weights
from medusa_apar.runtimes.cpu.weights import PackedMatrix, argmax, hadamard, interleaved, laid_out, rounded, top
from tests.support.products import KINDS, assert_close_to_its_specification, fused, operands

shapes = st.tuples(st.integers(1, 80), st.integers(1, 50), st.integers(1, 150))


@settings(max_examples=40, deadline=None)
@given(shapes, st.sampled_from(KINDS), st.booleans(), st.integers(0, 99))
def test_products_are_those_of_the_stored_weight(shape, kind, bias, seed):
    x, weight, b = operands(*shape, seed, bias)
    packed = PackedMatrix(weight, kind, b)
    assert_close_to_its_specification(packed(x), packed, x)


@settings(max_examples=40, deadline=None)
@given(shapes, st.sampled_from(KINDS), st.sampled_from([1, 2, 3]), st.integers(0, 99))
def test_a_row_has_the_same_bits_alone_and_among_others(shape, kind, threads, seed):
    x, weight, _ = operands(*shape, seed)
    x[seed % len(x)] *= 1000  # a neighbour that a scale per tensor would have to serve
    packed = PackedMatrix(weight, kind)
    alone = torch.cat([packed(row[None]) for row in x])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(packed(x), alone)
    finally:
        torch.set_num_threads(before)


def test_int8_is_within_half_a_step_of_its_turned_group_and_float32_is_kept():
    weight = torch.randn(33, 192, generator=torch.Generator().manual_seed(1))
    weight[:, 64:128] *= 100  # a group of its own scale
    turned = [hadamard(each.view(33, 3, 64)) for each in (weight, PackedMatrix(weight, "int8").dense())]
    steps = turned[0].abs().amax(-1, keepdim=True) / 127
    assert ((turned[1] - turned[0]).abs() <= 0.501 * steps).all()
    assert torch.equal(PackedMatrix(weight, "float32").dense(), weight)
    assert torch.equal(PackedMatrix(weight, "bfloat16").dense(), weight.bfloat16().float())


def test_the_transform_is_its_own_inverse_and_keeps_products():
    a, b = torch.randn(2, 5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(hadamard(hadamard(a)), a)
    torch.testing.assert_close((hadamard(a) * hadamard(b)).sum(-1), (a * b).sum(-1))


def test_one_large_input_takes_little_from_the_others():
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(3))
    x[:, 5] *= 100
    step = x.abs().amax(1, keepdim=True) / 127
    untransformed = (x / step).round() * step
    assert float((rounded(x) - x).std()) < float((untransformed - x)[:, 6:].std()) / 4


def same_bits(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[name].contiguous().view(torch.uint8), second[name].contiguous().view(torch.uint8))
        for name in first
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 100), st.integers(1, 150), st.sampled_from(KINDS), st.sampled_from([16, 32, 48]))
def test_in_blocks_it_is_laid_out_as_at_once(outputs, inputs, kind, block):
    _, weight, bias = operands(1, outputs, inputs, 3, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "_BLOCK", block)
        in_blocks = weights._in_blocks(weight, kind)
    assert same_bits(in_blocks, weights._panels(weight, kind))
    whole = laid_out(weight, kind, bias)
    assert torch.equal(whole.pop("bias")[:outputs], bias) and same_bits(whole, in_blocks)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 200),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([1, 3]),
    st.sampled_from([1.0, 1e-30, 1e-44, 1e30]),
    st.integers(0, 99),
)
def test_compiled_int8_panels_have_the_bits_of_torch(outputs, inputs, dtype, threads, scale, seed):
    _, weight, _ = operands(1, outputs, inputs, seed)
    weight = (weight * scale).to(dtype)
    weight[seed % outputs] = 0
    weight[:, : seed % 70] *= 200  # a group of its own scale
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert same_bits(laid_out(weight, "int8"), weights._in_blocks(weight, "int8"))
    finally:
        torch.set_num_threads(before)


def test_weights_that_are_not_as_compiled_code_reads_them_are_laid_out_too():
    _, weight, _ = operands(1, 40, 130)
    expected = laid_out(weight, "int8")
    assert same_bits(laid_out(weight.T.contiguous().T, "int8"), expected)
    assert same_bits(laid_out(weight.double(), "int8"), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "outcome", lambda: "no compiler")
        assert same_bits(laid_out(weight, "int8"), expected)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_weights_stay_broken(broken):
    weight = torch.ones(20, 128)
    weight[3, 70] = broken
    out = PackedMatrix(weight, "int8")(torch.randn(2, 128))
    assert not torch.isfinite(out[:, 3]).any() and torch.isfinite(out[:, [*range(3), *range(4, 20)]]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_laid_out_before_has_the_same_products(kind):
    x, weight, bias = operands(5, 37, 90, 1, True)
    packed = PackedMatrix(weight, kind, bias)
    again = PackedMatrix.of_stored(kind, 37, 90, packed.stored)
    assert torch.equal(again(x), packed(x))
    for outputs, inputs in ((53, 90), (37, 130)):
        with pytest.raises(ValueError, match="compiled code needs"):
            PackedMatrix.of_stored(kind, outputs, inputs, packed.stored)
    other = "float32" if kind == "int8" else "int8"
    with pytest.raises(ValueError, match="is not made of"):
        PackedMatrix.of_stored(other, 37, 90, packed.stored)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_and_extreme_rows(kind):
    weight = torch.eye(16, 64)
    weight[3] = 0
    packed = PackedMatrix(weight, kind)
    x = torch.zeros(3, 64)
    x[1, :16] = 1e30
    x[2, :16] = 1e-30
    rtol = 2**-8 if kind == "bfloat16" else 1e-4
    torch.testing.assert_close(packed(x), x[:, :16] * (weight[:, :16].diag()), rtol=rtol, atol=0)


def test_activations_are_rounded_to_bfloat16_as_torch_does():
    """Among them every tie between two neighbours, of which the even one counts."""
    bits = torch.arange(0x3F800000, 0x3F900000, 0x2000, dtype=torch.int32)[:128].view(2, 64)
    x = torch.cat([bits.view(torch.float32), torch.randn(50, 64, generator=torch.Generator().manual_seed(5)) * 1e5])
    assert torch.equal(PackedMatrix(torch.eye(64), "bfloat16")(x), x.bfloat16().float())
    x[1, 3] = torch.nan
    assert PackedMatrix(torch.eye(64), "bfloat16")(x)[1, 3].isnan()


def test_int8_sums_do_not_leave_int32():
    packed = PackedMatrix(torch.ones(16, 4096), "int8")
    torch.testing.assert_close(packed(torch.ones(2, 4096)), torch.full((2, 16), 4096.0), rtol=1e-4, atol=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 300), st.integers(1, 6), st.integers(0, 99), st.booleans())
def test_top_is_topk_and_the_first_of_equals(rows, width, count, seed, coarse):
    count = min(count, width)
    logits = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 5
    if coarse:
        logits = logits.round()
    log_probs, indices = top(logits, count)
    order = torch.sort(logits, dim=-1, descending=True, stable=True)
    assert torch.equal(indices, order.indices[:, :count])
    assert torch.equal(argmax(logits), order.indices[:, 0])
    torch.testing.assert_close(log_probs, logits.log_softmax(-1).gather(1, indices), rtol=1e-5, atol=1e-5)


def test_top_of_three_dimensions():
    logits = torch.randn(2, 3, 40)
    log_probs, indices = top(logits, 4)
    assert torch.equal(indices, logits.topk(4).indices) and log_probs.shape == (2, 3, 4)


def test_interleaved_panels():
    first, second = torch.arange(32.0)[:, None], -torch.arange(32.0)[:, None]
    rows = interleaved(first, second)[:, 0]
    assert rows[:16].tolist() == list(range(16)) and rows[16:32].tolist() == [-n for n in range(16)]
    assert rows[32:48].tolist() == list(range(16, 32))


@pytest.mark.parametrize("share", [0.06, 0.5, 0.99])
def test_a_nan_hides_no_number_beside_it(share):
    torch.manual_seed(4)
    logits = torch.randn(200, 1003)
    logits[torch.rand(logits.shape) < share] = torch.nan
    assert torch.equal(argmax(logits), logits.nan_to_num(-torch.inf).argmax(1))


# The compiler's name of a machine, and the processor's flags that running its code needs.
MACHINES = {
    "x86-64": set(),
    "haswell": {"avx2", "fma"},
    "alderlake": {"avx2", "fma", "avx_vnni"},
    "skylake-avx512": {"avx512f", "avx512bw"},
    "cascadelake": {"avx512f", "avx512bw", "avx512_vnni"},
    "cooperlake": {"avx512f", "avx512bw", "avx512_vnni", "avx512_bf16"},
    "sapphirerapids": {"amx_int8", "avx512_vnni", "avx512_fp16"},
}


@functools.cache
def product_of(machine):
    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").is_file() else set()
    if platform.machine() != "x86_64" or not MACHINES[machine] <= flags:
        return None
    made = Path(tempfile.mkdtemp()) / "multiply.so"
    source = Path(__file__).with_name("multiply.cpp")
    options = [*library.FLAGS, "-O2", f"-march={machine}", "-fopenmp", f"-I{library.FOLDER}", "-shared"]
    command = [*library.compilers()[0], *options, "-fvisibility=default", str(source), "-o", str(made)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(made)).product


def product(machine, packed, x):
    rows, inputs = len(x), packed.struct.inputs
    y = torch.empty(rows, packed.outputs)
    steps, groups = torch.empty(rows, inputs), torch.empty(rows, inputs // 32 + 1)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, y, steps, groups)]
    product_of(machine)(
        *(ctypes.byref(packed.struct), pointers[0], rows, x.shape[1], pointers[1], packed.outputs, *pointers[2:])
    )
    return y


@pytest.mark.parametrize("machine", MACHINES)
def test_every_instruction_set_has_the_same_sums(machine):
    """Bit by bit, but where a machine has no fused products of floats."""
    if product_of(machine) is None:
        pytest.skip(f"this processor is no {machine}")
    for rows in (1, 2, 7, 8, 13, 16, 17, 33, 70):
        x, weight, bias = operands(rows, 88, 200, rows, True)
        packed = PackedMatrix(weight, "int8", bias)
        expected = packed(x)
        if machine == "x86-64" or not fused():
            torch.testing.assert_close(product(machine, packed, x), expected, rtol=1e-5, atol=1e-4)
        else:
            assert torch.equal(product(machine, packed, x), expected)


@pytest.mark.parametrize("machine", MACHINES)
def test_every_instruction_set_multiplies_bfloat16_row_by_row(machine):
    if product_of(machine) is None:
        pytest.skip(f"this processor is no {machine}")
    for rows in (1, 3, 13, 33):
        x, weight, bias = operands(rows, 88, 200, rows, True)
        packed = PackedMatrix(weight, "bfloat16", bias)
        made = product(machine, packed, x)
        expected = x.bfloat16().double() @ weight.bfloat16().double().T + bias
        torch.testing.assert_close(made, expected.float(), rtol=1e-5, atol=1e-4)
        assert torch.equal(torch.cat([product(machine, packed, row[None]) for row in x]), made)


@pytest.mark.parametrize("machine", MACHINES)
def test_the_largest_steps_do_not_saturate(machine):
    """127 by 127 in every product, of either sign: two of them leave 16 bits where an unsigned factor has 8."""
    if product_of(machine) is None:
        pytest.skip(f"this processor is no {machine}")
    for sign in (1, -1):
        for other in (1, -1):
            first = torch.zeros(128)
            first[::64] = 1  # becomes 64 equal ones
            packed = PackedMatrix(first.expand(16, 128) * sign, "int8")
            assert (packed.panels.abs() == 127).all()
            made = product(machine, packed, first.expand(20, 128).contiguous() * other)
            torch.testing.assert_close(made, torch.full((20, 16), 2.0 * sign * other), rtol=1e-6, atol=0)
