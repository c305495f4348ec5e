"""Several answers at once, and server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar, cast

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .errors import ApiError

logger = logging.getLogger("medusa_apar.serve")

Item = TypeVar("Item")

# Some clients take them for the end of a line, where JSON does not.
_LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


async def begun(streams: Sequence[AsyncGenerator[Item, None]]) -> list[Item]:
    """The first item of each. Raises what one of them raises instead, and closes all.

    So what is refused is answered with its status, before a byte of an answer is sent.
    """
    firsts = await asyncio.gather(*(anext(stream) for stream in streams), return_exceptions=True)
    for first in firsts:
        if isinstance(first, BaseException):
            await closed(streams)
            raise first
    return firsts  # type: ignore[return-value]


async def merged(
    firsts: Sequence[Item], streams: Sequence[AsyncGenerator[Item, None]]
) -> AsyncGenerator[tuple[int, Item], None]:
    """Items of all streams as they come, each with its stream's number. All are closed with this one.

    firsts: as `begun` has them.
    """
    waiting: dict[asyncio.Future[Item], int] = {}
    try:
        for number, first in enumerate(firsts):
            yield number, first
        if len(streams) == 1:  # without a task for every item
            async for item in streams[0]:
                yield 0, item
            return
        waiting |= {asyncio.ensure_future(anext(stream)): number for number, stream in enumerate(streams)}
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=lambda task: waiting[task]):
                number = waiting.pop(task)
                try:
                    item = task.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(streams[number]))] = number
                yield number, item
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await closed(streams)


async def closed(streams: Iterable[AsyncGenerator[Any, None]]) -> None:
    for stream in streams:
        await stream.aclose()


class EventStream(StreamingResponse):
    """Chunks as unnamed events. What fails in the middle is told as an event too; [DONE] is the last in any case.

    sources: closed with the response, also where that has ended before a chunk was asked for.
    """

    def __init__(
        self, chunks: AsyncGenerator[Mapping[str, Any], None], sources: Sequence[AsyncGenerator[Any, None]]
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_lines(chunks), media_type="text/event-stream", headers=headers)
        self._chunks, self._sources = chunks, sources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await closed([cast(AsyncGenerator, self.body_iterator), self._chunks, *self._sources])


async def _lines(chunks: AsyncGenerator[Mapping[str, Any], None]) -> AsyncGenerator[str, None]:
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                yield _event(chunk)
        except ApiError as error:
            yield _event(error.body())
        except Exception:
            logger.exception("an answer failed")
            yield _event(ApiError(500, "the answer failed inside the server").body())
        yield "data: [DONE]\n\n"


def _event(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return f"data: {text if text.isascii() else text.translate(_LINE_ENDS)}\n\n"
