"""The API's pages of the site: they show all that is public, and docstrings become Markdown without a word lost."""

import ast
import pkgutil
import re
from pathlib import Path

import medusa_apar
from docs import docstrings

ROOT = Path(__file__).parent.parent


def shown():
    """Names that the API's pages show, and members that they name."""
    for path in sorted((ROOT / "docs" / "api").glob("*.md")):
        for block in path.read_text(encoding="utf-8").split("\n::: ")[1:]:
            members = re.findall(r"members: \[(.*)\]", block)
            yield block.split()[0], [name for line in members for name in line.split(", ")]


def test_what_the_api_pages_show_exists_and_is_explained():
    for name, members in shown():
        found = pkgutil.resolve_name(name)
        assert found.__doc__, name
        assert [member for member in members if not hasattr(found, member)] == [], name


def test_the_api_pages_show_all_that_is_public():
    names = {name for name, _ in shown()}
    assert {f"medusa_apar.{name}" for name in medusa_apar.__all__ if name != "__version__"} <= names
    heads = {f"medusa_apar.heads.{name}" for name in medusa_apar.heads.__all__}
    assert heads - {"medusa_apar.heads.ResidualBlock"} <= names


def test_names_and_meanings_become_a_list():
    written = """What it takes.

name: what a
    thing is. other, more: goes
on here; so: not a name. Costs: none.
last: one

No item: here.
Nor: here."""
    assert (
        docstrings.listed(written)
        == """What it takes.

- `name`: what a
    thing is.
- `other`, `more`: goes
    on here; so: not a name. Costs: none.
- `last`: one

No item: here.
Nor: here."""
    )


def test_a_title_that_griffe_does_not_read_is_left_out():
    assert docstrings.listed("Args:\nplan: how.\n    else.") == "- `plan`: how.\n    else."
    google = "Args:\n    plan: how."
    assert docstrings.listed(google) == google


def words(text):
    return re.sub(r"[`:,-]|^(?:Args|Attributes):(?=\s)", " ", text, flags=re.MULTILINE).split()


def test_no_word_of_a_docstring_is_lost():
    count = 0
    for folder in ("medusa_apar", "heads", "triton_kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    written = ast.get_docstring(node) or ""
                    assert words(docstrings.listed(written)) == words(written), f"{path}: {written}"
                    count += written != docstrings.listed(written)
    assert count > 100


def test_comments_tell_of_fields():
    fields = """
    steps: int = 0  # passes
    # Nodes, and those
    # that were right.
    drafted: Counter[str] = field(default_factory=Counter)
    accepted: int = 0
    forks: int = 0  # of all
    plain: int = 0
    sequences: Tensor  # type: ignore[assignment]
    # Written anew.
    again: bool = False
    _own: int = 0
"""
    assert docstrings.commented(fields) == [
        "- `steps`: passes",
        "- `drafted`, `accepted`: nodes, and those that were right.",
        "- `forks`: of all",
        "- `again`: written anew.",
    ]
