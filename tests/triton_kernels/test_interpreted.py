"""The interpreter replaces Triton for a whole process, and other tests need Triton itself: hence a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("interpreted")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="pytest collects the folder itself")
def test_kernels_equal_their_references_under_the_interpreter():
    """All files in one process: each of its own would import torch and transformers anew."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(FOLDER)]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    print(run.stdout, run.stderr)
    assert run.returncode == 0 and "passed" in run.stdout
