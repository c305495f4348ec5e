"""Threads side by side at one moment: what is settled, what is guessed, and which guesses proved wrong."""

from __future__ import annotations

from html import escape
from typing import Any

from medusa_apar.events.recording import Recording
from medusa_apar.threads.paragraph_tree import ParagraphTree, Thread

from .guesses import chains, guess_text, wrong_guesses
from .names import HUES, count, hue, name, state
from .picture import Picture, Recorded, sources
from .pieces import Pieces

CHAINS_SHOWN = 3  # of the guesses that stand at one place


def lanes(
    output: Recorded | Recording,
    step: int | None = None,
    *,
    checking: bool = False,
    row: int = 0,
    tokenizer: Any = None,
) -> Picture:
    """A lane for each thread of a row, in reading order, as they were after a step (default: the last).

    What a thread gained in the step is bold, dotted underneath where it had been guessed; guesses that proved wrong are
    struck. With `checking` it is the middle of the step: the guesses that are being checked stand in grey italics, "or"
    between those for the same place.
    """
    recording, tokenizer = sources(output, tokenizer)
    if step is not None or checking:
        last = recording.step if step is None else step
        if not 0 <= last <= recording.step:
            raise ValueError(f"step is {last}, must be from 0 to {recording.step}")
        recording = recording.at(last, checking)
    return frame(recording, row, Pieces(tokenizer))


def frame(recording: Recording, row: int, pieces: Pieces) -> Picture:
    """The lanes of a row as they are now; `pieces` is kept from frame to frame."""
    shown = "".join(_lane(recording, row, thread, pieces) for thread in recording.trees[row].depth_first())
    about = _summary(recording, row)
    return Picture(f'<div class="ma-lanes">{shown}</div><p class="ma-facts">{about}</p>', about)


def _summary(recording: Recording, row: int) -> str:
    threads, steps = recording.trees[row].threads, recording.steps
    tokens = len(recording.text(row))
    writing = sum(thread.live for thread in threads)
    found = [
        f"step {recording.step}" + (": guesses are being checked" if recording.checking else ""),
        f"{count(tokens)}, {tokens / max(len(steps), 1):.1f} per step",
        f"{count(len(threads), 'thread')}, {writing} writing",
        f"{count(recording.readable(row))} can be read in order",
    ]
    if steps and len(recording.trees) == 1:
        found.append(f"{count(steps[-1].slots_kept, 'KV slot')} in use")
    return " · ".join(found)


def _lane(recording: Recording, row: int, thread: Thread, pieces: Pieces) -> str:
    running = thread in recording.drafted or recording.started[thread] == recording.step
    sign = state(thread) if running or thread.ended else "… waits"
    css = "ma-lane" + (" ma-over" if thread.ended else "")
    return (
        f'<section class="{css} ma-h{hue(thread, HUES)}">'
        f"<header><b>{name(thread)}</b> <span>{count(len(thread.token_ids))} {sign}</span></header>"
        f'<div class="ma-said"><div>{_said(recording, row, thread, pieces)}</div></div></section>'
    )


def _said(recording: Recording, row: int, thread: Thread, pieces: Pieces) -> str:
    tree, texts, origins = recording.trees[row], pieces.of(thread), recording.origins[thread]
    places = {child.fork_index - thread.num_forced: child for child in thread.children}
    wrong: dict[int, list[list[int]]] = {}
    for place, token_ids in wrong_guesses(recording, thread):
        wrong.setdefault(place, []).append(token_ids)
    html, run, last, begun = [], "", "", False
    for own in range(len(texts) + 1):
        new = own < len(texts) and origins[own].step == recording.step and not recording.checking
        css = ("ma-new" if origins[own].source in ("model", "rule") else "ma-new ma-hit") if new else "ma-old"
        if own in wrong or css != last:
            html.append(_run(run, last))
            run, last = "", css
        html += [
            f'<s class="ma-miss">{escape(guess_text(pieces, tree, thread, own, token_ids))}</s>'
            for token_ids in wrong.get(own, [])[:CHAINS_SHOWN]
        ]
        if own < len(texts):
            text = texts[own] if tree.is_visible(thread, own + thread.num_forced) else ""
            run += text if begun else text.lstrip()
            begun = begun or bool(run)
        if (child := places.get(own)) is not None:
            html += [_run(run, last), f'<b class="ma-fork ma-h{hue(child, HUES)}">⟨{child.index}⟩</b>']
            run = ""
    html.append(_run(run, last))
    return "".join(html) + _guessed(recording, tree, thread, pieces)


def _run(text: str, css: str) -> str:
    tag = "strong" if css.startswith("ma-new") else "span"
    return f'<{tag} class="{css}">{escape(text)}</{tag}>' if text else ""


def _guessed(recording: Recording, tree: ParagraphTree, thread: Thread, pieces: Pieces) -> str:
    """What is being checked: the likeliest chain as a continuation, others behind it."""
    drafted = recording.drafted.get(thread)
    if drafted is None or not recording.checking:
        return ""
    nodes = [node for node, source in enumerate(drafted.sources) if source != "fork"]
    texts = []
    for above, chain in chains(drafted.parents, nodes)[:CHAINS_SHOWN]:
        lineage: list[int] = []
        while above >= 0:
            lineage.insert(0, above)
            above = drafted.parents[above]
        ids = [drafted.token_ids[node] for node in (*lineage, *chain)]
        text = guess_text(pieces, tree, thread, len(thread.token_ids), ids, known=len(lineage))
        texts.append(f'<em class="ma-guess">{escape(text)}</em>')
    return '<em class="ma-or"> or </em>'.join(texts)
