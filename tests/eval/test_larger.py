"""What a start of a larger model takes, on a small one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medusa_apar.eval import larger
from medusa_apar.runtimes.cpu import library

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells of memory by kind")

START = """
import json, sys
from pathlib import Path
from medusa_apar.eval import larger
print(json.dumps(larger.start(Path(sys.argv[1]), sys.argv[2] == "keep", 6)))
"""


def start(folder, keep):
    """In a process of its own: what this one has freed and not given back would hide what a start takes."""
    command = [sys.executable, "-c", START, str(folder), "keep" if keep else "drop"]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def test_a_start_tells_of_its_copies_and_its_memory(tmp_path, monkeypatch):
    library.library()  # compiled before there is another cache
    monkeypatch.setenv("MEDUSA_APAR_CACHE", str(tmp_path / "cache"))
    # Large enough that the megabyte by which two such processes differ decides nothing.
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
    # A pack that is found lies in its file, and the model's is not read; one made in memory is the process's own, of a
    # model that was. (Libraries are loaded meanwhile, too: as many in each process.)
    packed, model = (starts[1]["copies"][name] for name in ("packed", "model"))
    assert second["file"] < in_memory["file"] - (model - packed) / 2
    assert second["anonymous"] < in_memory["anonymous"] - packed / 2


def grown(memory):
    return {kind: memory["at the end"][kind] - memory["imported"][kind] for kind in ("file", "anonymous")}


def test_peaks_are_seen_while_they_last():
    with larger.peaks() as found:
        before = found["anonymous"]
        filled = torch.ones(1 << 24)
    assert found["anonymous"] >= before + filled.nbytes // 2
