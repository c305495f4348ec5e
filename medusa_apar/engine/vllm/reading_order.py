"""Priorities by reading order: what is read first is written first.

vLLM takes a number with a request, lower first, and never asks again, while an answer's threads come one by one. So a
thread gets an interval of numbers: its own is the last of it, and its children divide the rest. Answers come one behind
the other, as in the native engine's scheduler: by their own priority, then by arrival, then as they are read.
"""

from __future__ import annotations

from medusa_apar.threads.paragraph_tree import Thread
from medusa_apar.threads.request import Request

_CHILDREN = 32  # of a thread that are told apart; later ones share the last one's place
_LEVELS = 3  # of threads that are told apart
_ANSWER: int = _CHILDREN**_LEVELS  # numbers of one answer
_ANSWERS = 1 << 32  # arrivals before they begin anew
_MOST = 1 << 14  # of a request's own priority, either way; all of it together fits into 63 bits


def priority(request: Request, thread: Thread) -> int:
    """vLLM's priority of a thread's requests: lower than that of all that is read behind it."""
    own = max(-_MOST, min(request.options.priority, _MOST))
    first, size = 0, _ANSWER
    lineage = [*(parent for parent, _ in thread.ancestors()), thread]
    for parent, child in zip(lineage, lineage[1:], strict=False):
        if size < _CHILDREN:
            break
        size //= _CHILDREN
        first += min(parent.children.index(child), _CHILDREN - 2) * size
    return (own * _ANSWERS + request.arrival % _ANSWERS) * _ANSWER + first + size - 1
