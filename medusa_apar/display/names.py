"""What pictures call things, and how they tell threads apart."""

from __future__ import annotations

from medusa_apar.threads.paragraph_tree import Thread

HUES = 6  # of the style's: .ma-h1 to .ma-h6
SOURCES = {
    "model": "chosen by the model",
    "heads": "guessed by the heads",
    "ngrams": "guessed, since it had been written before",
    "recycled": "guessed, since the model would have said so before",
    "rule": "written by the fork rule",
}


def name(thread: Thread) -> str:
    return "trunk" if thread.parent is None else f"thread {thread.index}"


def hue(thread: Thread, hues: int) -> int:
    """0 for the trunk, else from 1 to `hues`; threads that stand beside each other differ."""
    return 0 if thread.parent is None else 1 + (thread.index - 1) % hues


def count(number: int, what: str = "token") -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def state(thread: Thread) -> str:
    """With a sign of its own for each state."""
    return {None: "● writing", "stop": "✓ done", "length": "■ at the limit"}.get(thread.finish_reason, "✕ cut off")
