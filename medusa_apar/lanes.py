"""Threads side by side in a terminal as they grow, and as lines of text where there is no terminal."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .output import Stats
from .paragraph_tree import ParagraphTree, Thread

COLOURS = ("white", "cyan", "green", "yellow", "magenta", "blue", "red")
LANE_WIDTH, LANE_HEIGHT = 32, 5  # characters, at least
FRAME_SECONDS = 0.1  # between two frames: drawing one costs about as much as a small step


def colour(thread: Thread) -> str:
    return COLOURS[0] if thread.parent is None else COLOURS[1 + (thread.index - 1) % (len(COLOURS) - 1)]


def name(thread: Thread) -> str:
    return "trunk" if thread.parent is None else f"thread {thread.index}"


def thread_text(tokenizer: Any, tree: ParagraphTree, thread: Thread) -> Text:
    """What a thread wrote itself, with the number of a child where its text will be spliced in."""
    text, ids, shown = Text(style=colour(thread)), [], ""
    children = {child.fork_index: child for child in thread.children}
    for index in range(thread.num_forced, len(thread.tokens)):
        if tree.is_visible(thread, index):
            ids.append(thread.tokens[index])
        if (child := children.get(index)) is not None:
            # Decoding prefixes, not pieces: a piece alone may lose its leading space.
            decoded = tokenizer.decode(ids, skip_special_tokens=True)
            text.append(decoded[len(shown) :]).append(f" ⟨{child.index}⟩", style=f"bold {colour(child)}")
            shown = decoded
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    text.append(decoded[len(shown) :].rstrip("\ufffd"))  # half of a character that takes several tokens
    return text[len(text.plain) - len(text.plain.lstrip()) :]


def answer_text(tokenizer: Any, tree: ParagraphTree, ids: list[int]) -> Text:
    """The answer in reading order, each thread's part in its colour."""
    text, shown = Text(), ""
    order = [thread for thread, _ in tree.reading_order()][: len(ids)]
    for end in range(1, len(ids) + 1):
        if end == len(ids) or order[end] is not order[end - 1]:
            decoded = tokenizer.decode(ids[:end], skip_special_tokens=True)
            text.append(decoded[len(shown) :], style=colour(order[end - 1]))
            shown = decoded
    return text


class Lanes:
    """An observer of `generate` that draws one panel per thread; a context manager, as the terminal needs restoring."""

    def __init__(self, console: Console, tokenizer: Any):
        self._console, self._tokenizer = console, tokenizer
        self._live = Live(console=console, auto_refresh=False)
        self._drawn = 0.0

    def __enter__(self) -> Lanes:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def __call__(self, trees: list[ParagraphTree], stats: Stats) -> None:
        if time.perf_counter() - self._drawn < FRAME_SECONDS and trees[0].live:
            return
        self._live.update(self._frame(trees[0], stats), refresh=True)
        self._drawn = time.perf_counter()

    def _frame(self, tree: ParagraphTree, stats: Stats) -> Group:
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
        line = f"step {stats.steps} · {tokens} tokens · {len(tree.threads)} threads, {writing} writing"
        return Group(grid, Text(line, style="dim", no_wrap=True, overflow="ellipsis"))

    def _lane(self, tree: ParagraphTree, thread: Thread, width: int, height: int) -> Panel:
        lines = thread_text(self._tokenizer, tree, thread).wrap(self._console, max(width, 1))
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
    """An observer that prints a line whenever a thread is forked or ends: for logs and pipes."""

    def __init__(self, console: Console, tokenizer: Any):
        self._console, self._tokenizer = console, tokenizer
        self._started: set[Thread] = set()
        self._ended: set[Thread] = set()

    def __enter__(self) -> Milestones:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def __call__(self, trees: list[ParagraphTree], stats: Stats) -> None:
        for thread in trees[0].threads:
            if thread.parent is not None and thread not in self._started:
                self._started.add(thread)
                self._say(stats, f"{name(thread)} leaves {name(thread.parent)} after {self._head(trees[0], thread)!r}")
            if thread.ended and thread not in self._ended:
                self._ended.add(thread)
                self._say(stats, f"{name(thread)} ends with {len(thread.token_ids)} tokens")

    def _head(self, tree: ParagraphTree, thread: Thread) -> str:
        """The end of what its parent had written when it forked: the head of the item this thread details."""
        parent = thread.parent
        assert parent is not None
        written = range(parent.num_forced, thread.fork_index + 1)
        ids = [parent.tokens[index] for index in written if tree.is_visible(parent, index)]
        return self._tokenizer.decode(ids, skip_special_tokens=True).strip().rsplit("\n", 1)[-1][-60:]

    def _say(self, stats: Stats, line: str) -> None:
        self._console.print(f"step {stats.steps:3}: {line}", highlight=False, markup=False, soft_wrap=True)
