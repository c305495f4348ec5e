"""Every notebook runs from top to bottom and is stored with outputs of its present sources, or `execute.py` says so."""

import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from medusa_apar.models.hub import embedded_model_dir
from medusa_apar.runtimes.cpu.library import library
from notebooks import execute

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# All cells run; answers are shorter than in what is stored, and nobody watches.
SMALLER = {
    "1_drop_in_generate": {
        **{"max_new_tokens=48": "max_new_tokens=16", "max_new_tokens=64": "max_new_tokens=16"},
        **{'"max_new_tokens": 48': '"max_new_tokens": 16', '"max_new_tokens": 112': '"max_new_tokens": 40'},
    },
    "2_watch_the_threads": {"step_seconds=0.3": "step_seconds=0", "max_new_tokens=220": "max_new_tokens=120"},
    "3_your_own_model": {"--epochs 3": "--epochs 1"},
}


@pytest.fixture(scope="module")
def _model_and_compiled_code():
    """What a first run downloads, converts and compiles counts for no cell."""
    embedded_model_dir()
    library()


@pytest.mark.real
@pytest.mark.usefixtures("_model_and_compiled_code")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_is_stored_as_it_runs(path):
    execute.check(path, smaller=SMALLER.get(path.stem))


def tiny(folder, *sources):
    """A notebook of these code cells, not executed."""
    path = folder / "tiny.ipynb"
    cells = [new_markdown_cell("# Tiny", id="title")]
    cells += [new_code_cell(source, id=f"cell-{number}") for number, source in enumerate(sources, 1)]
    nbformat.write(new_notebook(cells=cells), path)
    return path


@pytest.fixture
def written(tmp_path):
    return lambda *sources: tiny(tmp_path, *sources)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tiny(tmp_path_factory.mktemp("stored"), "1", "2")
    execute.store(path)
    return path


def test_what_is_stored_passes_and_is_stable(written):
    path = written("import sys\nprint(1)\nprint(2)", "", "3", "print(4, file=sys.stderr)")
    execute.store(path)
    first = path.read_text()
    execute.check(path)
    execute.store(path)
    assert path.read_text() == first
    notebook = json.loads(first)
    assert [cell["id"] for cell in notebook["cells"]] == ["title", "cell-1", "cell-2", "cell-3", "cell-4"]
    assert [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"] == [1, None, 2, 3]
    assert notebook["cells"][1]["outputs"][0]["text"] == ["1\n", "2\n"]
    assert notebook["metadata"] == execute.METADATA


def test_the_kernel_is_this_python_with_this_checkout_s_package_and_no_progress_bars(written):
    path = written(
        f"import os, sys\nassert os.path.samefile(sys.executable, {sys.executable!r})",
        "from pathlib import Path\nimport medusa_apar\n"
        f"assert Path(medusa_apar.__file__).parent.parent.samefile({str(ROOT)!r})",
        "import tqdm\nfor _ in tqdm.tqdm(range(9)): pass",
        "assert Path('tiny.ipynb').exists()",
    )
    execute.store(path)
    assert not nbformat.read(path, as_version=4).cells[3].outputs


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda cells: cells[2].update(source="2 + 2"), "cell [2] (2 + 2) has changed since its outputs were stored"),
        (lambda cells: cells.append(new_code_cell("5")), "cell [3] (5) was never executed"),
        (lambda cells: cells.pop(1), "cell [1] (2) was executed as number 2, not in order"),
        (
            lambda cells: cells[1].outputs.append(nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])),
            "cell [1] (1) is stored with an error",
        ),
    ],
    ids=["changed", "new", "removed", "error"],
)
def test_stale_outputs_are_refused_before_anything_runs(stored, tmp_path, monkeypatch, change, reason):
    notebook = nbformat.read(stored, as_version=4)
    change(notebook.cells)
    path = tmp_path / "tiny.ipynb"
    nbformat.write(notebook, path)
    monkeypatch.setattr(execute, "execute", lambda *_: pytest.fail("it ran"))
    with pytest.raises(execute.NotebookError) as error:
        execute.check(path)
    assert str(error.value) == f"tiny.ipynb: {reason}. Run: python notebooks/execute.py {path}"


def test_what_is_run_in_place_of_a_part_has_to_have_that_part(stored):
    execute.check(stored, smaller={"1": "3"})
    with pytest.raises(execute.NotebookError, match="failed"):
        execute.check(stored, smaller={"2": "1 / 0"})
    with pytest.raises(execute.NotebookError, match="tiny.ipynb: no cell has 'x = 5'"):
        execute.check(stored, smaller={"x = 5": "x = 1"})


@pytest.mark.parametrize(
    "source, reason",
    [
        ("1 / 0", "failed:\n"),
        ("import time\ntime.sleep(30)", "took more than 1 seconds"),
        ("import os\nos._exit(3)", "ended the kernel"),
        ("print(chr(27) + '[1m')", "prints colours, which cannot be stored"),
        (f"print({str(ROOT / 'setup.py')!r})", f"prints a path of this machine ({ROOT}), which cannot be stored"),
    ],
    ids=["error", "limit", "exit", "colours", "path"],
)
def test_a_cell_that_fails_is_named_and_the_notebook_stays_as_it_was(written, source, reason):
    path = written("1", source)
    before = path.read_text()
    with pytest.raises(execute.NotebookError) as error:
        execute.store(path, limit=1)
    assert str(error.value).startswith(f"tiny.ipynb: cell [2] ({source.splitlines()[0]}) {reason}")
    assert path.read_text() == before


def test_the_command_says_what_it_did_and_where_it_stopped(written, capsys):
    path = written("1 / 0")
    assert execute.main([str(path)]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    path = written("1")
    assert execute.main(["--check", str(path)]) == 1
    assert "was never executed" in capsys.readouterr().err
    assert execute.main([str(path)]) == 0 and execute.main(["--check", str(path)]) == 0
    assert capsys.readouterr().out == "tiny.ipynb: executed and stored\ntiny.ipynb: runs\n"
    with pytest.raises(SystemExit):
        execute.main([os.devnull + "/none.ipynb"])
