"""A piece of HTML that notebooks show, with the style that all our pictures share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any, Protocol

from medusa_apar.engine.stats import Stats
from medusa_apar.events.recording import Recording


class Recorded(Protocol):
    """What `generate` returns, as far as pictures go."""

    events: Any
    tokenizer: Any
    stats: Stats | None

    @property
    def recording(self) -> Recording: ...


@cache
def style() -> str:
    return files(__package__).joinpath("style.css").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Picture:
    """body: HTML without style. text: what is printed where there is no HTML."""

    body: str
    text: str

    @property
    def html(self) -> str:
        return f'<div class="ma"><style>{style()}</style>{self.body}</div>'

    def page(self, title: str = "medusa-apar", margin: str = "1.5em") -> str:
        """A document of its own, light or dark as its reader's system is."""
        return (
            f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
            "<style>:root{color-scheme:light dark;background:Canvas;color:CanvasText}"
            f"body{{margin:{margin}}}</style>"
            f"</head><body>{self.html}</body></html>"
        )

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def sources(shown: Recorded | Recording, tokenizer: Any) -> tuple[Recording, Any]:
    """What is drawn, and the tokenizer it is read with."""
    if isinstance(shown, Recording):
        return shown, tokenizer
    if not shown.events:
        raise ValueError("this output has no events to draw from")
    return shown.recording, shown.tokenizer if tokenizer is None else tokenizer
