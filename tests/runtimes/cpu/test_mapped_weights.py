"""Weights that lie in a mapped file: whatever is written to them or to the file is seen, and nothing else is read."""

import mmap
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from medusa_apar.runtimes.cpu import mapped_weights, weight_fingerprint
from medusa_apar.runtimes.cpu.mapped_weights import MappedWeights
from medusa_apar.runtimes.cpu.weight_fingerprint import WeightFingerprint, sums

pytestmark = pytest.mark.skipif(not mapped_weights._kernel_tells(), reason="this kernel does not tell of pages")


@pytest.fixture
def path(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(300, 700, generator=generator) for name in "abc"}
    save_file(tensors | {"d": torch.randn(9, generator=generator).bfloat16()}, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


@pytest.fixture
def weights(path):
    with safe_open(path, framework="pt") as file:
        return [file.get_tensor(name) for name in "abcd"]


@pytest.fixture
def read(monkeypatch):
    """Bytes that were summed up."""
    found = []
    monkeypatch.setattr(
        weight_fingerprint,
        "sums",
        lambda tensors, *turn: found.append(sum(t.nbytes for t in tensors)) or sums(tensors, *turn),
    )
    return found


def resident(path):
    """Bytes of a file's mappings that are in memory, and those of them that are copies."""
    text = Path("/proc/self/smaps").read_text()
    parts = [part for part in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", text) if str(path) in part]
    assert parts
    return [
        sum(int(re.search(rf"\n{name}: +(\d+) kB", part)[1]) << 10 for part in parts) for name in ("Rss", "Anonymous")
    ]


@pytest.mark.parametrize("entirely", [False, True])
def test_weights_that_were_not_written_to_are_not_read(weights, read, entirely):
    other = torch.randn(100)
    kept = WeightFingerprint([*weights, other])
    assert read.pop() == sum(t.nbytes for t in weights) + other.nbytes
    assert all(kept.matches([*weights, other], entirely) for _ in range(3))
    assert read == [other.nbytes] * 3


def swap(tensor):
    tensor.copy_(tensor.flip(0))


CHANGES = {
    "a value": lambda tensor: tensor.view(-1)[-1].add_(1),
    "a value, by numpy": lambda tensor: tensor.numpy().__setitem__((3, 5), 7),
    "all of it": lambda tensor: tensor.neg_(),
    "its rows": swap,
}


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_written_through_data_is_seen_and_stays(weights, path, change, index):
    kept = WeightFingerprint(weights)
    assert kept.matches(weights)
    CHANGES[change](weights[index].data)
    expected = weights[index].clone()
    assert not kept.matches(weights)
    kept.release()  # drops nothing
    assert torch.equal(weights[index], expected) and resident(path)[1] > 0


def test_what_was_written_before_is_watched_as_any_weights_are(weights, read):
    weights[1].data.mul_(2)
    kept = WeightFingerprint(weights)
    del read[:]
    assert kept.matches(weights) and read == [sum(t.nbytes for t in weights)]
    weights[0].data[5, 5] += 1
    assert not kept.matches(weights)


def overwrite(path):
    """The same inode, one number of it another."""
    with path.open("r+b") as file:
        file.seek(-40_000, os.SEEK_END)
        file.write(b"\x7f\x7f")


def test_a_file_that_is_written_to_shows_in_its_mapping(weights, path):
    kept = WeightFingerprint(weights)
    overwrite(path)
    assert not kept.matches(weights)


def write_through_data(weights, path):
    weights[1].data[-40, 300] += 1


def overwrite_in_place(weights, path):
    overwrite(path)


@pytest.fixture
def many(tmp_path, monkeypatch):
    """More than is read in every call, in two files; all is never read for the time that has passed."""
    monkeypatch.setattr(weight_fingerprint, "_SHARE", 0.0)
    generator = torch.Generator().manual_seed(0)
    weights = []
    for name in ("first", "second"):
        path = tmp_path / f"{name}.safetensors"
        save_file({each: torch.randn(700, 4096, generator=generator) for each in "ab"}, path)
        with safe_open(path, framework="pt") as file:
            weights += [file.get_tensor(each) for each in "ab"]
    assert sum(weight.nbytes for weight in weights[:2]) > 2 * weight_fingerprint._ALWAYS
    return weights, tmp_path / "first.safetensors"


@pytest.mark.parametrize("change", [write_through_data, overwrite_in_place])
@pytest.mark.parametrize("calls", [0, 1, 5])
def test_the_next_call_sees_one_value_of_many(many, change, calls):
    kept = WeightFingerprint(many[0])
    assert all(kept.matches(many[0]) for _ in range(calls))
    change(*many)
    assert not any(kept.matches(many[0]) for _ in range(3))


def test_what_is_no_longer_certain_is_read_once_and_then_by_turns(many, monkeypatch):
    weights, path = many
    weights.append(torch.randn(3_000_000))  # in no file
    kept, of_no_file, of_two = WeightFingerprint(weights), weights[4].nbytes, sum(w.nbytes for w in weights[:2])
    asked = []

    def spied(tensors, turn=None):
        asked.append((sum(tensor.nbytes for tensor in tensors), turn is None))
        return sums(tensors, turn)

    monkeypatch.setattr(weight_fingerprint, "sums", spied)
    assert kept.matches(weights)
    os.utime(path)  # it holds what it held
    assert all(kept.matches(weights) for _ in range(3))
    everything = of_no_file + of_two  # but the second file
    assert asked == [(of_no_file, False), (everything, True), (everything, False), (everything, False)]
    weights[3].data[5, 5] += 1
    assert not kept.matches(weights)


@pytest.mark.parametrize("gone", [True, False])
def test_of_a_file_that_is_gone_or_another_the_weights_stay_and_are_read(weights, path, read, gone):
    kept = WeightFingerprint(weights)
    path.unlink()
    if not gone:
        path.write_bytes(b"another")
    del read[:]
    assert kept.matches(weights) and read == [sum(t.nbytes for t in weights)]
    weights[0].data[0, 0] += 1
    assert not kept.matches(weights)


def test_pages_leave_memory_and_come_back(weights, path):
    kept = WeightFingerprint(weights)
    before, (inside, copies) = [weight.clone() for weight in weights], resident(path)
    assert inside >= sum(weight.nbytes for weight in weights) and copies == 0
    kept.release()
    assert resident(path)[0] <= 2 * mmap.PAGESIZE * len(weights)  # where one ends and the next begins
    assert kept.matches(weights) and all(map(torch.equal, weights, before))


def test_memory_of_no_file_is_not_mapped(tmp_path, weights):
    shared = torch.from_file(str(tmp_path / "shared"), shared=True, size=5000, dtype=torch.float32)
    others = [torch.randn(5000), shared, weights[0].T, torch.zeros(0), torch.zeros(3, device="meta")]
    mapped = MappedWeights([*others, weights[0]])
    assert mapped.unchanged() == {5}
    assert WeightFingerprint([*weights, shared]).name != WeightFingerprint(weights).name
    shared.data[7] = 1
    assert WeightFingerprint([shared.clone()]).name == WeightFingerprint([shared]).name


def test_where_the_kernel_does_not_tell_all_is_read(weights, read, monkeypatch):
    monkeypatch.setattr(mapped_weights, "_kernel_tells", lambda: False)
    kept = WeightFingerprint(weights)
    kept.release()
    assert kept.matches(weights) and read == [sum(t.nbytes for t in weights)] * 2


def test_the_kernel_is_tried_before_it_is_believed(monkeypatch):
    """A /proc that says nothing of pages calls none of them written."""
    monkeypatch.setattr(mapped_weights, "_is_unwritten", lambda start, end: True)
    assert not mapped_weights._kernel_tells.__wrapped__()
    monkeypatch.setattr(mapped_weights, "_is_unwritten", lambda start, end: False)
    assert not mapped_weights._kernel_tells.__wrapped__()


def test_the_kernel_is_asked_whatever_the_default_device_is():
    """The answer is kept, and another Python thread may have set one."""
    with torch.device("meta"):
        assert mapped_weights._kernel_tells.__wrapped__()
