"""Says once where draft heads guess no better than chance: heads of another model, or read in a wrong layout."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from .stats import Stats

logger = logging.getLogger(__name__)

ENOUGH = 300  # guesses, before anything is said
_NEXT_TO_NOTHING = 1 / 200  # share of guesses; poor heads that were trained for the model have ten times as many right


@dataclass(slots=True)
class _Tally:
    drafted: int = 0
    accepted: int = 0
    judged: bool = False


# By runtime, which `attach` makes anew: a copy of a hook with other settings is the same hook here.
_tallies: WeakKeyDictionary[Any, _Tally] = WeakKeyDictionary()


def watch(runtime: Any, stats: Stats, vocab_size: int) -> None:
    """Adds up a call's guesses of heads, and warns where of the first `ENOUGH` next to none were right."""
    tally = _tallies.setdefault(runtime, _Tally())
    if tally.judged:
        return
    tally.drafted += stats.drafted["heads"]
    tally.accepted += stats.accepted["heads"]
    if tally.drafted < ENOUGH:
        return
    tally.judged = True
    if tally.accepted <= tally.drafted * max(2 / vocab_size, _NEXT_TO_NOTHING):
        logger.warning(
            "Of the draft heads' first %d guesses %d were right, which is next to chance: they are another model's, or "
            "their file has another layout; answers are right all the same, but no faster.",
            tally.drafted,
            tally.accepted,
        )
