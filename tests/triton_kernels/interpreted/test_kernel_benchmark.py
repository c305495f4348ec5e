"""The kernels' benchmark, as far as it goes without a GPU: checks before times, and a report."""

import json

import pytest
import torch

from medusa_apar.eval import kernels


def test_the_smallest_cases_are_checked_and_reported(tmp_path):
    kernels.run(tmp_path, smoke=True)
    report = json.loads((tmp_path / "kernels.json").read_text())
    checks = report["sections"]["Tree attention: errors against float64"]
    assert len(checks) == 18 and all(check["error"] <= check["bound"] and check["same_bits"] for check in checks)
    rows = report["sections"]["Tree attention: milliseconds a layer"]
    assert [row["threads"] for row in rows] == [1, 2]
    assert all(row["sdpa_difference"] < 1e-5 for row in rows)
    assert "| split_ms |" in (tmp_path / "kernels.md").read_text()


def test_nothing_is_timed_while_a_kernel_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "tree_attention", lambda query, *rest, **more: torch.zeros_like(query))
    with pytest.raises(RuntimeError, match="nothing was timed"):
        kernels.run(tmp_path, smoke=True)
    assert "Tree attention: milliseconds a layer" not in json.loads((tmp_path / "kernels.json").read_text())["sections"]


def test_without_a_gpu_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        kernels.run(tmp_path)
