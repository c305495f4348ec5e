"""What was answered, on disk: a killed measurement goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medusa_apar.job import append_lines, cut_half_a_line
from medusa_apar.json_files import numbered_lines, parse


class Runs:
    """A line of JSON per answered prompt or dialogue, found again by the values of its `keys`."""

    def __init__(self, path: Path, keys: tuple[str, ...] = ("system", "set", "id")) -> None:
        self.path, self.keys = path, keys
        self.rows: dict[tuple, dict[str, Any]] = {}
        if not path.exists():
            return
        cut_half_a_line(path)
        for number, line in numbered_lines(path):
            try:
                self._hold(parse(line))
            except (ValueError, KeyError, TypeError) as error:
                why = f"it lacks {error}" if isinstance(error, KeyError) else error
                raise ValueError(f"{path}:{number} is no line of such results: {why}") from error

    def __contains__(self, key: tuple) -> bool:
        return key in self.rows

    def _hold(self, row: dict[str, Any]) -> None:
        self.rows[tuple(row[key] for key in self.keys)] = row

    def add(self, rows: list[dict[str, Any]]) -> None:
        append_lines(self.path, rows)
        for row in rows:
            self._hold(row)
