"""What a step will run: its threads, and what has to be fed so that they can."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from medusa_apar.drafting.speculator import Load
from medusa_apar.threads.paragraph_tree import Thread
from medusa_apar.threads.request import Request

_SCORED_ROWS = 512  # of a step, that score texts: 100 MB of float32 logits where the vocabulary is 49152
MAX_PREFILL_ROWS = 4096  # of a step beside which nobody decodes


class Feed(NamedTuple):
    """Tokens to be fed so that a thread can run: (thread or ancestor, how many of its tokens in all), ancestors first.

    rows: how many that are. prefills: whether they count as prefill. whole: whether the thread can then be verified.
    found: what comes from the prefix cache first, as of `SlotLedger.found`. idle: how many slots of that no live thread
        needs so far.
    """

    stops: list[tuple[Thread, int]]
    rows: int
    prefills: bool
    whole: bool
    found: list[tuple[Thread, np.ndarray]]
    idle: int


@dataclass(slots=True)
class Plan:
    """A step's threads. `feed`: of each thread that is fed, how many of its tokens in all."""

    chosen: dict[Thread, Request] = field(default_factory=dict)  # threads that are verified
    feed: dict[Thread, int] = field(default_factory=dict)
    requests: dict[Request, list[Thread]] = field(default_factory=dict)  # threads that are fed, of each that runs
    load: Load = Load(1, 0)  # what it runs at most, by which it is settled who drafts
    rows: int = 0  # without draft nodes
    prefill_rows: int = 0  # of these, what is fed beyond the rows of requests that decode
    prefill_left: int = MAX_PREFILL_ROWS
    scored_left: int = field(default_factory=lambda: _SCORED_ROWS)
