"""The command line as a page of the site: what --help says of each command."""

from __future__ import annotations

import os
from unittest.mock import patch

from medusa_apar.commands.cli import PROGRAM, parser

COLUMNS = 100  # --help is as wide as its terminal


def command_page() -> str:
    """Markdown; a section for each command."""
    root = parser()
    commands = next(action.choices for action in root._actions if action.dest == "command")
    assert isinstance(commands, dict)
    sections = [f"# Commands\n\nOn a terminal `{PROGRAM} COMMAND --help` says the same.\n"]
    with patch.dict(os.environ, COLUMNS=str(COLUMNS)):
        for name, command in commands.items():
            sections.append(f"## {PROGRAM} {name}\n\n```text\n{command.format_help()}```\n")
    return "\n".join(sections)
