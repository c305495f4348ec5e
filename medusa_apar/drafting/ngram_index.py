"""What an answer has said before: its threads repeat the prompt's phrasing, each other's and their own.

Looking an n-gram up in the prompt is prompt lookup decoding (Saxena 2023) and LLMA (arXiv 2304.04487); here all threads
of a request share one index, so that what a thread wrote is proposed to its siblings in the very next step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from medusa_apar.threads.paragraph_tree import Thread

LONGEST, SHORTEST = 4, 2  # tokens of the n-grams that are looked up, the longest first
MAX_PROMPT = 2048  # tokens of a prompt that are indexed, its last: 4 µs each, before the first token can be shown
MAX_MATCH = 12  # tokens up to which a match is followed back: beyond, it means the same
MAX_RECALLED = 10  # tokens


@dataclass(slots=True)
class NgramMatch:
    """What followed where the thread's last `length` tokens were written before."""

    tokens: list[int]
    length: int


@dataclass(slots=True)
class NgramIndex:
    """The n-grams of one request, each with where it was last followed by a token.

    child_id: after `[Child]` alone is looked up what the last thread began with.
    """

    child_id: int | None
    _places: dict[tuple[int, ...], tuple[list[int], int]] = field(
        default_factory=dict
    )  # tokens, index of what followed
    _known: dict[Thread, int] = field(default_factory=dict)  # how many of its tokens

    def learn(self, thread: Thread) -> None:
        """Takes in what the thread has written since the last time; the end of a trunk's prompt counts as written."""
        tokens, places = thread.tokens, self._places
        known = self._known.get(thread)
        first = max(0, thread.num_forced - MAX_PROMPT) if known is None else known
        for end in range(first, len(tokens)):
            for length in range(SHORTEST, min(LONGEST, end) + 1):
                places[tuple(tokens[end - length : end])] = tokens, end
        if thread.parent is not None and len(tokens) > 1:
            places[(tokens[0],)] = tokens, 1
        self._known[thread] = len(tokens)

    def lookup(self, thread: Thread) -> NgramMatch | None:
        """None where the thread's last tokens are new."""
        tokens = thread.tokens
        end = len(tokens)
        for length in range(min(LONGEST, end), 0, -1):
            if length < SHORTEST and tokens[-1] != self.child_id:
                break
            if (found := self._places.get(tuple(tokens[end - length :]))) is not None:
                before, place = found
                most = min(MAX_MATCH, end, place)
                while length < most and before[place - 1 - length] == tokens[end - 1 - length]:
                    length += 1
                return NgramMatch(before[place : place + MAX_RECALLED], length)
        return None
