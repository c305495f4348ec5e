"""What one reader of an engine's outputs has not read yet."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import fields

from .outputs import RequestOutput


class Inbox:
    """What one reader has not read yet, as one output: a reader that never reads costs no more than its answer."""

    def __init__(self) -> None:
        self._loop, self._filled = asyncio.get_running_loop(), asyncio.Event()
        self._lock = threading.Lock()  # of what follows
        self._output: RequestOutput | None = None
        self._error: Exception | None = None

    def put(self, what: RequestOutput | Exception) -> None:
        """Called from any thread. RuntimeError where the reader's loop is closed."""
        if self._loop.is_closed():
            raise RuntimeError("the event loop is closed.")
        with self._lock:
            told = self._output is not None or self._error is not None
            if isinstance(what, Exception):
                self._error = what
            elif self._output is None:
                self._output = what
            else:
                _merge(self._output, what)
        if not told:
            self._loop.call_soon_threadsafe(self._filled.set)

    async def take(self) -> RequestOutput:
        """Awaited in the reader's loop. Raises what was put, once all that came before it is read."""
        await self._filled.wait()
        with self._lock:
            output, self._output = self._output, None
            if output is None:
                assert self._error is not None
                raise self._error
            if self._error is None:
                self._filled.clear()
            return output


def _merge(output: RequestOutput, later: RequestOutput) -> None:
    """Makes one output of two of the same request: lists go on, of all else the later counts."""
    for field in fields(output):
        old, new = getattr(output, field.name), getattr(later, field.name)
        if isinstance(old, list):
            old += new
        else:
            setattr(output, field.name, new)
