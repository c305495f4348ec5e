"""Where a text ends by stop strings, looked for in the plainest way."""

from __future__ import annotations

from collections.abc import Sequence


def cut(text: str, stops: Sequence[str], from_end: int = 0) -> tuple[str, bool]:
    """The text before the stop string that ends first behind `from_end` characters, the longest of those; and whether
    there is one."""
    for end in range(from_end + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - len(max(found, key=len))], True
    return text, False
