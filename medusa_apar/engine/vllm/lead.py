"""Which threads wait, since what they would write now is hardly going to be read.

A trunk knows nothing of how long its children get. Where it runs on at their speed, the answer's limit cuts what it has
written, and a full batch has paid for it. The native engine asks the same before every step (`engine.row_worth`).
"""

from __future__ import annotations

from collections.abc import Iterable

from medusa_apar.engine.row_worth import ChildLengths, chances
from medusa_apar.threads.paragraph_tree import Thread
from medusa_apar.threads.request import Request

_STAYS = 0.7  # of the least chance, by which a thread that runs goes on: to stop and come back costs it a prefill


def least_chance(rows: int, free_rows: float) -> float:
    """How likely a row's token has to be read beside `rows` others, for the row to be worth its time.

    A step of n rows costs free_rows + n, in any unit. One more of chance p is worth it where the tokens that are read
    for the time do not fall: (n + p) / (free_rows + n + 1) >= n / (free_rows + n).
    """
    return rows / (rows + free_rows)


class Lead:
    """Judges the threads of all answers of an engine.

    Args:
        free_rows: as of `VllmOptions`.
    """

    def __init__(self, free_rows: float) -> None:
        self._free_rows, self._lengths = free_rows, ChildLengths()

    def waiting(self, request: Request, running: Iterable[Thread], rows: int) -> set[Thread]:
        """Live threads of a request that should not run now; never the one that is read first.

        running: its threads that run. rows: requests of vLLM that run in the same batch, of all answers. A sampled
        thread that has begun always goes on: to go on with it later would take other noise.
        """
        if len(request.live) < 2:
            return set()
        least, going = least_chance(rows, self._free_rows), set(running)
        most, held = request.options.max_threads, set[Thread]()
        likely = chances(request, self._lengths.mean(request))
        sampled = request.options.seed is not None
        later = len(going) if sampled else 0  # sampled ones that go on behind where we are
        for place, ((thread, _), chance) in enumerate(zip(request.live, likely, strict=True)):
            begun = thread in going
            if begun and sampled:
                later -= 1
                continue
            crowded = most is not None and max(place + later, 0 if begun else len(going)) >= most
            if place and (crowded or chance < least * (_STAYS if begun else 1)):
                held.add(thread)
        return held

    def learn(self, request: Request) -> None:
        """Takes over what an answer that has ended tells of the lengths of children."""
        self._lengths.learn(request)
