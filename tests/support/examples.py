"""The files of examples/, run as each of them says it is run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
_COMMAND = re.compile(r"^(?:#\s{5}| {4})(\S.*)$", re.M)  # indented in a docstring, or in the first comment of a script


def command_of(name: str) -> list[str]:
    """The words of the command that the head of an example names first."""
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    head = text.split('"""')[1] if name.endswith(".py") else text.split("\nset -")[0]
    found = _COMMAND.search(head)
    assert found, f"{name} does not say how it is run"
    words = shlex.split(found[1])
    # A command of another file, or of none, would be run in its place.
    assert f"examples/{name}" in words or f"{Path(name).stem}:app" in words, words
    return words


def surroundings(folder: Path, python: Path = Path(sys.executable), **variables: str) -> dict[str, str]:
    """The environment of a reader who has this checkout installed, and has activated the environment of `python`.

    folder: where the command runs; it gets the examples, as the clone's top has them.
    """
    if not (folder / "examples").exists():
        (folder / "examples").symlink_to(EXAMPLES)
    own = {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "no_proxy": "*"}
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | own | variables


def run_example(
    name: str,
    folder: Path,
    *more: str | Path,
    python: Path = Path(sys.executable),
    seconds: float = 300,
    **variables: str,
) -> str:
    """What an example prints on standard output. more: words behind those of its command."""
    words = [*command_of(name), *map(str, more)]
    environment = surroundings(folder, python, **variables)
    run = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds)
    assert run.returncode == 0, run.stderr
    return run.stdout
