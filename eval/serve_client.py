"""The client of the load benchmark: questions over HTTP, as many at once as are wanted, and when each part came back.

Every server is asked alike: `POST /v1/chat/completions`, streamed, with `include_usage`. Times are the event loop's
(`loop.time()`, in seconds).
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import httpx

# An answer may wait its turn in a queue, but some byte of it has to come within this many seconds.
PATIENCE = 600.0
TIMEOUT = httpx.Timeout(PATIENCE, connect=10.0)
UNLIMITED = httpx.Limits(max_connections=None, max_keepalive_connections=None)
SHOWN = 200  # characters of what a server says is wrong


class Chunk(NamedTuple):
    """A piece of an answer's text. tokens: how many the answer has so far, where the server says so with each chunk."""

    at: float
    size: int  # bytes of text
    tokens: int | None = None


@dataclass(slots=True, eq=False)
class Exchange:
    """One question and what came back, filled in while it comes.

    measured: whether its latency counts; what is not measured keeps the load up until the last measured one has ended.
    sent: when it was due; a client that is late with it makes the answer late.
    finished: when the answer was said to be complete.
    tokens: of the whole answer, as the server counts them; None for one that was cut off.
    error: why there is no right answer; "" where there is one, or where the client itself hung up.
    """

    number: int
    measured: bool = True
    sent: float = 0.0
    ended: float | None = None
    finished: float | None = None
    chunks: list[Chunk] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)  # of the chunks
    tokens: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int = 0
    finish_reason: str | None = None
    error: str = ""

    @property
    def answered(self) -> bool:
        return not self.error and self.tokens is not None and self.ended is not None

    def take(self, event: bytes, at: float) -> None:
        """A line of the stream, which came at that time."""
        if not event.startswith(b"data:") or self.error:
            return
        data = event[5:].strip()
        if data == b"[DONE]":
            return
        try:
            self._take(json.loads(data), at)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            self.error = f"a chunk that is none: {data[:SHOWN].decode('utf-8', 'replace')}"

    def _take(self, chunk: dict[str, Any], at: float) -> None:
        if "error" in chunk:
            self.error = message_of(chunk)
            return
        usage, text = chunk.get("usage") or {}, ""
        for choice in chunk["choices"]:
            text += choice.get("delta", {}).get("content") or ""
            if choice.get("finish_reason"):
                self.finish_reason, self.finished = choice["finish_reason"], at
        so_far = usage.get("completion_tokens")
        if so_far is not None:
            self.tokens, self.prompt_tokens = so_far, usage.get("prompt_tokens")
            self.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        if text:
            self.chunks.append(Chunk(at, len(text.encode("utf-8", "replace")), so_far))
            self.texts.append(text)

    def close(self, at: float) -> None:
        """The stream has ended by itself."""
        self.ended = at
        if not self.error and (self.tokens is None or self.finish_reason is None):
            missing = "usage" if self.tokens is None else "finish_reason"
            self.error = f"the stream ended without {missing}"


def message_of(content: Any) -> str:
    """What an error's body says, in OpenAI's form or any other."""
    error = content.get("error", content) if isinstance(content, dict) else content
    said = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(said).split())[:SHOWN]


async def ask(http: httpx.AsyncClient, url: str, body: dict[str, Any], exchange: Exchange) -> None:
    """Asks one question and fills in the exchange. Cancelling it hangs up, and the exchange keeps what it has got.

    url: the server's base, without `/v1`.
    """
    clock = asyncio.get_running_loop().time
    try:
        async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                exchange.error = f"HTTP {response.status_code}: {_said(await response.aread())}"
            rest = b""
            async for part in response.aiter_bytes():
                # Lines end with \n alone: httpx' own lines also end at separators that stand inside JSON.
                *lines, rest = (rest + part).split(b"\n")
                at = clock()
                for line in lines:
                    exchange.take(line, at)
    except (httpx.HTTPError, httpx.StreamError) as error:
        exchange.error = f"{type(error).__name__}: {error}".rstrip(": ")
    exchange.close(clock())


def _said(content: bytes) -> str:
    try:
        return message_of(json.loads(content))
    except ValueError:
        return message_of(content.decode("utf-8", "replace"))


Ask = Callable[[Exchange], Awaitable[None]]  # what is asked follows from the exchange's number


async def closed_loop(ask: Ask, clients: int, measured: int) -> list[Exchange]:
    """So many clients, each of which asks its next question as soon as the last one is answered.

    The first `measured` questions count. The clients go on until all of these have ended, so that the last ones do not
    find the server half idle, and then hang up.
    """
    talk = _Talk(ask, measured)
    numbers = count()

    async def client() -> None:
        while True:
            await talk.exchange(next(numbers), asyncio.get_running_loop().time())

    await talk.until_answered([asyncio.create_task(client()) for _ in range(min(clients, measured))])
    return talk.exchanges


async def open_loop(ask: Ask, rate: float, measured: int, seed: int) -> list[Exchange]:
    """Questions that come when they come, `rate` of them a second on average (Poisson), answered or not.

    The same seed gives the same times, and an answer's begins when its question was due. Questions go on coming until
    the first `measured` ones have ended.
    """
    talk = _Talk(ask, measured)
    waits = random.Random(seed)
    tasks: set[asyncio.Task[None]] = set()

    async def arrivals() -> None:
        clock = asyncio.get_running_loop().time
        at = clock()
        for number in count():
            at += waits.expovariate(rate)
            await asyncio.sleep(max(at - clock(), 0.0))
            tasks.add(asyncio.create_task(talk.exchange(number, at)))

    await talk.until_answered([asyncio.create_task(arrivals())], tasks)
    return talk.exchanges


class _Talk:
    """The exchanges of one setting, and how many measured ones are still to end."""

    def __init__(self, ask: Ask, measured: int) -> None:
        self._ask, self._measured, self._left = ask, measured, measured
        self.exchanges: list[Exchange] = []
        self._answered = asyncio.Event()

    async def exchange(self, number: int, due: float) -> None:
        exchange = Exchange(number, number < self._measured, due)
        self.exchanges.append(exchange)
        await self._ask(exchange)
        if exchange.measured:
            self._left -= 1
            if not self._left:
                self._answered.set()

    async def until_answered(
        self, tasks: list[asyncio.Task[None]], more: set[asyncio.Task[None]] | None = None
    ) -> None:
        """Waits for the measured exchanges, then ends all tasks; what one of them raised is raised here."""
        waiting = asyncio.create_task(self._answered.wait())
        try:
            while not waiting.done():
                running = {waiting, *tasks, *(more or ())}
                ended, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED, timeout=1.0)
                for task in ended:
                    task.result()
                if more is not None:
                    more -= ended
        finally:
            left = [waiting, *tasks, *(more or ())]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
