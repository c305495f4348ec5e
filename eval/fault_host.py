"""The server that the fault campaign asks: a real one behind a real socket, in this process, so that it can be looked
into when it has ended."""

from __future__ import annotations

import ctypes
import gc
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil

from medusa_apar.engine.engine import Engine
from medusa_apar.generate import MedusaApar
from medusa_apar.serve.backends import NativeBackend
from medusa_apar.serve.options import ServeOptions
from medusa_apar.serve.server import Server, listen
from medusa_apar.serve.service import Service

PATIENCE = 60.0  # seconds in which anything has to have come to its end
SEND_BUFFER = 8192  # bytes that the system takes from the server before a reader has read


class Wrong(AssertionError):
    """A promise that the server has broken."""


class Killed(BaseException):
    """Ends the engine's thread from inside, as nothing that is caught would."""


class _Deadly:
    """A runtime whose forward pass never comes back: slots are booked and written, and nothing is committed."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def step(self, *its: Any) -> Any:
        self._runtime.step(*its)
        raise Killed("the campaign has killed this thread")


class _Killable(NativeBackend):
    """The engine's thread dies in the middle of the next step once it is to."""

    native: Engine | None = None
    kill = False

    def make(self) -> Engine:
        engine = super().make()
        step = engine.step

        def stepping() -> list[Any]:
            if not self.kill:
                return step()
            runtime = engine.runtime
            engine.runtime = _Deadly(runtime)
            try:
                return step()
            finally:
                engine.runtime = runtime

        engine.step = stepping  # type: ignore[method-assign]
        self.native = engine
        return engine


class Host:
    """One server from start to end. Threads and sockets that were there before are none of its business."""

    def __init__(self, apar: MedusaApar, options: ServeOptions) -> None:
        self._threads_before = set(threading.enumerate())
        self.backend = _Killable(lambda: apar, options)
        self.service = Service(self.backend, "faults", options)
        self._listener = listen(options.host, 0)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # its connections have it too
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://{options.host}:{self.port}"
        self._server = Server(self.service)
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],), name="campaign's server")

    def start(self) -> None:
        self._thread.start()
        _wait("the server is not ready", lambda: self.service.state not in ("loading",))
        if self.service.failure is not None:
            raise self.service.failure

    def kill(self) -> None:
        """The engine's thread dies in its next forward pass."""
        self.backend.kill = True

    def drain(self) -> None:
        """What the first SIGTERM does."""
        self._server.handle_exit(signal.SIGTERM, None)

    def stop(self) -> None:
        """Wrong where the server does not end, or leaves anything behind."""
        if self.service.state != "draining":
            self._server.should_exit = True
        _wait("the server does not end", lambda: not self._thread.is_alive())
        self._listener.close()
        engine = self.backend.native
        assert engine is not None
        if engine.unfinished:
            raise Wrong(f"{engine.unfinished} requests have not ended")
        engine.ledger.check()  # free + live + cached == total
        pool = engine.ledger.pool
        if live := pool.in_use - getattr(pool, "cached", 0):
            raise Wrong(f"{live} slots are live after the end")
        _wait("threads are left", lambda: not self._left_threads(), self._left_threads)
        _wait("sockets are left", lambda: not self._left_sockets(), self._left_sockets)

    def _left_threads(self) -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread not in self._threads_before]

    def _left_sockets(self) -> list[str]:
        """TIME_WAIT is the system's own. One whose client gave up while it connected is the collector's."""
        gc.collect()
        found = psutil.Process().net_connections("inet")
        mine = [its for its in found if self.port in (its.laddr and its.laddr.port, its.raddr and its.raddr.port)]
        return [f"{its.laddr} {its.status}" for its in mine]


def resident() -> int:
    """Bytes of main memory that this process has, without what only waits to be collected.

    Every server has threads of its own, whose heaps glibc keeps when they have ended: it is asked to give them back.
    """
    gc.collect()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    size: int = psutil.Process().memory_info().rss
    return size


def _wait(wrong: str, done: Callable[[], bool], left: Callable[[], object] | None = None) -> None:
    until = time.monotonic() + PATIENCE
    while not done():
        if time.monotonic() > until:
            raise Wrong(wrong if left is None else f"{wrong}: {left()}")
        time.sleep(0.01)
