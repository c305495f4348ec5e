"""What a server talks to: the verbs of an engine for asyncio, over a Python thread that steps."""

from __future__ import annotations

import asyncio
import copy
import queue
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Protocol

from medusa_apar.threads.request import Request

from .engine import Engine, RequestOutput
from .stats import Stats


class AsyncEngine(Protocol):
    """An engine that answers many requests of one event loop at once."""

    def generate(self, request: Request) -> AsyncIterator[RequestOutput]:
        """Outputs as they come; the last has a finish reason. Closing the iterator aborts the request.

        Raises, when it is first awaited, what `Engine.add` raises; and RuntimeError where the engine has broken or is
        closed.
        """

    async def drain(self, timeout: float | None = None) -> bool:
        """Takes no further requests and waits for those that run; False where some were left after `timeout` seconds.
        These are aborted."""

    async def close(self) -> None:
        """Aborts what is unfinished and gives everything back."""

    def stats(self) -> Stats:
        """Counts so far, a copy."""

    @property
    def healthy(self) -> bool:
        """Whether requests are answered."""


Tell = Callable[[RequestOutput | Exception], None]


class ThreadedEngine:
    """An `AsyncEngine` over our own engine, which a thread of its own makes, steps and closes.

    Args:
        make: returns the engine; called in that thread. What it raises, `start` raises.
    """

    def __init__(self, make: Callable[[], Engine]) -> None:
        self._make = make
        self._calls: queue.SimpleQueue[Callable[[Engine], None] | None] = queue.SimpleQueue()
        self._tells: dict[Request, Tell] = {}  # of requests that the engine has; its thread alone knows them
        self._thread = threading.Thread(target=self._run, name="medusa-apar engine", daemon=True)
        self._started, self._idle = threading.Event(), threading.Event()
        self._lock = threading.Lock()  # of what follows: nothing is asked of a thread that has ended
        self._broken: BaseException | None = None
        self._draining = self._ended = False
        self._stats = Stats()

    async def start(self) -> ThreadedEngine:
        """Starts the thread and waits until the engine is there."""
        self._thread.start()
        await asyncio.to_thread(self._started.wait)
        if self._broken is not None:
            raise self._broken
        return self

    async def generate(self, request: Request) -> AsyncIterator[RequestOutput]:
        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()

        def tell(output: RequestOutput | Exception) -> None:
            try:
                loop.call_soon_threadsafe(outputs.put_nowait, output)
            except RuntimeError:  # the loop was closed under us: nobody waits
                self._calls.put(lambda engine: self._abort(engine, request))

        def add(engine: Engine) -> None:
            try:
                engine.add(request)
            except Exception as error:
                tell(error)
            else:
                self._tells[request] = tell

        self._ask(add)
        ended = False
        try:
            while not ended:
                output = await outputs.get()
                ended = isinstance(output, Exception) or output.finish_reason is not None
                if isinstance(output, Exception):
                    raise output
                yield output
        finally:
            if not ended:
                self._calls.put(lambda engine: self._abort(engine, request))

    async def drain(self, timeout: float | None = None) -> bool:
        with self._lock:
            self._draining = True
            if self._ended or not self._started.is_set():
                self._idle.set()
            self._calls.put(lambda engine: None)  # it may be waiting
        done = await asyncio.to_thread(self._idle.wait, timeout)
        await self.close()
        return done

    async def close(self) -> None:
        with self._lock:
            self._draining = True
        self._calls.put(None)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    def stats(self) -> Stats:
        return copy.deepcopy(self._stats)

    @property
    def healthy(self) -> bool:
        return self._started.is_set() and not self._ended and not self._draining

    def _ask(self, call: Callable[[Engine], None]) -> None:
        with self._lock:
            if self._broken is not None:
                raise RuntimeError(f"the engine has broken: {self._broken}") from self._broken
            if self._draining or self._ended or not self._started.is_set():
                raise RuntimeError("the engine takes no requests: it is not started, or it is closing.")
            self._calls.put(call)

    def _abort(self, engine: Engine, request: Request) -> None:
        """Aborts this very request: another may have its name by now."""
        if self._tells.pop(request, None) is not None:
            engine.abort(request.id)

    def _run(self) -> None:
        try:
            engine = self._make()
        except BaseException as error:
            self._broken, self._ended = error, True
            self._started.set()
            return
        self._started.set()
        try:
            while self._take_calls(engine):
                self._tell(engine.step())
                self._stats = copy.deepcopy(engine.stats)
        except BaseException as error:  # a step that fails leaves nothing that could be gone on with
            self._end(engine, error)
        else:
            self._end(engine, None)

    def _end(self, engine: Engine, error: BaseException | None) -> None:
        """Tells everybody who waits, those not yet added among them."""
        with self._lock:
            self._broken, self._ended = error, True
        why = RuntimeError("the engine was closed." if error is None else f"the engine has broken: {error}")
        with suppress(Exception):
            engine.close()  # so that what is still asked is refused
        for tell in self._tells.values():
            tell(why)
        self._tells.clear()
        while not self._calls.empty():
            call = self._calls.get()
            if call is not None:
                call(engine)
        self._stats = copy.deepcopy(engine.stats)
        self._idle.set()

    def _take_calls(self, engine: Engine) -> bool:
        """Runs what was asked since the last step, and waits while there is nothing to do; False to end."""
        while True:
            if not engine.unfinished and self._draining and self._calls.empty():
                self._idle.set()
            try:
                call = self._calls.get(block=not engine.unfinished)
            except queue.Empty:
                return True
            if call is None:
                return False
            call(engine)
            if not engine.unfinished:  # no step will tell what an abort has given back
                self._stats = copy.deepcopy(engine.stats)

    def _tell(self, outputs: list[RequestOutput]) -> None:
        ended = {output.request_id: output for output in outputs}
        for request, tell in list(self._tells.items()):
            if (output := ended.get(request.id)) is not None:
                if output.finish_reason is not None:
                    del self._tells[request]
                tell(output)
