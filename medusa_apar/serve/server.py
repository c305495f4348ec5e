"""The socket, the signals and the start-up lines: a service under uvicorn, from loading to draining."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from types import FrameType
from typing import NoReturn

import uvicorn
from fastapi import FastAPI

from .app import create_app
from .guards import access_log
from .service import Service

logger = logging.getLogger("medusa_apar.serve")

_BACKLOG = 2048
_KEEP_ALIVE = 30  # seconds; longer than clients keep theirs, or a request would meet a connection that closes
_LAST_SECONDS = 1  # for answers that are written out but not read, after a drain


def serve(service: Service, app: FastAPI | None = None) -> int:
    """Serves until a signal ends it; the process's exit code. Raises what the model's loading raises.

    app: `create_app(service)` by default.
    """
    options = service.options
    with listen(options.host, options.port) as listener, _log_on_stderr(options.access_log):
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"medusa-apar serves {service.model_name} at http://{shown}:{port}", flush=True)
        if not options.api_keys and not ip_address(host.partition("%")[0]).is_loopback:
            logger.warning("no key is asked for: whoever reaches %s may ask", host)
        Server(service, app).run([listener])
    if isinstance(service.failure, asyncio.CancelledError):
        _end(0)  # a signal came while the model was loaded, which nothing can break off
    if service.failure is not None:
        raise service.failure
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections. OSError, in one sentence, where that cannot be."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        number = error.errno or 0
        why = os.strerror(number) if number > 0 else error.strerror  # a host name's errors have numbers of their own
        raise OSError(f"cannot listen at {host}:{port}: {why}") from error


class Server(uvicorn.Server):
    """uvicorn's, but for what a signal does: the first drains the service while its socket stays open, so that whoever
    asks is told, the second ends the process."""

    def __init__(self, service: Service, app: FastAPI | None = None) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(service) if app is None else app,
                lifespan="on",
                ws="none",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE,
                timeout_graceful_shutdown=_LAST_SECONDS,
            )
        )
        self.service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._tasks.append(asyncio.create_task(self._announce()))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1:
            _end(128 + sig)
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Has the server end once what runs has ended."""
        self._tasks.append(asyncio.get_running_loop().create_task(self._drain()))

    async def _announce(self) -> None:
        await self.service.settled()
        if self.service.failure is not None:
            self.should_exit = True
        else:
            print("ready", flush=True)

    async def _drain(self) -> None:
        timeout = self.service.options.shutdown_timeout
        logger.info("draining for at most %g seconds; a second signal stops at once", timeout)
        left = await self.service.drain(timeout)
        if left:
            logger.warning("%d requests were aborted", left)
        self.should_exit = True


def _end(code: int) -> NoReturn:
    """Ends the process at once, and the processes of its engine: no thread that still computes is waited for, or torn
    while it does."""
    sys.stdout.flush()
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(code)


@contextmanager
def _log_on_stderr(accesses: bool) -> Iterator[None]:
    handler, logs = logging.StreamHandler(), [logger, access_log] if accesses else [logger]
    for each in logs:
        each.addHandler(handler)
        each.setLevel(logging.INFO)
    try:
        yield
    finally:
        for each in logs:
            each.removeHandler(handler)
            each.setLevel(logging.NOTSET)
