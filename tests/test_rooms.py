"""The table of rooms: imports go down it alone, and every folder's map is true."""

import subprocess
from pathlib import Path

import pytest

from tests.support import rooms
from tests.support.lengths import LONG

ROOT = Path(__file__).parent.parent
DOCUMENTS = (
    *("README.md", "medusa_apar/README.md", "medusa_apar/serve/README.md", "heads/TRAINING.md"),
    *("triton_kernels/README.md", "eval/README.md", "medusa_apar/engine/README.md", "CONTRIBUTING.md"),
    "examples/README.md",
)


def complaints_of(*checks):
    return "\n".join(line for check in checks for line in check)


def test_imports_go_down_the_table_of_rooms():
    assert not complaints_of(rooms.arrows_up(ROOT))


def test_threads_know_no_tensors():
    assert not complaints_of(rooms.tensors_in_threads(ROOT))


def test_every_map_is_complete_and_true():
    assert not complaints_of(rooms.wrong_maps(ROOT))


def test_files_that_are_named_exist():
    assert not complaints_of(rooms.stale_names(ROOT, (*DOCUMENTS, "Makefile")))


def test_what_is_imported_and_run_exists():
    written = (
        "*.md",
        "Makefile",
        "notebooks/*.ipynb",
        "notebooks/*.py",
        "examples/*.py",
        "medusa_apar/**/*.py",
        "medusa_apar/*.md",
        "tests/**/*.py",
    )
    folders = [f"{folder}/**/*.{kind}" for folder in ("heads", "eval", "triton_kernels") for kind in ("py", "sh", "md")]
    found = complaints_of(rooms.imports_of_nothing(ROOT, (*written, *folders))).splitlines()
    assert not [line for line in found if not line.startswith("tests/test_rooms.py:")]  # the small house has its own


def test_no_test_file_imports_another():
    assert not complaints_of(rooms.imports_of_tests(ROOT / "tests"))


def test_all_modules_are_read():
    """Or nothing above could fail."""
    names = {module.name for module in rooms.modules(ROOT)}
    assert {"medusa_apar", "medusa_apar.engine.scheduler", "medusa_apar.heads.hydra", "medusa_apar.eval"} <= names
    assert {"medusa_apar.runtimes.cpu.library", "medusa_apar.triton_kernels.pack", "medusa_apar.generate"} <= names
    assert sum(len(module.imports) for module in rooms.modules(ROOT)) > 1000


def test_what_runs_with_the_newest_releases_exists():
    listed = subprocess.run(
        ["make", "--silent", "--no-print-directory", "--eval", "listed:; @echo $(EXACTNESS)", "listed"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert len(listed) > 10
    assert not [path for path in listed if not (ROOT / path).exists()]


def test_the_longest_test_files_exist():
    assert not [name for name in LONG if not list((ROOT / "tests").rglob(name))]


# A small house in which all is well: a file and what it says.
MAP = "kv/        slots\nthreads/   trees\njob.py     a log\nheads/     drafts\n"
GOOD = {
    "medusa_apar/__init__.py": f'"""A house.\n\n{MAP}"""\nfrom .heads import Heads\n',
    "medusa_apar/kv/__init__.py": '"""Slots.\n\n    pool.py   a pool\n"""\n',
    "medusa_apar/kv/pool.py": '"""A pool, see `pool.py`."""\nfrom medusa_apar.threads import tree\nimport numpy\n',
    "medusa_apar/threads/__init__.py": '"""Trees.\n\n    tree.py   a tree\n    control_tokens.py   ids\n"""\n',
    "medusa_apar/threads/tree.py": '"""A tree."""\nfrom . import control_tokens\nfrom medusa_apar import __version__\n',
    "medusa_apar/threads/control_tokens.py": '"""Ids."""\nimport torch\n',
    "medusa_apar/job.py": '"""A log."""\nimport json\n',
    "heads/__init__.py": '"""Drafts."""\nfrom medusa_apar.kv.pool import Pool\n',
    "tests/test_pool.py": "from tests.support.pools import pool\n",
    "tests/support/pools.py": "from medusa_apar.kv.pool import Pool\n",
    "README.md": "See medusa_apar/kv/pool.py.\n",
}


def complaints(folder: Path, changed: dict[str, str | None]) -> str:
    """What the checks say of the good house with some files changed, or without them."""
    for name, text in (GOOD | changed).items():
        if text is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
    return complaints_of(
        *(rooms.arrows_up(folder), rooms.tensors_in_threads(folder), rooms.wrong_maps(folder)),
        *(rooms.stale_names(folder, ("README.md",)), rooms.imports_of_tests(folder / "tests")),
        rooms.imports_of_nothing(folder, ("*.sh",)),
    )


def test_there_is_nothing_to_say_of_a_good_house(tmp_path):
    assert complaints(tmp_path, {}) == ""


UP = "threads imports {} from {}, which lies above it"
PLANTED = {
    # Arrows up, in every way in which one can be written.
    "absolute": ("from medusa_apar.kv.pool import Pool", UP.format("medusa_apar.kv.pool.Pool", "kv")),
    "a whole module": ("import medusa_apar.kv.pool as pool", UP.format("medusa_apar.kv.pool", "kv")),
    "a room": ("from medusa_apar import job, kv", UP.format("medusa_apar.kv", "kv")),
    "relative": ("from ..kv import pool", UP.format("medusa_apar.kv.pool", "kv")),
    "relative, a room": ("from .. import kv", UP.format("medusa_apar.kv", "kv")),
    "in a function": ("def lazily():\n    from ..kv import pool", UP.format("medusa_apar.kv.pool", "kv")),
    "in a method": (
        "class Tree:\n    def lazily(self):\n        import medusa_apar.kv",
        UP.format("medusa_apar.kv", "kv"),
    ),
    "for types": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from medusa_apar.kv import pool",
        UP.format("medusa_apar.kv.pool", "kv"),
    ),
    "by name": (
        'from importlib import import_module\nimport_module("medusa_apar.kv")',
        UP.format("medusa_apar.kv", "kv"),
    ),
    "a resource": (
        'from importlib.resources import files\nfiles("medusa_apar.heads")',
        UP.format("medusa_apar.heads", "heads"),
    ),
    "a mapped folder": ("from medusa_apar.heads import Heads", UP.format("medusa_apar.heads.Heads", "heads")),
    "a mapped folder by its own name": ("from heads import Heads", UP.format("heads.Heads", "heads")),
    "through the front door": ("from medusa_apar import load", UP.format("medusa_apar.load", "top")),
    "the front door": ("import medusa_apar", UP.format("medusa_apar", "top")),
    # No tensors.
    "torch": ("import torch.nn", "threads imports torch.nn"),
    "numpy": ("def lazily():\n    import numpy as np", "threads imports numpy"),
    "transformers": ("from transformers import GenerationConfig", "threads imports transformers.GenerationConfig"),
}


@pytest.mark.parametrize("way", PLANTED)
def test_an_import_that_must_not_be_is_found_with_its_line(tmp_path, way):
    statement, complaint = PLANTED[way]
    line = 3 + statement.count("\n")
    said = complaints(tmp_path, {"medusa_apar/threads/tree.py": f'"""A tree."""\n\n{statement}\n'})
    assert said == f"medusa_apar/threads/tree.py:{line}: {complaint}"


FAULTS = {
    "a mapped folder's arrow up": (
        {"heads/__init__.py": '"""Drafts."""\nfrom medusa_apar.eval import bench\n'},
        "heads/__init__.py:2: heads imports medusa_apar.eval.bench from eval, which lies above it",
    ),
    "a circle": (
        {"medusa_apar/threads/tree.py": '"""A tree."""\nfrom medusa_apar.kv import pool\n'},
        "medusa_apar/threads/tree.py:2: threads imports medusa_apar.kv.pool from kv, which lies above it",
    ),
    "the ground floor knows somebody": (
        {"medusa_apar/job.py": '"""A log."""\nfrom medusa_apar.triton_kernels import pack\n'},
        "medusa_apar/job.py:2: base knows nobody, but imports medusa_apar.triton_kernels.pack from triton_kernels",
    ),
    "a new module lies flat": (
        {"medusa_apar/new.py": '"""New."""\n', "medusa_apar/__init__.py": f'"""A house.\n\n{MAP}new.py   new\n"""\n'},
        "medusa_apar/new.py: new has no row in the table of rooms",
    ),
    "a new folder": (
        {"medusa_apar/new/new.py": '"""New."""\n', "medusa_apar/__init__.py": f'"""A house.\n\n{MAP}new/   new\n"""\n'},
        "medusa_apar/new/new.py: new has no row in the table of rooms",
    ),
    "a module that is on no map": (
        {"medusa_apar/kv/ledger.py": '"""Which slot."""\n'},
        "medusa_apar/kv/__init__.py: does not name ledger.py",
    ),
    "a folder that is on no map": (
        {"medusa_apar/kv/cpu/ledger.py": '"""Which slot."""\n'},
        "medusa_apar/kv/__init__.py: does not name cpu/",
    ),
    "a mapped folder that is on no map": (
        {"eval/__init__.py": '"""Measuring."""\n'},
        "medusa_apar/__init__.py: does not name eval/",
    ),
    "a module that is only mentioned": (
        {"medusa_apar/kv/__init__.py": '"""Slots: `pool.py` is a pool."""\n'},
        "medusa_apar/kv/__init__.py: does not name pool.py",
    ),
    "a name without a word about it": (
        {"medusa_apar/kv/__init__.py": '"""Slots.\n\n    pool.py\n"""\n'},
        "medusa_apar/kv/__init__.py: does not name pool.py",
    ),
    "a module that is gone": (
        {"heads/__init__.py": '"""Drafts.\n\n    medusa.py   heads\n"""\n'},
        "heads/__init__.py: names medusa.py, which does not exist",
    ),
    "a module named twice": (
        {"medusa_apar/kv/__init__.py": '"""Slots.\n\n    pool.py   a pool\n    pool.py   slots\n"""\n'},
        "medusa_apar/kv/__init__.py: names pool.py 2 times",
    ),
    "no docstring": ({"medusa_apar/job.py": "import json\n"}, "medusa_apar/job.py: has no docstring"),
    "a docstring to be written": (
        {"medusa_apar/job.py": '"""TODO"""\n'},
        "medusa_apar/job.py: has no docstring",
    ),
    "a package without a file of its own": (
        {"medusa_apar/kv/__init__.py": None},
        "medusa_apar/kv: has modules, but no __init__.py",
    ),
    "a stale name in a docstring": (
        {"medusa_apar/job.py": '"""A log, see `threads/pool.py`."""\n'},
        "medusa_apar/job.py: names threads/pool.py, which does not exist",
    ),
    "a stale name in a document": (
        {"README.md": "medusa_apar/pool.py and kv/pool.py\n"},
        "README.md: names medusa_apar/pool.py, which does not exist",
    ),
    "a script that imports what has moved": (
        {"check.sh": 'python -c "import sys; from medusa_apar import job, pool"\n'},
        "check.sh: medusa_apar has no pool",
    ),
    "a script that runs what has moved": (
        {"check.sh": "python -m medusa_apar.kv.pool\npython -m medusa_apar.pool --out x\n"},
        "check.sh: there is no medusa_apar.pool to run",
    ),
    "a test that imports a test": (
        {"tests/kv/test_ledger.py": "from tests.test_pool import pool\n"},
        "tests/kv/test_ledger.py:1: imports tests.test_pool.pool",
    ),
    "a test that imports a test as a module": (
        {"tests/kv/test_ledger.py": "def lazily():\n    from tests import test_pool\n"},
        "tests/kv/test_ledger.py:2: imports tests.test_pool",
    ),
    "a helper that imports a conftest": (
        {"tests/support/pools.py": "from ..conftest import pool\n"},
        "tests/support/pools.py:1: imports tests.conftest.pool",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_house_is_found(tmp_path, fault):
    changed, complaint = FAULTS[fault]
    assert complaint in complaints(tmp_path, changed).splitlines()
