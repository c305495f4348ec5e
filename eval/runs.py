"""What was answered, on disk: a killed measurement goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from medusa_apar.job import write_text


class Runs:
    """A line of JSON per answered prompt or dialogue, found again by the values of its `keys`."""

    def __init__(self, path: Path, keys: tuple[str, ...] = ("system", "set", "id")) -> None:
        self.path, self.keys = path, keys
        self.rows: dict[tuple, dict[str, Any]] = {}
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # killed in mid-line
            write_text(path, whole)
        for line in filter(None, whole.split("\n")):  # splitlines() would also cut at U+2028, which JSON keeps
            self._hold(json.loads(line))

    def __contains__(self, key: tuple) -> bool:
        return key in self.rows

    def _hold(self, row: dict[str, Any]) -> None:
        self.rows[tuple(row[key] for key in self.keys)] = row

    def add(self, rows: list[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for row in rows:
            self._hold(row)
