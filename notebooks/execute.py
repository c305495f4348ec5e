"""Executes notebooks top to bottom, each in a kernel of its own, and tells where what they show is out of date.

  python notebooks/execute.py [NOTEBOOK ...]           executes them and stores their outputs
  python notebooks/execute.py --check [NOTEBOOK ...]   executes them, writes nothing, and fails where the stored outputs
                                                       came from other sources

Without names, all that lie beside this file. The kernel runs this Python and this checkout's package; a cell may take a
minute. Beside a cell's outputs stands a hash of the source they came from. What is stored has nothing that differs
between two machines but what the cells themselves print: no times, no paths, no progress bars.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

HERE = Path(__file__).resolve().parent
LIMIT = 60  # seconds a cell
SOURCE = "executed_source"  # a cell's metadata: hash of the source that its outputs came from
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# Progress bars, and tqdm's complaint that it cannot draw them without ipywidgets (JupyterLab's users have those).
QUIET = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class NotebookError(Exception):
    """One sentence: which notebook, which cell, what to do."""


def check(path: Path, limit: int = LIMIT, smaller: Mapping[str, str] | None = None) -> None:
    """Fails where the stored outputs are not those of the stored sources, or the notebook does not run.

    smaller: parts of its sources, and what is run in their place. Each has to stand there.
    """
    notebook = nbformat.read(path, as_version=4)
    cells = code_cells(notebook)
    for number, cell in enumerate(cells, 1):
        if reason := stale(cell, number):
            raise NotebookError(f"{path.name}: {named(cell, number)} {reason}. Run: python notebooks/execute.py {path}")
    for part, instead in (smaller or {}).items():
        if not any(part in cell.source for cell in cells):
            raise NotebookError(f"{path.name}: no cell has {part!r}")
        for cell in cells:
            cell.source = cell.source.replace(part, instead)
    execute(notebook, path, limit)


def store(path: Path, limit: int = LIMIT) -> None:
    """Executes a notebook and writes it back; one that fails stays as it was."""
    notebook = nbformat.read(path, as_version=4)
    execute(notebook, path, limit)
    for number, cell in enumerate(code_cells(notebook), 1):
        for text in texts(cell):
            if found := noise(text):
                raise NotebookError(f"{path.name}: {named(cell, number)} prints {found}, which cannot be stored")
        tags = {"tags": cell.metadata["tags"]} if "tags" in cell.metadata else {}
        cell.metadata = nbformat.from_dict({**tags, SOURCE: digest(cell)})
    notebook.metadata = nbformat.from_dict(METADATA)
    nbformat.write(notebook, path)


def execute(notebook: Any, path: Path, limit: int) -> None:
    """Gives the cells of `notebook` new outputs; NotebookError names the first cell that fails."""
    cells = code_cells(notebook)
    running: list[Any] = []
    client = NotebookClient(notebook, timeout=limit, kernel_name="python3", record_timing=False, coalesce_streams=True)
    client.on_cell_execute = lambda cell, cell_index: running.append(cell)
    client.create_kernel_manager()
    # Without folders of installed kernels it falls back on ipykernel in this very Python.
    client.km.kernel_spec_manager = KernelSpecManager(kernel_dirs=[])
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **QUIET, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        client.execute(env=environment, cwd=str(path.resolve().parent))
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        cell = running[-1]
        reason = f"failed:\n{COLOUR.sub('', str(error))}"
        if isinstance(error, CellTimeoutError):
            reason = f"took more than {limit} seconds"
        elif isinstance(error, DeadKernelError):
            reason = "ended the kernel"
        number = next(number for number, other in enumerate(cells, 1) if other is cell)
        raise NotebookError(f"{path.name}: {named(cell, number)} {reason}") from error


def stale(cell: Any, number: int) -> str:
    """Why the outputs stored in the `number`th code cell are not to be trusted, or ""."""
    if cell.execution_count is None or SOURCE not in cell.metadata:
        return "was never executed"
    if cell.metadata[SOURCE] != digest(cell):
        return "has changed since its outputs were stored"
    if cell.execution_count != number:
        return f"was executed as number {cell.execution_count}, not in order"
    if any(output.output_type == "error" for output in cell.outputs):
        return "is stored with an error"
    return ""


def noise(text: str) -> str:
    """What in a printed text must not be stored, or ""."""
    if "\x1b" in text:
        return "colours"
    folders = (str(folder) for folder in (HERE.parent, sys.prefix, Path.home(), tempfile.gettempdir()))
    return next((f"a path of this machine ({folder})" for folder in folders if f"{folder}{os.sep}" in text), "")


def code_cells(notebook: Any) -> list[Any]:
    """Those that are executed."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def named(cell: Any, number: int) -> str:
    return f"cell [{number}] ({cell.source.strip().splitlines()[0][:60]})"


def digest(cell: Any) -> str:
    return hashlib.sha256(cell.source.encode()).hexdigest()[:16]


def texts(cell: Any) -> list[str]:
    printed = [output.text for output in cell.outputs if output.output_type == "stream"]
    shown = [output.data for output in cell.outputs if "data" in output]
    return printed + [text for data in shown for kind, text in data.items() if kind.startswith("text/")]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "notebooks/execute.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", type=Path, nargs="*", metavar="NOTEBOOK", help="default: all beside this file")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    for path in args.notebooks or sorted(HERE.glob("*.ipynb")):
        if not path.is_file():
            parser.error(f"{path} does not exist")
        try:
            (check if args.check else store)(path)
        except NotebookError as error:
            print(error, file=sys.stderr)
            return 1
        print(f"{path.name}: {'runs' if args.check else 'executed and stored'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
