"""What pictures call a thread, and how they tell threads apart."""

from __future__ import annotations

from ..paragraph_tree import Thread


def name(thread: Thread) -> str:
    return "trunk" if thread.parent is None else f"thread {thread.index}"


def hue(thread: Thread, hues: int) -> int:
    """0 for the trunk, else from 1 to `hues`; threads that stand beside each other differ."""
    return 0 if thread.parent is None else 1 + (thread.index - 1) % hues
