"""What a step has brought a thread, as drafting and watching need to know it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medusa_apar.threads.paragraph_tree import Thread
from medusa_apar.threads.request import Request

from .candidates import Proposal


@dataclass(slots=True)
class DraftResult:
    """What became of the draft tree that a thread ran with.

    kept: int64 [nodes], which of the proposal's candidates were its nodes. nodes: those that were accepted, in order.
    forks: its nodes that are drafted `[Fork]`s.
    """

    proposal: Proposal
    kept: np.ndarray
    nodes: list[int]
    num_candidates: int  # nodes but for the `[Child]`s below drafted `[Fork]`s
    forks: list[int]


@dataclass(slots=True)
class Advance:
    """A thread that has gone on in a step.

    gained: its new tokens that were chosen; inserted ones may follow. row: the verified row whose hidden state the
    heads draft from. drafted: token ids and log-probabilities [n] that they drafted on the device, None otherwise.
    """

    request: Request
    thread: Thread
    gained: int
    row: int
    drafted: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def goes_on(self) -> bool:
        """Whether the model is asked behind its last token in the next step."""
        return self.thread.live and not self.thread.ends_with_forced
