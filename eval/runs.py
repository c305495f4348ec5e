"""What was answered, on disk: a killed measurement goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from medusa_apar.job import write_text


class Runs:
    """runs.jsonl: a line per answered prompt or dialogue, found again by (system, set, id)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, str, str], dict[str, Any]] = {}
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # killed in mid-line
            write_text(path, whole)
        for line in filter(None, whole.split("\n")):  # splitlines() would also cut at U+2028, which JSON keeps
            row = json.loads(line)
            self.rows[row["system"], row["set"], row["id"]] = row

    def __contains__(self, key: tuple[str, str, str]) -> bool:
        return key in self.rows

    def add(self, rows: list[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.rows |= {(row["system"], row["set"], row["id"]): row for row in rows}
