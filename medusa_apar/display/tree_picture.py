"""The paragraph tree: which thread was forked where, and what each begins with."""

from __future__ import annotations

from html import escape
from textwrap import shorten
from typing import Any

from medusa_apar.events.recording import Recording
from medusa_apar.threads.paragraph_tree import Thread

from .names import HUES, count, hue, name, state
from .picture import Picture, Recorded, sources
from .pieces import Pieces

_HEAD, _BEGINNING = 48, 60  # characters


def tree(output: Recorded | Recording, row: int = 0, tokenizer: Any = None) -> Picture:
    """One row's threads, each below the thread that forked it, with the text it hangs behind and its own beginning."""
    recording, tokenizer = sources(output, tokenizer)
    pieces = Pieces(tokenizer)
    trunk = recording.trees[row].trunk
    return Picture(
        f'<ul class="ma-tree">{_item(recording, row, trunk, pieces)}</ul>', "\n".join(_lines(recording, row, pieces))
    )


def _item(recording: Recording, row: int, thread: Thread, pieces: Pieces) -> str:
    below = "".join(_item(recording, row, child, pieces) for child in thread.children)
    head, beginning, about = _parts(recording, row, thread, pieces)
    hung = f'<span class="ma-head">{escape(head)}</span> → ' if head else ""
    return (
        f'<li class="ma-h{hue(thread, HUES)}"><b>{name(thread)}</b> <small>{escape(about)}</small><br>'
        f"{hung}{f'<q>{escape(beginning)}</q>' if beginning else ''}{f'<ul>{below}</ul>' if below else ''}</li>"
    )


def _lines(recording: Recording, row: int, pieces: Pieces) -> list[str]:
    lines = []
    for thread in recording.trees[row].depth_first():
        head, beginning, about = _parts(recording, row, thread, pieces)
        lines.append(f"{'  ' * thread.depth}{name(thread)} ({about}) {head + ' -> ' if head else ''}{beginning}")
    return lines


def _parts(recording: Recording, row: int, thread: Thread, pieces: Pieces) -> tuple[str, str, str]:
    """The end of what stands before it in its parent, its own beginning, and its figures."""
    shown = recording.trees[row].is_visible
    texts = pieces.of(thread)
    own = "".join(text for i, text in enumerate(texts) if shown(thread, i + thread.num_forced)).strip()
    beginning = shorten(own.split("\n", 1)[0], _BEGINNING, placeholder=" …")
    head, parent = "", thread.parent
    if parent is not None:
        stop = thread.fork_index + 1 - parent.num_forced
        said = (text for i, text in enumerate(pieces.of(parent)[:stop]) if shown(parent, i + parent.num_forced))
        head = "".join(said).strip().rsplit("\n", 1)[-1]
        if len(head) > _HEAD:
            head = "… " + head[-_HEAD:].partition(" ")[2]
    begun = f"forked in step {recording.started[thread]}, " if parent is not None else ""
    return head, beginning, f"{begun}{count(len(texts))}, {state(thread)}"
