"""Sums over bits: the compiled ones and their twin agree, and whatever changes a tensor changes them."""

import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_apar.runtimes.cpu import weight_fingerprint
from medusa_apar.runtimes.cpu.weight_fingerprint import TURNS, WeightFingerprint, plain, sums

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.bool)


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(9).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 5000) | st.sampled_from([16384, 50_000, 300_000]),
    st.sampled_from(DTYPES),
    st.sampled_from([1, 2, 3]),
    st.integers(0, 99),
)
def test_compiled_sums_are_those_of_the_twin(size, dtype, threads, seed):
    tensors = [numbers(size, dtype=dtype, seed=seed), numbers(), numbers(3, 7).T]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = sums(tensors)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weight_fingerprint.library, "outcome", lambda: "no compiler")
            assert torch.equal(sums(tensors), found)
            of_twin = [sums(tensors, turn) for turn in range(TURNS)]
        for turn in range(TURNS):
            one = torch.zeros_like(found)
            one[:, turn] = found[:, turn]
            assert torch.equal(sums(tensors, turn), one)
            assert torch.equal(of_twin[turn], one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("twin", [False, True])
def test_a_turn_reads_a_sixteenth(twin, monkeypatch):
    """Each value is in one turn's sums alone, and a sixteenth of the lines is in each turn."""
    if twin:
        monkeypatch.setattr(weight_fingerprint.library, "outcome", lambda: "no compiler")
    weight = numbers(16 * 4096)
    before = torch.cat([sums([weight], turn)[:, turn] for turn in range(TURNS)])
    seen = torch.zeros(TURNS, dtype=torch.int64)
    for line in range(64):
        changed = weight.clone()
        changed[1024 + 16 * line + line % 16] += 1
        after = torch.cat([sums([changed], turn)[:, turn] for turn in range(TURNS)])
        assert (after != before).sum() == 1
        seen += after != before
    assert seen.tolist() == [4] * TURNS


def test_words_that_do_not_begin_at_a_word_are_read():
    weight = numbers(999, dtype=torch.bfloat16)
    found = weight_fingerprint._sums_in_torch(weight_fingerprint._bytes(weight[1:]))
    assert torch.equal(found, sums([weight[1:].clone()])[0])


def set_nan(tensor):
    tensor.view(-1)[17] = float("nan")


CHANGES = {
    "a value": lambda t: t.view(-1)[41].add_(1e-3),
    "its lowest bit": lambda t: t.view(torch.int32).view(-1)[-1].bitwise_xor_(1),
    "a sign of zero": lambda t: t.view(-1)[:2].mul_(-1),
    "all signs": lambda t: t.neg_(),
    "two rows swapped": lambda t: t.copy_(t[[1, 0, *range(2, len(t))]]),
    "two columns swapped": lambda t: t.copy_(t[:, [1, 0, *range(2, t.shape[1])]]),
    "what one value lost another gained": lambda t: (t.view(-1)[3].add_(0.5), t.view(-1)[4].sub_(0.5)),
    "a NaN": set_nan,
    "a whole row": lambda t: t[7].mul_(2),
}


@pytest.mark.parametrize("twin", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_through_data_is_seen(change, twin, monkeypatch):
    if twin:
        monkeypatch.setattr(weight_fingerprint.library, "outcome", lambda: "no compiler")
    weight = torch.nn.Parameter(numbers(40, 96))
    kept = WeightFingerprint([weight])
    assert kept.matches([weight])
    CHANGES[change](weight.data)
    assert not kept.matches([weight])


def test_other_places_shapes_and_counted_writes_are_seen():
    weight, other = numbers(40, 96), numbers(8)
    kept = WeightFingerprint([weight, other])
    assert kept.matches([weight, other])
    for tensors in ([weight], [weight.clone(), other], [weight.view(96, 40), other], [other, weight]):
        assert not kept.matches(tensors)
    other.add_(0)
    assert not kept.matches([weight, other])


@pytest.fixture
def large(monkeypatch):
    """A tensor that is too dear to be read in every call, and what is known of it."""
    monkeypatch.setattr(weight_fingerprint, "_ALWAYS", 0)
    weight = numbers(300, 1152)
    kept = WeightFingerprint([weight])
    kept._seconds = 1e9
    return weight, kept


@pytest.mark.parametrize("turns", range(0, TURNS, 5))
@pytest.mark.parametrize("where", ["a row", "a column", "everything"])
def test_of_large_weights_rows_columns_and_whole_changes_show_in_any_turn(large, where, turns):
    weight, kept = large
    for _ in range(turns):
        assert kept.matches([weight])
    changed = {"a row": weight[123], "a column": weight[:, 77], "everything": weight}[where]
    changed.data.add_(1)
    assert not kept.matches([weight])


def test_of_large_weights_single_values_show_when_their_turn_comes_and_when_all_is_read(large):
    weight, kept = large
    weight.data[123, 456] += 1
    assert not all(kept.matches([weight]) for _ in range(TURNS))
    assert not kept.matches([weight], entirely=True)
    kept._seconds = 0.0  # cheap by what time has passed
    assert not kept.matches([weight])


def test_a_first_read_that_was_slow_is_not_held_against_later_ones(large, monkeypatch):
    weight, kept = large
    clock = SimpleNamespace(now=time.perf_counter())

    def slowly(tensors, *turn):
        clock.now += 0.01
        return sums(tensors, *turn)

    monkeypatch.setattr(weight_fingerprint, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(weight_fingerprint, "sums", slowly)
    assert kept.matches([weight], entirely=True)
    weight.data[123, 456] += 1
    assert kept.matches([weight])  # another turn's, and no time has passed
    clock.now += 1
    assert not kept.matches([weight])


def test_what_cannot_be_read_is_not_plain():
    assert plain(torch.zeros(2)) and plain(torch.nn.Parameter(torch.zeros(2)))
    assert not plain(torch.zeros(2, device="meta")) and not plain(None)


def test_nothing_is_nothing_new():
    assert WeightFingerprint([]).matches([])
