"""Work that grows with a body, off the event loop, on which all answers flow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from .errors import ApiError

_LONG = 1 << 14  # bytes of a body whose work would hold up all other answers
_AT_ONCE = 4  # threads, each of which may hold many times its body's memory

Result = TypeVar("Result")


class Aside:
    """Does long work in a few threads, and short work at once.

    most_waiting: for a thread; one more is answered with 429. None: any number.
    """

    def __init__(self, most_waiting: int | None = None) -> None:
        self._places, self._most, self._waiting = asyncio.Semaphore(_AT_ONCE), most_waiting, 0

    async def __call__(self, work: Callable[[], Result], size: int, always: bool = False) -> Result:
        """size: bytes of the body. always: it may be long all the same. Raises what the work raises."""
        if not always and size <= _LONG:
            return work()
        if self._places.locked() and self._most is not None and self._waiting >= self._most:
            said = f"{self._waiting} long requests are waiting to be read already; try again later"
            raise ApiError(429, said, headers={"Retry-After": "1"})
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._waiting -= 1
        try:
            return await asyncio.to_thread(work)
        finally:
            self._places.release()
