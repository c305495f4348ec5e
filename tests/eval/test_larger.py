"""What a start of a larger model takes, on a small one."""

import ctypes
import gc
from pathlib import Path

import pytest
import torch

from medusa_apar.eval import larger
from medusa_apar.runtimes.cpu import library

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="only Linux tells of memory by kind, and only glibc gives it back when asked",
)


def start(folder, keep):
    """In a process that has given back what earlier starts freed, so that what grows is the start's own."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return larger.start(folder, keep, 6)


def test_a_start_tells_of_its_copies_and_its_memory(tmp_path, monkeypatch):
    library.library()  # compiled before there is another cache
    monkeypatch.setenv("MEDUSA_APAR_CACHE", str(tmp_path / "cache"))
    # Large enough that what else a process takes and gives back meanwhile, some 5 MB, decides nothing.
    larger.make(tmp_path / "model", layers=2, hidden=256, inner=16384, heads=8, kv_heads=4, vocabulary=64)
    starts = [start(tmp_path / "model", keep) for keep in (True, True, False)]
    assert len(list((tmp_path / "cache" / "packs").glob("*/packed.safetensors"))) == 1
    weights = 2 * 64 * 256 + 2 * (3 * 256 * 256 + 3 * 256 * 16384)
    for found in starts:
        assert found["tokens"] == starts[0]["tokens"] and len(found["tokens"]) == 6
        assert found["parameters"] == weights + 5 * 256 and found["copies"]["model"] == 2 * (weights + 5 * 256)
        # Without the embedding, which compiled code reads as it is; a float32 scale for 64 weights.
        assert found["copies"]["packed"] == (weights - 64 * 256) * 17 // 16
    _, second, in_memory = (grown(found["memory"]) for found in starts)
    # A pack that is found lies in its file, and the model's is not read; one made in memory is the process's own.
    packed, model = (starts[1]["copies"][name] for name in ("packed", "model"))
    assert 0.9 * packed < second["file"] < 0.9 * model
    assert in_memory["anonymous"] > second["anonymous"] + packed / 2


def grown(memory):
    return {kind: memory["at the end"][kind] - memory["imported"][kind] for kind in ("file", "anonymous")}


def test_peaks_are_seen_while_they_last():
    with larger.peaks() as found:
        before = found["anonymous"]
        filled = torch.ones(1 << 24)
    assert found["anonymous"] >= before + filled.nbytes // 2
