"""What happens in the fault campaign: clients of every bad kind, and good ones whose answers have to be right."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import httpx

from .fault_cases import Case, malformed
from .fault_host import PATIENCE, Wrong
from .fault_judge import Gone, When, judge, parse, refusal

SENT = "sent_when"  # of a response of `posted`


@dataclass
class World:
    """Where events happen.

    room: how many tokens a case may ask for at most, so that it fits into the pool. ending: "" while all is well;
    "kill" or "drain" from just before the server is brought to its end. flood: connections at once that are more than
    the server takes. counts: what came of requests. events: kinds of events that reached the server.
    """

    url: str
    port: int
    http: httpx.AsyncClient
    cases: list[Case]
    room: Callable[[Case], int]
    rng: random.Random
    flood: int
    ending: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)

    def case(self) -> Case:
        return self.rng.choice(self.cases)


# ---- one request


async def ask(
    world: World, case: Case, stream: bool, headers: dict[str, str] | None = None, alone: bool = False
) -> httpx.Headers:
    """Asks, and raises Wrong unless the answer is the right one, or a clear refusal where there may be one.

    alone: nobody else asks, so that nothing may be refused.
    """
    body = case.body | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})
    try:
        async with asyncio.timeout(PATIENCE), posted(world, case.path, json=body, headers=headers) as response:
            content = await response.aread()
    except TimeoutError:
        raise Wrong(f"no answer to {body} within {PATIENCE:.0f} seconds") from None
    when = When(response.extensions[SENT], world.ending, alone)
    world.counts[judge(case, response.status_code, response.headers, content, stream, when)] += 1
    return response.headers


@asynccontextmanager
async def posted(world: World, path: str, **more: Any) -> AsyncIterator[httpx.Response]:
    """The answer, once it has begun. Gone where nobody listens any more and nobody has to; Wrong where one is lost.

    Its extension `SENT` is `world.ending` as it was when all of the request had been written: a busy machine may have
    taken its time until then.
    """
    sent, begun = world.ending, False

    async def trace(event: str, _: Any) -> None:
        nonlocal sent
        if event.endswith("send_request_body.complete"):
            sent = world.ending

    try:
        async with world.http.stream("POST", world.url + path, extensions={"trace": trace}, **more) as response:
            begun = True
            response.extensions[SENT] = sent
            yield response
    except httpx.HTTPError as error:
        lost(world, sent, error, begun)


def lost(world: World, sent: str, error: Exception, begun: bool) -> NoReturn:
    """A connection that failed; sent: `world.ending` before it was made. begun: an answer had begun.

    A drained server closes its socket when it ends: it refuses whoever comes then, and drops those in its backlog whom
    it has never seen. They have come after the drain began, and have not got a byte.
    """
    unseen = sent == "drain" and not begun
    if world.ending == "drain" and (unseen or isinstance(error, (httpx.ConnectError, ConnectionRefusedError))):
        world.counts["not connected"] += 1
        raise Gone
    raise Wrong(f"a request is lost{' in the middle of its answer' if begun else ''}: {error!r}") from error


# ---- good clients


async def whole_answer(world: World) -> None:
    await ask(world, world.case(), stream=False)


async def streamed_answer(world: World) -> None:
    await ask(world, world.case(), stream=True)


async def look_around(world: World) -> None:
    """What a watcher asks."""
    for path, fine in (("/health", (200, 503)), ("/metrics", (200,)), ("/v1/models", (200, 503))):
        sent = world.ending
        try:
            status = (await world.http.get(world.url + path, timeout=PATIENCE)).status_code
        except httpx.HTTPError as error:
            lost(world, sent, error, begun=False)
        if status not in fine or (status == 503 and not world.ending):
            raise Wrong(f"HTTP {status} for {path}")


# ---- faults


async def hang_up(world: World) -> None:
    """A client that goes somewhere in the middle, of a stream or of a wait for a whole answer."""
    case, rng = world.case(), world.rng
    body = case.body | {"stream": rng.random() < 0.7, "max_tokens": world.room(case)}
    body.pop("stop", None)
    seconds, chunks = rng.choice([0.0, 0.005, 0.02, 0.1]), rng.randint(0, 4)
    came = "before its answer"

    async def talk() -> str:
        nonlocal came
        async with posted(world, case.path, json=body) as response:
            if response.status_code != 200:
                await _refused(world, response)
                return ""
            came = "in the middle of its answer"
            left = chunks
            async for _ in response.aiter_raw():
                left -= 1
                if left < 0:
                    return came
            return "after its answer"

    with suppress(TimeoutError):
        came = await asyncio.wait_for(talk(), seconds + (0.05 if chunks else 0.0))
    if came:
        world.counts[f"hung up {came}"] += 1


async def _refused(world: World, response: httpx.Response) -> None:
    said = refusal(response.status_code, response.headers, await response.aread())
    if not When(response.extensions[SENT], world.ending).may_refuse(response.status_code):
        raise Wrong(f"HTTP {response.status_code} ({said}) for a client that would have hung up")


async def half_a_request(world: World) -> None:
    """A client that goes before it has said all."""
    request = _request(world.case())
    async with _Raw(world) as raw:
        await raw.send(request[: world.rng.randrange(1, len(request))])
        await asyncio.sleep(world.rng.choice([0.0, 0.01]))


async def no_http(world: World) -> None:
    async with _Raw(world) as raw:
        await raw.send(world.rng.randbytes(world.rng.randint(1, 300)) + b"\r\n\r\n")
        await raw.read(0.05)


async def malformed_body(world: World) -> None:
    case = world.case()
    body = malformed(case, world.rng)
    async with posted(
        world, case.path, content=body, headers={"Content-Type": "application/json"}, timeout=PATIENCE
    ) as response:
        status, sent = response.status_code, response.extensions[SENT]
        said = refusal(response.status_code, response.headers, await response.aread())
    if not 400 <= status < 500 and not (status == 503 and When(sent, world.ending).may_refuse(status)):
        raise Wrong(f"HTTP {status} ({said}) for the body {body[:200]!r}")


async def slow_reader(world: World) -> None:
    """Reads a little at a time, and must get all of it."""
    case = world.case()
    async with _Raw(world) as raw:
        await raw.send(_request(case, stream=True))
        sent = world.ending
        content = b""
        async with asyncio.timeout(PATIENCE):
            while part := await raw.read(PATIENCE, world.rng.randint(1, 700)):
                content += part
                await asyncio.sleep(world.rng.choice([0.0, 0.0, 0.002]))
        if not content:
            lost(world, sent, ConnectionResetError("closed without a byte"), begun=False)
        when = When(sent, world.ending)
        world.counts[judge(case, *parse(content), stream=True, when=when)] += 1


async def no_reader(world: World) -> None:
    """Asks for much, reads no more of it than its status, and goes after a while."""
    case = world.case()
    async with _Raw(world) as raw:
        await raw.send(_request(case, stream=True, max_tokens=world.room(case), apar={"events": True}, n=1))
        sent = world.ending
        await asyncio.sleep(world.rng.choice([0.05, 0.3]))
        status = (await raw.read(0.01, len(b"HTTP/1.1 200")))[-3:].decode("latin-1")
    if status == "200":
        world.counts["left unread"] += 1
    elif status and not When(sent, world.ending).may_refuse(int(status)):
        raise Wrong(f"HTTP {status} for a client that would not have read")


async def flood(world: World) -> None:
    """More at once than the server takes: each is answered, or told to come again."""
    await together(ask(world, world.case(), world.rng.random() < 0.5) for _ in range(world.flood))


async def equal_ids(world: World) -> None:
    """Requests whose clients give them the same name are still different requests."""
    name = f"again-{world.rng.randint(0, 3)}"
    pairs = [(world.case(), world.rng.random() < 0.5) for _ in range(3)]
    answers = await together(ask(world, case, stream, {"X-Request-Id": name}) for case, stream in pairs)
    for headers in answers:
        if headers.get("x-request-id") != name:
            raise Wrong(f"the answer to {name} is named {headers.get('x-request-id')}")


async def together(requests: Iterable[Awaitable[Any]]) -> list[Any]:
    """All at once, and what came of those that reached the server. Raises, when all have ended, what the first failed
    by, and Gone where none has reached it."""
    results = await asyncio.gather(*requests, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, Gone):
            raise result
    came = [result for result in results if not isinstance(result, Gone)]
    if not came:
        raise Gone
    return came


Kind = Callable[[World], Awaitable[None]]
GOOD: dict[Kind, int] = {whole_answer: 4, streamed_answer: 6, look_around: 1}
FAULTS: dict[Kind, int] = {
    hang_up: 6, half_a_request: 2, no_http: 1, malformed_body: 4, slow_reader: 2, no_reader: 2, flood: 1, equal_ids: 2,
}  # fmt: skip


# ---- sockets


class _Raw:
    """A connection without a client's manners, and with little room for what comes."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def __aenter__(self) -> _Raw:
        """Gone where nobody listens any more and nobody has to."""
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        self._socket.setblocking(False)
        self._loop = asyncio.get_running_loop()
        sent = self._world.ending
        try:
            await self._loop.sock_connect(self._socket, ("127.0.0.1", self._world.port))
        except OSError as error:
            self._socket.close()
            lost(self._world, sent, error, begun=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._socket.close()

    async def send(self, content: bytes) -> None:
        with suppress(OSError):  # who is gone reads no more
            await self._loop.sock_sendall(self._socket, content)

    async def read(self, seconds: float, most: int = 1 << 16) -> bytes:
        """What there is; nothing at the end, or when nothing has come."""
        with suppress(OSError, TimeoutError):
            return await asyncio.wait_for(self._loop.sock_recv(self._socket, most), seconds)
        return b""


def _request(case: Case, **changes: Any) -> bytes:
    body = case.body | changes
    if changes.get("stream"):
        body["stream_options"] = {"include_usage": True}
    content = json.dumps(body).encode()
    head = f"POST {case.path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
