"""Every row of the tile tables compiles for a GPU that need not be here, and costs what the committed table says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from medusa_apar.triton_kernels import aot

ROOT = Path(__file__).parents[2]


def run(*arguments, **environment):
    command = [sys.executable, "-m", "medusa_apar.triton_kernels.aot", *arguments]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    return done


def test_kernels_compile_without_spills_at_the_cost_in_the_table():
    assert run("--check").returncode == 0


def test_the_table_is_of_this_version_and_has_no_faults():
    table = json.loads(aot.TABLE.read_text())
    assert table
    for rows in table.values():
        for name, resources in rows.items():
            assert aot.faults(int(name.split()[0].removeprefix("sm_")), resources) == []


def test_the_interpreter_is_refused():
    done = run("--check", TRITON_INTERPRET="1")
    assert done.returncode == 2 and "TRITON_INTERPRET" in done.stderr


@given(st.sampled_from(aot.CAPABILITIES), st.sampled_from(["stack", "LDL", "STL", "shared"]))
def test_spills_and_too_much_shared_memory_are_faults(capability, name):
    fine = {"registers": 255, "stack": 0, "LDL": 0, "STL": 0, "shared": aot.SHARED_LIMITS[capability]}
    assert aot.faults(capability, fine) == []
    assert len(aot.faults(capability, fine | {name: fine[name] + 1})) == 1
