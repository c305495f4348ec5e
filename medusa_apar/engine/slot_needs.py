"""How many KV slots answers will hold at most, learned from answers that have ended: what admission goes by.

Answers that share a pool do not need their most at the same time: one gives all of its slots back while another has
just begun. So a request fits where the sum of what all are expected to hold stays within the pool until the last of
them has ended. (The past-future scheduler of LightLLM, arXiv 2507.10150, section 3, looks ahead likewise; here threads
give slots back before their answer ends, so that what an answer holds is learned apart from what it writes.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from medusa_apar.threads.request import Request, Status

_BACK_OFF = 0.1  # what a preemption adds to the share of their limit that answers are expected to need
_MEMORY = 0.9  # of the running means of what answers need and write, beside their limit
_PRIOR_STEPS = 8.0  # for which the usual pace counts beside a request's own
_LEAST_LEFT = 16  # tokens that an answer will still write which has written more than was expected


class Course(NamedTuple):
    """What one request is expected to do with its slots.

    at_once: slots that it takes in its next steps, whatever it writes. growth: slots that it takes evenly over the
    `left` steps until it ends. freed: slots that are free after that.
    """

    at_once: float
    growth: float
    left: float
    freed: float


def peak(courses: Sequence[Course]) -> float:
    """The most slots beyond those held now that requests take together until all have ended.

    Slots grow evenly in between, so that the most is held when one of them is about to end.
    """
    if not courses:
        return 0.0
    at_once, growth, left, freed = np.array(courses, dtype=np.float64).T
    times = left[:, None]
    running = left[None] >= times
    taken = at_once + np.where(running, growth * np.minimum(times / left, 1.0), growth - freed)
    return float(max(taken.sum(axis=1).max(), at_once.sum()))


@dataclass(slots=True)
class SlotNeeds:
    """Args:
    context_length: most tokens of a path, None without a limit.
    share: of what one thread of `max_new_tokens` would hold behind the prompt, how many slots answers have held at
        once. Threads give theirs back as they end, so an answer that forks holds fewer than it writes; 1 before any
        has ended.
    written: of `max_new_tokens`, how many tokens answers have had; 1 before any has ended.
    pace: tokens of an answer for each of its steps.
    """

    context_length: int | None = None
    share: float = 1.0
    written: float = 1.0
    pace: float = 1.0
    _peaks: dict[Request, int] = field(default_factory=dict)  # of unfinished requests, behind their prompts

    def expected(self, request: Request) -> int:
        """Slots for prompt and answer; a preempted one needs what it had."""
        if request.options.score_from is not None:
            return len(request.prompt_ids)
        behind = max(math.ceil(self.share * request.max_new_tokens), self._peaks.get(request, 0))
        expected = len(request.prompt_ids) + behind
        return expected if self.context_length is None else min(expected, self.context_length)

    def course(self, request: Request, held: int, found: int = 0, kept: int = 0) -> Course:
        """What is to come of a request that holds so many slots.

        found: slots of others that it will share as soon as it runs. kept: of its own, those that others need too.
        """
        prompt, expected = len(request.prompt_ids), self.expected(request)
        at_once = max(min(prompt, expected) - held - found, 0)
        if request.options.score_from is not None:
            return Course(at_once, 0, at_once + 1, held + at_once - kept)  # a row a step at the slowest
        limit, so_far = request.max_new_tokens, 0
        if request.live:
            so_far = min(request.live[-1][1], limit)  # tokens of the text, were no thread to write another
        left = max(self.written * limit - so_far, min(_LEAST_LEFT, limit - so_far), 1.0)
        # One that holds as much as was expected goes on growing as answers do.
        usual = left * min(self.share / max(self.written, 1e-9), 1.0)
        growth = max(expected - max(held, prompt), min(usual, _LEAST_LEFT), 0)
        pace = (so_far + _PRIOR_STEPS * self.pace) / (request.stats.steps + _PRIOR_STEPS)
        return Course(at_once, growth, left / pace, held + at_once + growth - kept)

    def note(self, request: Request, held: int) -> None:
        """The request holds so many slots now."""
        self._peaks[request] = max(held - len(request.prompt_ids), self._peaks.get(request, 0))

    def back_off(self) -> None:
        """Answers have needed more than was expected."""
        self.share = min(self.share + _BACK_OFF, max(self.share, 1.0))

    def learn(self, request: Request) -> None:
        """Takes over what a request that has ended tells, if it has been answered."""
        peak = self._peaks.pop(request, None)
        if peak is not None and request.status is Status.FINISHED and request.options.score_from is None:
            # The last step's root has had a slot, too; the last token has none. So an answer that writes all of its
            # limit in one thread has needed all, however short it is.
            needed = (peak + 1) / max(request.max_new_tokens - 1, 1)
            self.share = _MEMORY * self.share + (1 - _MEMORY) * min(needed, 2.0)
            wrote = len(request.text) / request.max_new_tokens
            self.written = _MEMORY * self.written + (1 - _MEMORY) * min(wrote, 1.0)
            self.pace = _MEMORY * self.pace + (1 - _MEMORY) * len(request.text) / max(request.stats.steps, 1)
