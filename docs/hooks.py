"""What mkdocs calls: it is given the pages that pages.py makes, and says what leads nowhere or asks another host."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from command_page import command_page  # mkdocs looks for a hook's imports beside it
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from notebook_page import notebook_page
from pages import Part, Site, asked_hosts, site

ROOT = Path(__file__).resolve().parent.parent
logger = logging.getLogger("mkdocs.hooks")  # a warning here fails the strict build
_made: list[Site] = []


def on_files(files: Files, config: MkDocsConfig) -> Files:
    stored = {
        f"notebooks/{path.name}": notebook_page(path.name, path.read_text(encoding="utf-8"))
        for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
    }
    made = site(ROOT, str(config.repo_url).rstrip("/"), {name: text for name, (text, _) in stored.items()})
    made.parts["commands.md"] = [Part("medusa_apar/commands/cli.py", 1, "Commands", command_page())]
    outputs = {mark: shown for _, marks in stored.values() for mark, shown in marks.items()}
    for page, text in made.markdown().items():
        text = re.sub(r"<!-- \S+\.ipynb \d+ -->", lambda mark: outputs[mark[0]], text)
        if (written := files.get_file_from_path(page)) is not None:
            files.remove(written)
        files.append(File.generated(config, page, content=text))
    for picture in sorted(made.pictures):
        files.append(File.generated(config, picture, abs_src_path=str(ROOT / picture)))
    for complaint in made.complaints:
        logger.warning(complaint)
    _made[:] = [made]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    page.edit_url = f"{str(config.repo_url).rstrip('/')}/edit/main/{_made[0].parts[page.file.src_uri][0].source}"


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    # With it the theme's script asks api.github.com how many stars the repository has.
    return output.replace('data-md-component="source"', "")


def on_post_build(config: MkDocsConfig) -> None:
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix in (".html", ".css"):
            for asked in asked_hosts(path.read_text(encoding="utf-8")):
                logger.warning(f"{path.relative_to(config.site_dir)} asks another host: {asked}")
