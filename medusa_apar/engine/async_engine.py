"""What a server talks to: the verbs of an engine for asyncio, over a Python thread that steps."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Protocol

from medusa_apar.threads.request import Request

from .engine import Engine
from .inbox import Inbox
from .outputs import RequestOutput
from .stats import Stats


class AsyncEngine(Protocol):
    """An engine that answers many requests of one event loop at once."""

    def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """Outputs as they come: the first, which may be empty, as soon as the request is taken; the last has a finish
        reason. Those that nobody has read yet come as one. Closing the iterator aborts the request.

        Raises, when it is first awaited, what `Engine.add` raises; and RuntimeError where the engine has broken or is
        closed.
        """

    def abort(self, request: Request) -> None:
        """Ends a request, whose iterator then ends with "aborted"; one that has ended stays as it is."""

    async def drain(self, timeout: float | None = None) -> bool:
        """Takes no further requests and waits for those that run; False where some were left after `timeout` seconds.
        These are aborted."""

    async def close(self) -> None:
        """Aborts what is unfinished and gives everything back."""

    def stats(self) -> Stats:
        """Counts so far, and how it stood after its last step, or what was asked since; a copy."""

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
        # Waited for without a thread that waits, since the process could not end before that one.
        self._started, self._idle, self._gone = _milestone(), _milestone(), _milestone()
        self._lock = threading.Lock()  # of what follows: nothing is asked of a thread that has ended
        self._broken: BaseException | None = None
        self._draining = self._ended = False
        self._stats = Stats()

    async def start(self) -> ThreadedEngine:
        """Starts the thread and waits until the engine is there."""
        self._thread.start()
        await asyncio.wrap_future(self._started)
        if self._broken is not None:
            raise self._broken
        return self

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        inbox = Inbox()

        def tell(output: RequestOutput | Exception) -> None:
            try:
                inbox.put(output)
            except RuntimeError:  # the loop was closed under us: nobody waits
                self.abort(request)

        def add(engine: Engine) -> None:
            try:
                engine.add(request)
            except Exception as error:
                tell(error)
            else:
                self._tells[request] = tell
                tell(RequestOutput(request.id))

        self._ask(add)
        ended = False
        try:
            while not ended:
                try:
                    output = await inbox.take()
                except Exception:
                    ended = True
                    raise
                ended = output.finish_reason is not None
                yield output
        finally:
            if not ended:
                self.abort(request)

    def abort(self, request: Request) -> None:
        self._calls.put(lambda engine: self._abort(engine, request))

    async def drain(self, timeout: float | None = None) -> bool:
        with self._lock:
            self._draining = True
            if self._ended or not self._started.done():
                _pass(self._idle)
            self._calls.put(lambda engine: None)  # it may be waiting
        idle = asyncio.wrap_future(self._idle)
        done, _ = await asyncio.wait([idle], timeout=timeout)
        idle.cancel()
        await self.close()
        return bool(done)

    async def close(self) -> None:
        """Waits for the step that runs; not for an engine that is still being made, which is closed once it is."""
        with self._lock:
            self._draining = True
        self._calls.put(None)
        if self._started.done():
            await asyncio.wrap_future(self._gone)
            self._thread.join()

    def stats(self) -> Stats:
        return self._stats.copy()

    @property
    def healthy(self) -> bool:
        return self._started.done() and not self._ended and not self._draining

    def _ask(self, call: Callable[[Engine], None]) -> None:
        with self._lock:
            if self._broken is not None:
                raise RuntimeError(f"the engine has broken: {self._broken}") from self._broken
            if self._draining or self._ended or not self._started.done():
                raise RuntimeError("the engine takes no requests: it is not started, or it is closing.")
            self._calls.put(call)

    def _abort(self, engine: Engine, request: Request) -> None:
        """Aborts this very request: another may have its name by now."""
        tell = self._tells.pop(request, None)
        if tell is not None:
            engine.abort(request.id)
            its = request.stats
            tell(RequestOutput(request.id, finish_reason="aborted", cached_tokens=its.cached_tokens, queued=its.queued))

    def _run(self) -> None:
        try:
            self._serve()
        finally:
            _pass(self._gone)

    def _serve(self) -> None:
        try:
            engine = self._make()
        except BaseException as error:
            self._broken, self._ended = error, True
            _pass(self._started)
            return
        _pass(self._started)
        try:
            while self._take_calls(engine):
                outputs = engine.step()
                self._stats = engine.snapshot()
                self._tell(outputs)
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
            self._stats = engine.snapshot()
        for tell in self._tells.values():
            tell(why)
        self._tells.clear()
        while not self._calls.empty():
            call = self._calls.get()
            if call is not None:
                call(engine)
        _pass(self._idle)

    def _take_calls(self, engine: Engine) -> bool:
        """Runs what was asked since the last step, and waits while there is nothing to do; False to end."""
        called = False
        while True:
            try:
                call = self._calls.get(block=False)
            except queue.Empty:
                if called:
                    self._stats = engine.snapshot()
                if engine.unfinished:
                    return True
                if self._draining:
                    _pass(self._idle)
                call = self._calls.get()
            if call is None:
                return False
            call(engine)
            called = True

    def _tell(self, outputs: list[RequestOutput]) -> None:
        ended = {output.request_id: output for output in outputs}
        for request, tell in list(self._tells.items()):
            if (output := ended.get(request.id)) is not None:
                if output.finish_reason is not None:
                    del self._tells[request]
                tell(output)


def _milestone() -> Future[None]:
    """What a thread passes once and a coroutine may wait for; nobody's waiting can cancel it."""
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()
    return future


def _pass(milestone: Future[None]) -> None:
    with suppress(InvalidStateError):  # passed already
        milestone.set_result(None)
