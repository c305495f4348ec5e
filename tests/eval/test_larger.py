"""What a start of a larger model takes, on a small one."""

from pathlib import Path

import pytest
import torch

from medusa_apar.eval import larger
from medusa_apar.runtimes.cpu import library

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells of memory by kind")


def test_a_start_tells_of_its_copies_and_its_memory(tmp_path, monkeypatch):
    library.library()  # compiled before there is another cache
    monkeypatch.setenv("MEDUSA_APAR_CACHE", str(tmp_path / "cache"))
    larger.make(tmp_path / "model", layers=2, hidden=64, inner=128, heads=2, kv_heads=1, vocabulary=64)
    starts = [larger.start(tmp_path / "model", keep, 6) for keep in (True, True, False)]
    assert len(list((tmp_path / "cache" / "packs").glob("*/packed.safetensors"))) == 1
    for found in starts:
        assert found["tokens"] == starts[0]["tokens"] and len(found["tokens"]) == 6
        weights = 2 * 64 * 64 + 2 * (64 * 128 + 64 * 64 + 3 * 64 * 128)
        assert found["parameters"] == weights + 5 * 64 and found["copies"]["model"] == 2 * (weights + 5 * 64)
        # Without the embedding, which compiled code reads as it is; a float32 scale for 64 weights.
        assert found["copies"]["packed"] == (weights - 64 * 64) * 17 // 16
        memory = found["memory"]
        assert memory["imported"]["peak"] <= memory["loading"]["peak"] <= memory["generating"]["peak"]
        assert memory["at the end"]["anonymous"] <= memory["generating"]["anonymous"]


def test_peaks_are_seen_while_they_last():
    with larger.peaks() as found:
        before = found["anonymous"]
        filled = torch.ones(1 << 24)
    assert found["anonymous"] >= before + filled.nbytes // 2
