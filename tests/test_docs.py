"""The documents as a site, which `make docs` builds: links lead where they led, and nothing is left out."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

from docs import pages
from docs.command_page import command_page
from docs.notebook_page import notebook_page
from medusa_apar.commands import cli
from tests.support.files import home, repository_files

ROOT = Path(__file__).parent.parent
REPO = "https://example.org/repo"
# They tell of the figures beside them, and are linked to in the repository as these are.
NO_PAGES = ("eval/results/cpu/xeon_rows/README.md", "eval/results/cpu/zen3_forest/README.md")

README = """# A house

Home.

## Rooms

```sh
# no heading
```

### A kitchen

## Garden

See [rooms](#rooms).

## Cellar
"""
SECTIONS = {"rooms.md": (("README.md", "Rooms"),), "out.md": (("README.md", "Garden"), ("eval/README.md", "Yard"))}


@pytest.fixture
def house(tmp_path):
    """Makes the site of a small repository, with other texts where they are given."""

    def make(**changed):
        texts = {
            "README.md": README,
            "eval/README.md": "# Measures\n\n## Yard\n\n## Scale\n",
            "heads/TRAINING.md": "# Training\n",
            "docs/api/load.md": "# Load\n",
            "notebooks/1_a.ipynb": "{}",
        }
        for name, text in (texts | changed).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text, encoding="utf-8")
        for name in ("eval/a b.py", "eval/load.png", "notebooks/view.webp", "notebooks/dark.webp", "results/t.md"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("x", encoding="utf-8")
        return pages.site(tmp_path, REPO, {"notebooks/1_a.ipynb": "# Notebook\n\n## Look\n\nat it\n"}, SECTIONS)

    return make


# A link of eval/README.md as it is written, and as it stands on the page.
LINKS = {
    "[a](https://arxiv.org/abs/1)": "[a](https://arxiv.org/abs/1)",
    "[a](mailto:a@b.c)": "[a](mailto:a@b.c)",
    "[a](../README.md)": "[a](../README.md)",
    "[a](../README.md#cellar)": "[a](../README.md#cellar)",
    "[a](../README.md#rooms)": "[a](../rooms.md#rooms)",
    "[a](../README.md#a-kitchen)": "[a](../rooms.md#a-kitchen)",
    "[a](#yard)": "[a](../out.md#yard)",
    "[a](#scale)": "[a](README.md#scale)",
    "[`a`\nb](../heads/TRAINING.md)": "[`a`\nb](../heads/TRAINING.md)",
    "[a](../docs/api/load.md)": "[a](../api/load.md)",
    "[a](../notebooks/1_a.ipynb)": "[a](../notebooks/1_a.md)",
    "[a](../notebooks/1_a.ipynb#look)": "[a](../notebooks/1_a.md#look)",
    "![a](load.png)": "![a](load.png)",
    "![a](../notebooks/view.webp)": "![a](../notebooks/view.webp)",
    "[a](a%20b.py#L3)": f"[a]({REPO}/blob/main/eval/a%20b.py#L3)",
    "[a](../results/t.md)": f"[a]({REPO}/blob/main/results/t.md)",
    "[a](../results/)": f"[a]({REPO}/tree/main/results)",
    "[a]: ../results/t.md": f"[a]: {REPO}/blob/main/results/t.md",
    "`[a](nowhere.md)`": "`[a](nowhere.md)`",
    "```\n[a](nowhere.md)\n```": "```\n[a](nowhere.md)\n```",
    '<img src="load.png">': '<img src="load.png">',
    '<a href="../README.md#rooms">': '<a href="../rooms/#rooms">',
    '<a href="../README.md">': '<a href="../">',
    '<a href="a%20b.py">': f'<a href="{REPO}/blob/main/eval/a%20b.py">',
}


@pytest.mark.parametrize("written", LINKS)
def test_a_link_leads_where_it_led(house, written):
    made = house(**{"eval/README.md": f"# Measures\n\n{written}\n\n## Yard\n\n## Scale\n"})
    assert made.markdown()["eval/README.md"].split("\n\n")[1] == LINKS[written]
    assert not made.complaints


def test_pictures_are_taken_along(house):
    made = house(**{"heads/TRAINING.md": '![a](../eval/load.png) <img src="../notebooks/view.webp">'})
    made.markdown()
    assert made.pictures == {"eval/load.png", "notebooks/view.webp"}


BROKEN = {
    "[a](nowhere.md)": "eval/README.md links to nowhere.md, which does not exist",
    "[a](../../outside.md)": "eval/README.md links to ../../outside.md, which does not exist",
    "[a](../README.md#attic)": "eval/README.md links to ../README.md#attic, but README.md has no such heading",
    "[a](#attic)": "eval/README.md links to #attic, but eval/README.md has no such heading",
    "[a](../notebooks/1_a.ipynb#x)": "eval/README.md links to ../notebooks/1_a.ipynb#x, but notebooks/1_a.ipynb has no",
    '<img src="no.png">': "eval/README.md links to no.png, which does not exist",
}


@pytest.mark.parametrize("written", BROKEN)
def test_a_link_that_leads_nowhere_is_told(house, written):
    made = house(**{"eval/README.md": f"# Measures\n\n{written}\n\n## Yard\n"})
    made.markdown()
    (complaint,) = made.complaints
    assert complaint.startswith(BROKEN[written])


def test_a_heading_that_is_gone_is_told(house):
    made = house(**{"README.md": README.replace("## Garden", "## Park")})
    assert made.complaints == ["README.md has no heading 'Garden', of which docs/pages.py makes a page"]
    assert "Park" in made.markdown()["README.md"]


def test_a_section_is_a_page_of_its_own(house):
    markdown = house().markdown()
    assert markdown["rooms.md"] == "# Rooms\n\n```sh\n# no heading\n```\n\n## A kitchen\n\n"
    assert markdown["out.md"] == "# Garden\n\nSee [rooms](rooms.md#rooms).\n\n## Yard\n\n"
    assert markdown["README.md"] == "# A house\n\nHome.\n\n## Cellar\n"


def test_a_section_has_the_deeper_ones_with_it():
    document = pages.parts("a.md", "# One\n\n# Two\n\n## Below\n\n# Three\n")
    assert [part.title for part in pages.cut(document, "a.md", "Two")] == ["Two", "Below"]
    assert [part.title for part in document] == ["One", "Three"]


def test_a_notebook_stays_whole(house, tmp_path):
    house()
    section = {"look.md": (("notebooks/1_a.ipynb", "Look"),)}
    markdown = pages.site(tmp_path, REPO, {"notebooks/1_a.ipynb": "# N\n\n## Look\n\nat it\n"}, section).markdown()
    assert markdown["look.md"] == "# Look\n\nat it\n"
    assert "## Look\n\nat it\n" in markdown["notebooks/1_a.md"]


def test_a_document_is_the_sum_of_its_parts():
    for name in pages.DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "".join(part.text for part in pages.parts(name, text)) == text


def test_a_picture_follows_the_theme_of_the_site(house):
    picture = """<picture>
  <source media="(prefers-color-scheme: dark)" srcset="notebooks/dark.webp">
  <img src="notebooks/view.webp" alt="Threads
  grow.">
</picture>"""
    made = house(**{"README.md": README.replace("Home.", picture)})
    light, dark = re.findall("<img.*?>", made.markdown()["README.md"], re.DOTALL)
    assert 'src="notebooks/view.webp#only-light"' in light
    assert 'src="notebooks/dark.webp#only-dark"' in dark
    assert all("Threads\n  grow." in image and 'loading="lazy"' in image for image in (light, dark))
    assert made.pictures == {"notebooks/dark.webp", "notebooks/view.webp"}


def test_a_notebook_is_a_page_with_its_outputs():
    def code(source, *outputs):
        return {"cell_type": "code", "source": [source], "outputs": list(outputs)}

    def data(**of):
        return {"output_type": "display_data", "data": {kind.replace("_", "/"): [text] for kind, text in of.items()}}

    text, outputs = notebook_page(
        "n.ipynb",
        json.dumps(
            {
                "cells": [
                    {"cell_type": "markdown", "source": ["# N\n", "\n", "words"]},
                    code(
                        "a\nb", data(text_html="<b>1</b>", text_plain="1"), data(image_png="AA\nBB", text_plain="<i>")
                    ),
                    code("%%bash\nls", {"output_type": "stream", "text": ["x <", "y\n"]}, data(text_markdown="| t |")),
                ]
            }
        ),
    )
    marks = [f"<!-- n.ipynb {n} -->" for n in range(4)]
    cells = ["# N\n\nwords", "```python\na\nb\n```", marks[0], marks[1], "```sh\nls\n```", marks[2], marks[3]]
    assert text == "\n\n".join(cells) + "\n"
    html, picture, printed, table = (outputs[mark] for mark in marks)
    assert "<b>1</b>" in html
    assert 'src="data:image/png;base64,AABB"' in picture and 'alt="&lt;i&gt;"' in picture
    assert "x &lt;y\n" in printed
    assert table == "| t |"


FETCHED = {
    '<script src="https://a.b/c.js">': ["https://a.b/c.js"],
    "<img alt='x' src='//a.b/c.png'>": ["//a.b/c.png"],
    '<link rel="stylesheet" href="https://a.b/c.css">': ["https://a.b/c.css"],
    '<link href="https://fonts.x" rel="preconnect">': ["https://fonts.x"],
    "a { background: url(https://a.b/c.png) }": ["https://a.b/c.png"],
    '@import "https://a.b/c.css";': ["https://a.b/c.css"],
    '<a href="https://a.b">': [],
    '<link rel="canonical" href="https://a.b/c/">': [],
    '<script src="../c.js"></script><a href="https://a.b">': [],
    '<svg xmlns="http://www.w3.org/2000/svg">': [],
}


@pytest.mark.parametrize("text", FETCHED)
def test_what_a_browser_would_fetch_elsewhere_is_found(text):
    assert pages.asked_hosts(text) == FETCHED[text]


def repository():
    stored = {
        f"notebooks/{path.name}": notebook_page(path.name, path.read_text(encoding="utf-8"))[0]
        for path in (ROOT / "notebooks").glob("*.ipynb")
    }
    return pages.site(ROOT, REPO, stored)


def test_every_link_of_the_repository_leads_somewhere():
    made = repository()
    assert len(made.markdown()) > 20
    assert not made.complaints


def test_every_document_is_a_page():
    names = {
        path.as_posix()
        for path in repository_files(ROOT)
        if path.parts[0][0] != "." and (path.name == "README.md" or path.suffix == ".md" and len(path.parts) == 1)
    }
    assert names - set(NO_PAGES) <= repository().homes.keys()
    assert all((ROOT / name).exists() for name in (*NO_PAGES, *pages.DOCUMENTS))


def test_every_page_is_in_the_nav_once():
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"^ +- .*: (\S+\.md)$", config.partition("\nnav:\n")[2], re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert sorted(listed) == sorted([*repository().parts, "commands.md"])  # which docs/hooks.py makes


def test_the_repository_has_one_address():
    (address,) = re.findall(r"^repo_url: (\S+)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert address == home(ROOT)


def test_every_command_is_on_the_page_of_commands_with_all_its_options():
    page = command_page()
    root = cli.parser()
    for command in cli.COMMANDS:
        assert f"## medusa-apar {command}" in page.splitlines()
        with pytest.raises(SystemExit) as ended, contextlib.redirect_stdout(io.StringIO()) as said:
            root.parse_args([command, "--help"])
        assert ended.value.code == 0
        options = set(re.findall(r"(?m)^  (--[a-z-]+)", said.getvalue()))
        section = page.partition(f"## medusa-apar {command}\n")[2].partition("\n## ")[0]
        assert options and options <= set(section.replace(",", " ").split())
