"""The suite's own rules: nothing is skipped in CI that could run there, and `make test` leaves out what it says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.lengths import SLOW, is_slow

ROOT = Path(__file__).parent.parent
SKIPS = """
import pytest

def test_here():
    pytest.skip("nobody installed it")

def test_otherwhere():
    pytest.skip("this processor is no armv8.6-a")

@pytest.mark.xfail
def test_known():
    assert False
"""


def run(folder, *arguments, **variables):
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MEDUSA_APAR_CI", "PYTEST_"))
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.conftest",
        "-p",
        "no:cacheprovider",
        "-q",
        "-rA",
        *arguments,
    ]
    command += ["--rootdir", str(folder), str(folder)]
    return subprocess.run(command, cwd=ROOT, env=environment | variables, capture_output=True, text=True).stdout


@pytest.mark.parametrize(("in_ci", "failed"), [("", 0), ("1", 1)])
def test_a_skip_is_a_failure_in_ci_unless_the_machine_cannot(tmp_path, in_ci, failed):
    (tmp_path / "test_skips.py").write_text(SKIPS)
    said = run(tmp_path, MEDUSA_APAR_CI=in_ci)
    assert said.count("FAILED") == failed and said.count("XFAIL") == 1
    assert ("CI has to have it" in said) is bool(failed) and "this processor is no" in said


@pytest.mark.parametrize(("in_ci", "failed"), [("", False), ("1", True)])
def test_so_is_a_file_that_cannot_be_imported(tmp_path, in_ci, failed):
    (tmp_path / "test_absent.py").write_text(
        "import pytest\npytest.importorskip('no_such_package', reason='not there')\n"
    )
    said = run(tmp_path, MEDUSA_APAR_CI=in_ci)
    assert ("CI has to have it: Skipped: not there" in said) is failed


def test_what_make_test_leaves_out_exists():
    assert SLOW and all((ROOT / "tests" / name).exists() and why for name, why in SLOW.items())


def test_it_leaves_out_nothing_else_and_nothing_that_is_named():
    collect = [sys.executable, "-m", "pytest", "-q", "--collect-only"]
    # One file that is fast and two that are slow.
    few = ["tests/threads/test_list_items.py", "tests/test_packaging.py", "tests/eval/test_tiles.py"]

    def files(*more):
        said = subprocess.run([*collect, *more], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return {line.partition(":")[0] for line in said.splitlines() if line.startswith("tests/")}

    assert files("--fast", *few) == set(few)  # named
    all_files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    fast = files("--fast")
    assert len(fast) > 100 and not fast - all_files
    assert not {name for name in fast if is_slow(ROOT / name, ROOT / "tests")}
    left_out = {name for name in all_files if is_slow(ROOT / name, ROOT / "tests")}
    assert {"tests/test_readme.py", "tests/triton_kernels/test_aot.py", "tests/eval/test_bench.py"} <= left_out
    assert len(left_out) < len(fast) / 2
