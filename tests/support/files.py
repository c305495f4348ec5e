"""The files of the repository, in a clone and in an unpacked sdist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

MADE = re.compile(r"__pycache__|\.venv.*|.*\.egg-info|build|dist|site|\.(pytest|ruff|mypy)_cache|\.hypothesis")


def repository_files(root: Path) -> list[Path]:
    """Relative paths: what git tracks or, where there is no clone, all that no tool has made."""
    if (root / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True)
        return [Path(name) for name in listed.stdout.split("\0") if name and (root / name).is_file()]
    found = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return [path for path in found if not any(map(MADE.fullmatch, path.parts))]


def home(root: Path) -> str:
    """Where setup.py says that the project lies."""
    found: list[str] = re.findall(r'^HOME = "(.+)"$', (root / "setup.py").read_text(encoding="utf-8"), re.M)
    return found[0]
