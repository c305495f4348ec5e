"""The forest of one step: every row that one forward pass checks, and the mask that says what each row sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from medusa_apar.events import Drafted
from medusa_apar.events.recording import Recording
from medusa_apar.threads.paragraph_tree import Thread

from .names import HUES, hue, name
from .picture import Picture, Recorded, sources
from .pieces import Pieces

_TEXT, _ROW, _CELL, _HEAD = 330, 18, 15, 76  # pixels
_WORD, _STEP = 74, 13  # where words begin, and how much further at each depth
_PENDING_SHOWN = 12  # rows of a segment's pending tokens, the last ones


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a forest: a pending token of a thread, the root the last of them, or a node of its draft tree.

    index: of a pending token among its thread's tokens, forced ones included; for a node, of the token before the draft
    tree. node: None for a pending token. above: the node's ancestors, itself included. position: on the path.
    """

    thread: Thread
    token: int
    index: int
    position: int
    node: int | None = None
    above: frozenset[int] = frozenset()
    root: bool = False
    source: str = ""


@dataclass(frozen=True, slots=True)
class Block:
    """Cached tokens of one thread, from index to index, that every row sees all or none of."""

    thread: Thread
    first: int
    stop: int


def rows(recording: Recording, batch_row: int = 0) -> list[Row]:
    """The rows of one request, in the order of the forest. `recording` is in the middle of a step."""
    return [
        row
        for thread, drafted in recording.drafted.items()
        if recording.rows[drafted.request] == batch_row
        for row in _segment(thread, drafted)
    ]


def blocks(recording: Recording, batch_row: int = 0) -> list[Block]:
    """What is in the cache for these rows."""
    cached: dict[Thread, int] = {}
    drafted = {thread: d for thread, d in recording.drafted.items() if recording.rows[d.request] == batch_row}
    for thread, its in drafted.items():
        cached[thread] = max(cached.get(thread, 0), its.cached)
        for ancestor, stop in thread.ancestors():
            fed = drafted[ancestor].cached if ancestor in drafted else stop
            cached[ancestor] = max(cached.get(ancestor, 0), fed)
    found = []
    for thread in recording.trees[batch_row].depth_first():
        stop = cached.get(thread, 0)
        prompt = thread.num_forced if thread.parent is None else 0
        cuts = {0, stop, prompt, *(child.seen for child in thread.children)}
        inner = sorted(cut for cut in cuts if cut <= stop)
        found += [Block(thread, *pair) for pair in zip(inner, inner[1:], strict=False)]
    return found


def sees(row: Row, thread: Thread, index: int) -> bool:
    """Whether a row sees a thread's token."""
    if thread is row.thread:
        return index <= row.index
    return any(ancestor is thread and index < stop for ancestor, stop in row.thread.ancestors())


def mask(rows: list[Row], blocks: list[Block]) -> np.ndarray:
    """bool [rows, blocks + rows]: what each row sees of the cache, and of the forest itself."""
    seen = np.zeros((len(rows), len(blocks) + len(rows)), dtype=bool)
    for place, row in enumerate(rows):
        for column, block in enumerate(blocks):
            seen[place, column] = sees(row, block.thread, block.stop - 1)
        for column, other in enumerate(rows, len(blocks)):
            if other.node is None:
                seen[place, column] = sees(row, other.thread, other.index)
            else:
                seen[place, column] = other.thread is row.thread and other.node in row.above
    return seen


def forest(output: Recorded | Recording, step: int, row: int = 0, tokenizer: Any = None) -> Picture:
    """A step's rows of one request, thread by thread: the root, the draft tree below it, and beside them the mask.

    A filled square: the row sees what stands above the column. Wide columns are cached tokens, as many as are said;
    narrow ones the forest's own rows, in the same order. A sign in front of a node says who guessed it.
    """
    recording, tokenizer = sources(output, tokenizer)
    if not 1 <= step <= recording.step:
        raise ValueError(f"step is {step}, must be from 1 to {recording.step}")
    then = recording.at(step, checking=True)
    pieces, shown = Pieces(tokenizer), rows(then, row)
    hidden = _hidden(shown)
    accepted = _accepted(recording.at(step), row)
    columns = blocks(then, row)
    seen = mask(shown, columns)
    kept = [place for place, its in enumerate(shown) if place not in hidden]
    seen = np.concatenate([seen[kept][:, : len(columns)], seen[kept][:, [len(columns) + k for k in kept]]], axis=1)
    drawn = [shown[place] for place in kept]
    about = f"step {step}: {len(shown)} rows of {len({its.thread for its in shown})} threads in one forward pass"
    if hidden:
        about += f" ({len(hidden)} pending tokens not drawn)"
    svg = _svg(then, drawn, columns, seen, pieces, accepted)
    return Picture(f'<p class="ma-facts">{about}</p>{svg}{_KEY}', about)


def _segment(thread: Thread, drafted: Drafted) -> Iterator[Row]:
    stop = drafted.cached + drafted.pending
    for index in range(drafted.cached, stop):
        root = drafted.verified and index == stop - 1
        yield Row(thread, thread.tokens[index], index, thread.start + index, root=root)
    above: list[frozenset[int]] = []
    for node, (token, parent) in enumerate(zip(drafted.token_ids, drafted.parents, strict=True)):
        above.append(frozenset({node}) | (above[parent] if parent >= 0 else frozenset()))
        position = thread.start + stop - 1 + len(above[node])
        yield Row(thread, token, stop - 1, position, node, above[node], source=drafted.sources[node])


def _hidden(shown: list[Row]) -> set[int]:
    """Places of pending tokens of which there are too many to draw: a prompt's."""
    pending: dict[Thread, list[int]] = {}
    for place, row in enumerate(shown):
        if row.node is None:
            pending.setdefault(row.thread, []).append(place)
    return {place for places in pending.values() for place in places[: -_PENDING_SHOWN or None]}


def _accepted(after: Recording, row: int) -> dict[tuple[int, int], bool]:
    """By thread and node, whether it was right."""
    found: dict[tuple[int, int], bool] = {}
    for thread, drafted in after.drafted.items():
        if after.rows[drafted.request] == row:
            wrong = after.rejected[thread].nodes if thread in after.rejected else ()
            found |= {(thread.index, node): node not in wrong for node in range(len(drafted.token_ids))}
    return found


_SIGNS = {"heads": "◇", "ngrams": "≡", "recycled": "♺", "fork": "↳"}
_KEY = (
    '<p class="ma-key">● root, the last token that was chosen · ○ other pending token · ◇ guessed by the heads · '
    "≡ guessed, since it had been written before · ♺ guessed, since the model would have said so before · "
    "↳ [Child] below a guessed [Fork] · ✓ accepted, ✕ rejected · "
    "pos: position on the path</p>"
)


def _svg(
    recording: Recording,
    drawn: list[Row],
    columns: list[Block],
    seen: np.ndarray,
    pieces: Pieces,
    accepted: dict[tuple[int, int], bool],
) -> str:
    widths = [max(_CELL, 7 * len(str(block.stop - block.first)) + 6) for block in columns] + [_CELL] * len(drawn)
    left = np.concatenate([[0], np.cumsum(widths)]) + _TEXT
    html = [f'<text class="ma-axis" x="{_TEXT - 8}" y="{_HEAD - 6}" text-anchor="end">pos</text>']
    for column, block in enumerate(columns):
        label = "prompt" if block.thread.parent is None and block.first == 0 else name(block.thread)
        html.append(_heading(left[column] + widths[column] / 2, f"{label} · {block.stop - block.first}", block.thread))
    for place, row in enumerate(drawn):
        html.append(_heading(left[len(columns) + place] + _CELL / 2, _sign(row), row.thread))
    html.append(_grid(left, len(drawn)))
    for place, row in enumerate(drawn):
        y = _HEAD + place * _ROW
        parents = [up for up, its in enumerate(drawn[:place]) if its.thread is row.thread and its.above < row.above]
        if row.node is not None and parents:
            html.append(_branch(row, y, _HEAD + max(parents, key=lambda up: (len(drawn[up].above), up)) * _ROW))
        html.append(_row_label(recording, row, y, pieces, accepted))
        for column in np.flatnonzero(seen[place]).tolist():
            own = columns[column].thread if column < len(columns) else drawn[column - len(columns)].thread
            html.append(
                f'<rect class="ma-seen ma-h{hue(own, HUES)}" x="{left[column] + 1:.0f}" y="{y + 1}" '
                f'width="{widths[column] - 2}" height="{_ROW - 3}"/>'
            )
    height, width = _HEAD + len(drawn) * _ROW + 4, int(left[-1]) + 8
    label = f"{len(drawn)} rows of a forest and their mask"
    return (
        f'<div class="ma-scroll"><svg class="ma-forest" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{label}">{"".join(html)}</svg></div>'
    )


def _grid(left: np.ndarray, drawn: int) -> str:
    bottom = _HEAD + drawn * _ROW
    lines = [f"M{x:.0f} {_HEAD}V{bottom}" for x in left]
    lines += [f"M{left[0]:.0f} {_HEAD + place * _ROW}H{left[-1]:.0f}" for place in range(drawn + 1)]
    return f'<path class="ma-grid" d="{"".join(lines)}"/>'


def _branch(row: Row, y: float, above: float) -> str:
    """From a node to the one it hangs below."""
    x = _WORD + _STEP * (len(row.above) - 1) + 4
    return f'<path class="ma-grid" d="M{x} {above + _ROW - 2}V{y + _ROW / 2}H{x + _STEP - 6}"/>'


def _heading(x: float, text: str, thread: Thread) -> str:
    turned = f'transform="rotate(-55 {x:.0f} {_HEAD - 6})"' if len(text) > 2 else 'text-anchor="middle"'
    return f'<text class="ma-axis ma-h{hue(thread, HUES)}" x="{x:.0f}" y="{_HEAD - 6}" {turned}>{escape(text)}</text>'


def _row_label(recording: Recording, row: Row, y: float, pieces: Pieces, accepted: dict[tuple[int, int], bool]) -> str:
    baseline = y + _ROW - 5
    depth = len(row.above)
    verdict = "" if row.node is None else "✓" if accepted.get((row.thread.index, row.node)) else "✕"
    css = "ma-node" if row.node is not None else "ma-root"
    return (
        f'<g class="{css} ma-h{hue(row.thread, HUES)}">'
        f'<rect class="ma-stripe" x="0" y="{y + 1}" width="3" height="{_ROW - 2}"/>'
        f'<text x="8" y="{baseline}" class="ma-axis">{name(row.thread) if row.node is None else ""}</text>'
        f'<text x="{_WORD + _STEP * depth}" y="{baseline}">{_sign(row)} {escape(_word(recording, row, pieces))}</text>'
        f'<text x="{_TEXT - 50}" y="{baseline}">{verdict}</text>'
        f'<text x="{_TEXT - 8}" y="{baseline}" class="ma-axis" text-anchor="end">{row.position}</text></g>'
    )


def _sign(row: Row) -> str:
    return _SIGNS[row.source] if row.node is not None else "●" if row.root else "○"


def _word(recording: Recording, row: Row, pieces: Pieces) -> str:
    """A token's text with its spaces shown, control tokens by name."""
    tree = recording.trees[0]
    if row.token in (tree.fork_id, tree.child_id):
        return "[Fork]" if row.token == tree.fork_id else "[Child]"
    text = pieces.alone(row.token)
    return text.replace("\n", "⏎").replace(" ", "␣") if text.strip() != text else text
