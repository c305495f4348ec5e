"""Attention over a KV pool of floats and of int16 steps, by itself: exact rows, and the error that the bits allow."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.attention import MACHINES, TILE, Case

shapes = st.tuples(st.sampled_from([1, 2]), st.integers(1, 7), st.sampled_from([32, 64, 96, 128, 256]))


@pytest.mark.parametrize("machine", MACHINES)
@settings(max_examples=25, deadline=None)
@given(shapes, st.lists(st.integers(1, 200), min_size=1, max_size=5), st.sampled_from([0.1, 1, 5]), st.integers(0, 99))
def test_errors_are_within_what_the_bits_allow(machine, shape, lengths, loud, seed):
    case = Case(*shape, lengths, seed, loud)
    floats, steps = (case.attend(steps, machine)[0] for steps in (False, True))
    for row in range(len(lengths)):
        for head in range(case.heads):
            expected, bound = case.expected(row, head)
            assert np.all(np.abs(steps[row, head] - expected) <= bound)
            np.testing.assert_allclose(floats[row, head], expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(shapes, st.booleans(), st.lists(st.integers(1, 200), min_size=2, max_size=40), st.integers(0, 99))
def test_a_row_has_the_same_bits_alone_and_in_other_slots(shape, steps, lengths, seed):
    case = Case(*shape, lengths, seed)
    among = case.attend(steps)[0]
    row = seed % len(lengths)
    assert np.array_equal(case.attend(steps, rows=[row])[0][0], among[row])
    moved = case.rng.permutation(case.capacity)
    for name in ("keys", "values"):
        there = np.empty_like(getattr(case, name))
        there[moved] = getattr(case, name)
        setattr(case, name, there)
    case.paths = moved[case.paths].astype(np.int32)
    assert np.array_equal(case.attend(steps)[0], among)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("rows", [1, 2])  # two share their tiles
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
def test_sums_do_not_leave_int32(dim, rows, machine):
    """Every product at its largest, in the scores and, all weights being equal, in a tile of values."""
    case = Case(1, 3, dim, [2 * TILE] * rows)
    case.keys[:], case.queries[:], case.values[:] = 3, 2, -5
    case.keys[case.paths[0, :TILE]] = -3  # these scores are the lowest there can be
    np.testing.assert_allclose(case.attend(True, machine)[0], -5, rtol=1e-5)
    _, keys, values, _ = case.attend(True, machine)
    assert dim * int(keys.max()) ** 2 < 2**31 and TILE * int(abs(values).max()) ** 2 < 2**31


def test_a_pool_of_steps_is_within_half_a_step_and_has_zeros():
    case = Case(2, 3, 64, [70])
    case.keys[9], case.values[9] = 0, 0
    _, keys, values, scales = case.attend(True)
    for stored, exact, scale in ((keys, case.keys, scales[..., :1]), (values, case.values, scales[..., 1:])):
        assert np.all(np.abs(stored * scale - exact) <= 0.501 * scale)
    assert not scales[9].any() and np.isfinite(case.attend(True)[0]).all()


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["keys", "values", "queries"])
def test_what_is_not_finite_stays_so(where, bad, machine):
    """In every row that sees it, and in no other."""
    case = Case(2, 2, 64, [150, 100])
    row = 0
    if where == "queries":
        case.queries[row, 1, 7] = bad
    else:
        getattr(case, where)[case.paths[0, 120], 0, 7] = bad  # the second row's path ends before
    out = case.attend(True, machine)[0]
    hit = np.zeros(out.shape[:2], dtype=bool)
    hit[row, [1] if where == "queries" else [0, 1]] = True  # the heads of the first KV head
    assert np.isnan(out[hit]).all() and np.isfinite(out[~hit]).all()
