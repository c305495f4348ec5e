"""A finished answer: every thread's part as a lane within the text, with where each token came from."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import groupby
from typing import Any

from medusa_apar.events.recording import Origin, Recording
from medusa_apar.threads.paragraph_tree import Thread

from .guesses import all_wrong_guesses, guess_text
from .names import HUES, SOURCES, count, hue, name
from .picture import Picture, Recorded, sources
from .pieces import Pieces
from .timeline_picture import timeline_svg

ROWS_SHOWN = 8
WrongGuesses = dict[tuple[Thread, int], list[tuple[int, list[int]]]]


def answer(output: Recorded | Recording, tokenizer: Any = None) -> Picture:
    """The rows of an output, or of a recording: figures, a timeline of threads and slots, and the text.

    The text is in reading order, a thread's part indented below the place where it was forked. A hover over a token
    tells the step in which it came and who guessed it; dotted underlines are guesses of the heads, dashed ones what had
    been written before. Opening "Replay" shows the text growing step by step.
    """
    recording, tokenizer = sources(output, tokenizer)
    pieces = Pieces(tokenizer)
    rows = range(min(len(recording.trees), ROWS_SHOWN))
    stats = None if isinstance(output, Recording) else output.stats
    parts = [_row(recording, row, pieces) for row in rows]
    if len(recording.trees) > 1:
        parts = [f"<h4>row {row}</h4>{part}" for row, part in zip(rows, parts, strict=True)]
    if len(recording.trees) > ROWS_SHOWN:
        parts.append(f"<p>and {len(recording.trees) - ROWS_SHOWN} more rows</p>")
    if stats is not None and stats.regenerated:
        note = f"{count(stats.regenerated, 'thread')} written anew afterwards, shown as first written"
        parts.append(f'<p class="ma-note">{note}</p>')
    text = "\n\n".join(f"{facts(recording, row)}\n{_plain(recording, row, pieces)}" for row in rows)
    return Picture("".join(parts) + _KEY, text)


def facts(recording: Recording, row: int) -> str:
    """Slots only where the pool was one row's alone."""
    tree, tokens = recording.trees[row], recording.readable(row)
    last = max((recording.finished.get(thread, recording.step) for thread in tree.threads), default=0)
    steps = recording.steps[:last]
    at_once = [0] * (len(steps) + 1)
    for thread in tree.threads:
        for step in {origin.step for origin in recording.origins[thread]}:
            at_once[step] += 1
    found = f"{count(tokens)} in {count(len(steps), 'step')} · {tokens / max(len(steps), 1):.2f} per step"
    if len(tree.threads) > 1:
        found += f" · {len(tree.threads)} threads, at most {max(at_once)} in a step"
    if len(recording.trees) == 1:
        found += f" · at most {max((step.slots_used for step in steps), default=0)} KV slots"
    return found


def _row(recording: Recording, row: int, pieces: Pieces) -> str:
    return (
        f'<p class="ma-facts">{facts(recording, row)}</p>'
        f"{timeline_svg(recording, row)}"
        '<details class="ma-replay"><summary>Replay</summary></details>'
        f'<div class="ma-answer">{_text(recording, row, pieces)}</div>'
    )


def _text(recording: Recording, row: int, pieces: Pieces) -> str:
    html: list[str] = []
    lineage: list[Thread] = []
    wrong = all_wrong_guesses(recording, row)
    for thread, group in groupby(recording.text(row), key=lambda entry: entry[0]):
        above = [ancestor for ancestor, _ in thread.ancestors()][1:] + [thread][: thread.depth]
        begins = bool(lineage) or bool(above)  # a lane above or around it has begun a new line already
        while lineage and lineage[-1] not in above:
            lineage.pop()
            html.append("</section>")
        for member in above[len(lineage) :]:
            html.append(_open(recording, member))
            lineage.append(member)
        html += _tokens(recording, row, thread, [index for _, index in group], pieces, wrong, begins)
    return "".join(html) + "</section>" * len(lineage)


def _tokens(
    recording: Recording,
    row: int,
    thread: Thread,
    places: list[int],
    pieces: Pieces,
    wrong: WrongGuesses,
    begins: bool,
) -> Iterator[str]:
    """A run of a thread's tokens, those of a step and a source in one element, and what was guessed wrongly between."""
    tree, texts, origins = recording.trees[row], pieces.of(thread), recording.origins[thread]
    first = thread.num_forced
    run, last = "", None
    for own in (place - first for place in places):
        struck = wrong.get((thread, own), [])
        if last is not None and (struck or origins[own] != last):
            yield _element(thread, last, run)
            run = ""
        for step, token_ids in struck:
            text = escape(guess_text(pieces, tree, thread, own, token_ids))
            yield f'<s class="ma-r" style="--s:{step}" hidden>{text}</s>'
        run, last = run + texts[own], origins[own]
        if begins:
            run = run.removeprefix("\n").lstrip(" ")
            begins = not run
    if last is not None:
        yield _element(thread, last, run)


def _element(thread: Thread, origin: Origin, text: str) -> str:
    title = f"step {origin.step}, {name(thread)}: {SOURCES[origin.source]}"
    return (
        f'<span class="ma-t ma-{origin.source}" style="--s:{origin.step}" title="{title}">{escape(text)}</span>'
        if text
        else ""
    )


def _open(recording: Recording, thread: Thread) -> str:
    origins = recording.origins[thread]
    steps = f"steps {origins[0].step} to {origins[-1].step}" if origins else "nothing written"
    label = f"{name(thread)} · {steps} · {count(len(origins))}"
    return f'<section class="ma-thread ma-h{hue(thread, HUES)}"><small class="ma-label">{label}</small>'


def _plain(recording: Recording, row: int, pieces: Pieces) -> str:
    return "".join(pieces.of(thread)[index - thread.num_forced] for thread, index in recording.text(row)).strip()


_KEY = (
    '<p class="ma-key"><span class="ma-heads">guessed by the heads</span> · '
    '<span class="ma-ngrams">guessed, since it had been written before</span> · '
    '<span class="ma-recycled">guessed, since the model would have said so before</span> · '
    "chosen by the model itself · "
    "hover over a word for the step in which it came · a box above: a step in which the thread wrote, "
    "with the number of tokens if more than one</p>"
)
