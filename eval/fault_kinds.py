"""What happens in the fault campaign: clients of every bad kind, and good ones whose answers have to be right."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from .fault_cases import Case, malformed
from .fault_host import PATIENCE, Wrong

CLEAR = (429, 503)  # refusals of what would be answered at another time


@dataclass
class World:
    """Where events happen.

    ending: "" while all is well; "kill" or "drain" once the server is brought to its end. flood: connections at once
    that are more than the server takes. counts: what came of requests. events: kinds of events.
    """

    url: str
    port: int
    http: httpx.AsyncClient
    cases: list[Case]
    rng: random.Random
    flood: int
    ending: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)

    def case(self) -> Case:
        return self.rng.choice(self.cases)


# ---- one request, and whether what came of it is right


async def ask(world: World, case: Case, stream: bool, headers: dict[str, str] | None = None) -> httpx.Headers:
    """Asks, and raises Wrong unless the answer is the right one, or a clear refusal where there may be one."""
    body = case.body | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})
    try:
        async with asyncio.timeout(PATIENCE):
            response = await world.http.post(world.url + case.path, json=body, headers=headers)
    except TimeoutError:
        raise Wrong(f"no answer to {body} within {PATIENCE:.0f} seconds") from None
    except httpx.HTTPError as error:
        if not world.ending:
            raise Wrong(f"{error!r} for {body}") from error
        world.counts["not connected"] += 1
        return httpx.Headers()
    judge(world, case, response.status_code, response.headers, response.content, stream)
    return response.headers


def judge(world: World, case: Case, status: int, headers: Any, content: bytes, stream: bool) -> None:
    if status != 200:
        said = refusal(status, headers, content)
        if status not in CLEAR or (status == 503 and not world.ending):
            raise Wrong(f"HTTP {status} ({said}) for {case.body}")
        world.counts[f"HTTP {status}"] += 1
        return
    found = _read_stream(content) if stream else _read_whole(content)
    if found.error:
        if world.ending != "kill":
            raise Wrong(f"the stream ended with {found.error!r} for {case.body}")
        world.counts["error in the stream"] += 1
        return
    compare(case, found)
    world.counts["right"] += 1


def refusal(status: int, headers: Any, content: bytes) -> str:
    """What an error says. Wrong where it is not in OpenAI's form, or says to come again and not when."""
    try:
        error = json.loads(content)["error"]
        said, kind = error["message"], error["type"]
    except (ValueError, KeyError, TypeError):
        raise Wrong(f"HTTP {status} with {content[:200]!r}") from None
    if not said or not kind or (status in CLEAR and not str(headers.get("retry-after", "")).isdecimal()):
        raise Wrong(f"HTTP {status} with {error}, Retry-After {headers.get('retry-after')}")
    return said


@dataclass
class Found:
    """An answer as it was read; lists have an entry for each choice."""

    texts: list[str] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)
    tokens: int | None = None
    error: str = ""


def compare(case: Case, found: Found) -> None:
    """Against what is known of the case; what is not yet, becomes known."""
    if found.tokens != sum(map(len, found.ids)):
        raise Wrong(f"usage has {found.tokens} tokens, and {found.ids} came for {case.body}")
    if case.ids is not None and found.ids != [case.ids]:
        raise Wrong(f"the answer has tokens {found.ids}, and the engine alone gives {case.ids} for {case.body}")
    reasons = [str(reason) for reason in found.reasons]
    if not case.texts:
        case.texts, case.reasons = found.texts, reasons
    if (found.texts, reasons) != (case.texts, case.reasons):
        raise Wrong(f"{found.texts} ({reasons}) is not {case.texts} ({case.reasons}) for {case.body}")


def _read_whole(content: bytes) -> Found:
    answer = json.loads(content)
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    texts = [choice["message"]["content"] if "message" in choice else choice["text"] for choice in choices]
    ids, reasons = ([choice[name] for choice in choices] for name in ("token_ids", "finish_reason"))
    return Found(texts, ids, reasons, answer["usage"]["completion_tokens"])


def _read_stream(content: bytes) -> Found:
    events = [event[6:] for event in content.decode("utf-8").split("\n\n") if event.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        raise Wrong(f"a stream without its end: {content[-200:]!r}")
    found = Found()
    for event in map(json.loads, events[:-1]):
        if "error" in event:
            found.error = event["error"]["message"]
            continue
        for choice in event["choices"]:
            while len(found.texts) <= choice["index"]:
                found.texts.append("")
                found.ids.append([])
                found.reasons.append(None)
            place = choice["index"]
            found.texts[place] += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            found.ids[place] += choice.get("token_ids") or []
            found.reasons[place] = choice["finish_reason"] or found.reasons[place]
        if event.get("usage"):
            found.tokens = event["usage"]["completion_tokens"]
    return found


# ---- good clients


async def whole_answer(world: World) -> None:
    await ask(world, world.case(), stream=False)


async def streamed_answer(world: World) -> None:
    await ask(world, world.case(), stream=True)


async def look_around(world: World) -> None:
    """What a watcher asks."""
    for path, fine in (("/health", (200, 503)), ("/metrics", (200,)), ("/v1/models", (200, 503))):
        try:
            status = (await world.http.get(world.url + path, timeout=PATIENCE)).status_code
        except httpx.HTTPError as error:
            if not world.ending:
                raise Wrong(f"{error!r} for {path}") from error
            return
        if status not in fine or (status == 503 and not world.ending):
            raise Wrong(f"HTTP {status} for {path}")


# ---- faults


async def hang_up(world: World) -> None:
    """A client that goes somewhere in the middle, of a stream or of a wait for a whole answer."""
    case, rng = world.case(), world.rng
    body = case.body | {"stream": rng.random() < 0.7, "max_tokens": 200}
    seconds, chunks = rng.choice([0.0, 0.005, 0.02, 0.1]), rng.randint(0, 4)

    async def talk() -> None:
        async with world.http.stream("POST", world.url + case.path, json=body) as response:
            async for _ in response.aiter_raw():
                nonlocal chunks
                chunks -= 1
                if chunks < 0:
                    return
            await asyncio.sleep(PATIENCE)

    with suppress(TimeoutError, httpx.HTTPError):
        await asyncio.wait_for(talk(), seconds + (0.05 if chunks else 0.0))


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
    try:
        response = await world.http.post(
            world.url + case.path, content=body, headers={"Content-Type": "application/json"}, timeout=PATIENCE
        )
    except httpx.HTTPError as error:
        if not world.ending:
            raise Wrong(f"{error!r} for the body {body[:200]!r}") from error
        return
    said = refusal(response.status_code, response.headers, response.content)
    if not 400 <= response.status_code < 500 and not (response.status_code == 503 and world.ending):
        raise Wrong(f"HTTP {response.status_code} ({said}) for the body {body[:200]!r}")


async def slow_reader(world: World) -> None:
    """Reads a little at a time, and must get all of it."""
    case = world.case()
    async with _Raw(world) as raw:
        await raw.send(_request(case, stream=True))
        content = b""
        async with asyncio.timeout(PATIENCE):
            while part := await raw.read(PATIENCE, world.rng.randint(1, 700)):
                content += part
                await asyncio.sleep(world.rng.choice([0.0, 0.0, 0.002]))
        if not content and world.ending:
            return
        judge(world, case, *_parse(content), stream=True)


async def no_reader(world: World) -> None:
    """Asks for much, reads none of it, and goes after a while."""
    case = world.case()
    async with _Raw(world) as raw:
        await raw.send(_request(case, stream=True, max_tokens=200, apar={"events": True}, n=1))
        await asyncio.sleep(world.rng.choice([0.05, 0.3]))


async def flood(world: World) -> None:
    """More at once than the server takes: each is answered, or told to come again."""
    await together(ask(world, world.case(), world.rng.random() < 0.5) for _ in range(world.flood))


async def equal_ids(world: World) -> None:
    """Requests whose clients give them the same name are still different requests."""
    name = f"again-{world.rng.randint(0, 3)}"
    pairs = [(world.case(), world.rng.random() < 0.5) for _ in range(3)]
    answers = await together(ask(world, case, stream, {"X-Request-Id": name}) for case, stream in pairs)
    for headers in answers:
        if headers and headers.get("x-request-id") != name:
            raise Wrong(f"the answer to {name} is named {headers.get('x-request-id')}")


async def together(requests: Iterable[Awaitable[httpx.Headers | None]]) -> list[Any]:
    """All at once; what the first failed by is raised when all have ended."""
    results = await asyncio.gather(*requests, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


Kind = Callable[[World], Awaitable[None]]
GOOD: dict[Kind, int] = {whole_answer: 4, streamed_answer: 6, look_around: 1}
FAULTS: dict[Kind, int] = {
    hang_up: 6, half_a_request: 2, no_http: 1, malformed_body: 4, slow_reader: 2, no_reader: 2, flood: 1, equal_ids: 2,
}  # fmt: skip


# ---- sockets


class _Raw:
    """A connection without a client's manners, and with little room for what comes."""

    def __init__(self, world: World) -> None:
        self._port = world.port

    async def __aenter__(self) -> _Raw:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        self._socket.setblocking(False)
        self._loop = asyncio.get_running_loop()
        with suppress(OSError):
            await self._loop.sock_connect(self._socket, ("127.0.0.1", self._port))
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


def _parse(content: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer after which the connection was closed."""
    head, _, body = content.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        whole = b""
        while body:
            size, _, body = body.partition(b"\r\n")
            length = int(size, 16)
            whole, body = whole + body[:length], body[length + 2 :]
        body = whole
    try:
        return int(first.split()[1]), headers, body
    except (IndexError, ValueError):
        raise Wrong(f"an answer that begins with {first[:100]!r}") from None
