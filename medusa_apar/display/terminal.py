"""Threads side by side in a terminal as they grow, and as lines of text where there is no terminal."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from medusa_apar.events import Event, StepFinished, ThreadFinished, ThreadStarted
from medusa_apar.events.recording import Recording
from medusa_apar.threads.paragraph_tree import ParagraphTree, Thread

from .names import hue, name
from .pieces import Pieces

COLOURS = ("white", "cyan", "green", "yellow", "magenta", "blue", "red")
LANE_WIDTH, LANE_HEIGHT = 32, 5  # characters, at least
FRAME_SECONDS = 0.1  # between two frames: drawing one costs about as much as a small step


def colour(thread: Thread) -> str:
    return COLOURS[hue(thread, len(COLOURS) - 1)]


def thread_text(pieces: Pieces, tree: ParagraphTree, thread: Thread) -> Text:
    """What a thread wrote itself, with the number of a child where its text will be spliced in."""
    text = Text(style=colour(thread))
    children = {child.fork_index: child for child in thread.children}
    for index, piece in enumerate(pieces.of(thread), thread.num_forced):
        if tree.is_visible(thread, index):
            text.append(piece)
        if (child := children.get(index)) is not None:
            text.append(f" ⟨{child.index}⟩", style=f"bold {colour(child)}")
    return text[len(text.plain) - len(text.plain.lstrip()) :]


def answer_text(tokenizer: Any, recording: Recording) -> Text:
    """The first row's answer in reading order, each thread's part in its colour."""
    pieces, text = Pieces(tokenizer), Text()
    for thread, index in recording.text():
        text.append(pieces.of(thread)[index - thread.num_forced], style=colour(thread))
    return text


class Lanes:
    """A consumer of events that draws a panel for each thread of the first row.

    A context manager, since the terminal needs restoring. transient: whether the panels vanish at its end.
    """

    def __init__(self, console: Console, tokenizer: Any, transient: bool = False):
        self.recording = Recording()
        self._console, self._pieces = console, Pieces(tokenizer)
        self._live = Live(console=console, auto_refresh=False, transient=transient)
        self._drawn = 0.0

    def __enter__(self) -> Lanes:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def __call__(self, event: Event) -> None:
        self.recording(event)
        if not isinstance(event, StepFinished):
            return
        if time.perf_counter() - self._drawn < FRAME_SECONDS and self.recording.trees[0].live:
            return
        self._live.update(self.frame(), refresh=True)
        self._drawn = time.perf_counter()

    def frame(self) -> Group:
        tree, step = self.recording.trees[0], self.recording.step
        height = max(self._console.height - 2, LANE_HEIGHT)
        widest = max(1, self._console.width // LANE_WIDTH)
        threads = _shown(tree, widest * (height // LANE_HEIGHT))
        columns = min(len(threads), widest)
        rows = -(-len(threads) // columns)
        grid = Table.grid(expand=True)
        for _ in range(columns):
            grid.add_column(ratio=1)
        size = (self._console.width // columns - 4, height // rows)
        panels = [self._lane(tree, thread, *size) for thread in threads]
        for row in range(rows):
            grid.add_row(*panels[row * columns : (row + 1) * columns])
        writing = sum(thread.live for thread in tree.threads)
        tokens = sum(len(thread.token_ids) for thread in tree.threads)
        line = f"step {step} · {tokens} tokens · {len(tree.threads)} threads, {writing} writing"
        return Group(grid, Text(line, style="dim", no_wrap=True, overflow="ellipsis"))

    def _lane(self, tree: ParagraphTree, thread: Thread, width: int, height: int) -> Panel:
        lines = thread_text(self._pieces, tree, thread).wrap(self._console, max(width, 1))
        return Panel(
            Text("\n").join(lines[-(height - 2) :]),
            title=name(thread),
            subtitle=f"{len(thread.token_ids)} tokens" + (" ✓" if thread.ended else ""),
            border_style="dim" if thread.ended else colour(thread),
            height=height,
        )


def _shown(tree: ParagraphTree, most: int) -> list[Thread]:
    """At most `most` threads in reading order: where there are more, those that still write, then the latest."""
    chosen = set(sorted(tree.threads, key=lambda thread: (thread.ended, -thread.index))[:most])
    return [thread for thread in tree.depth_first() if thread in chosen]


class Milestones:
    """A consumer of events that prints a line when a thread of the first row is forked or ends: for logs and pipes."""

    def __init__(self, console: Console, tokenizer: Any):
        self._console, self._tokenizer = console, tokenizer
        self._recording = Recording()

    def __enter__(self) -> Milestones:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def __call__(self, event: Event) -> None:
        self._recording(event)
        if not isinstance(event, (ThreadStarted, ThreadFinished)) or self._recording.rows[event.request]:
            return
        thread = self._recording.trees[0].threads[event.thread]
        if isinstance(event, ThreadFinished):
            self._say(event.step, f"{name(thread)} ends with {len(thread.token_ids)} tokens")
        elif thread.parent is not None:
            self._say(event.step, f"{name(thread)} leaves {name(thread.parent)} after {self._head(thread)!r}")

    def _head(self, thread: Thread) -> str:
        """The end of what its parent had written when it forked: the head of the item this thread details."""
        parent = thread.parent
        assert parent is not None
        written = range(parent.num_forced, thread.fork_index + 1)
        ids = [parent.tokens[index] for index in written if self._recording.trees[0].is_visible(parent, index)]
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip().rsplit("\n", 1)[-1][-60:]

    def _say(self, step: int, line: str) -> None:
        self._console.print(f"step {step:3}: {line}", highlight=False, markup=False, soft_wrap=True)
