"""The model behind the routes, from loading to draining."""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from starlette.requests import Request as HttpRequest

from medusa_apar.engine.admission import QueueFull
from medusa_apar.engine.outputs import RequestOutput
from medusa_apar.facts import ModelFacts
from medusa_apar.new_request import engine_request
from medusa_apar.requests import CallOptions, Sampling
from medusa_apar.threads.request import Request

from .backends import Backend, NativeBackend
from .errors import ApiError
from .exchange import Exchange, exchange_of
from .metrics import Metrics
from .options import ServeOptions

if TYPE_CHECKING:
    from medusa_apar.engine.async_engine import AsyncEngine
    from medusa_apar.generate import MedusaApar

logger = logging.getLogger("medusa_apar.serve")

_LONGEST_RETRY = 60  # seconds; clients of OpenAI's heed up to 120
_GRACE = 5.0  # seconds that a drain gives to bodies that are read and answers that are written out
_LOOK = 0.05  # seconds between two looks at the engine while it drains


class Service:
    """One model and its engine, which many HTTP requests share.

    Args:
        backend: what answers; what returns the model is our own engine, over that.
        model_name: by which clients know it.

    Attributes: `backend`, `engine`, `metrics`, `options`, `model_name`, and `facts` once the model is loaded. All
    methods belong to the event loop.
    """

    def __init__(
        self, backend: Backend | Callable[[], MedusaApar], model_name: str, options: ServeOptions | None = None
    ) -> None:
        self.options = ServeOptions() if options is None else options
        self.backend: Backend = NativeBackend(backend, self.options) if callable(backend) else backend
        self.model_name = model_name
        self.metrics = Metrics(lambda: self.engine.stats())
        self.failure: BaseException | None = None  # what ended the start
        self._facts: ModelFacts | None = None
        self._ready = self._draining = self._said_broken = False
        self._places = math.inf  # answers that an idle engine takes at once
        self._settled, self._nobody = asyncio.Event(), asyncio.Event()
        self._nobody.set()
        self.num_in_flight = 0  # HTTP requests that are answered now

    @property
    def engine(self) -> AsyncEngine:
        return self.backend.engine

    @property
    def facts(self) -> ModelFacts:
        if self._facts is None:
            raise self._unavailable()
        return self._facts

    @property
    def state(self) -> str:
        """One of "loading", "ready", "draining", and "broken" where the engine has died."""
        if self._draining:
            return "draining"
        if not self._ready and self.failure is None:
            return "loading"
        return "ready" if self._ready and self.engine.healthy else "broken"

    async def start(self) -> None:
        """Loads, makes the engine, and has it run its first steps. Raises what went wrong, which `failure` keeps."""
        try:
            self._facts = await self.backend.start()
            # Of several tokens, so that heads are asked too.
            first = engine_request(self._facts, "warm-up", [0], Sampling(), CallOptions(), max_new_tokens=4)
            async for output in self.engine.generate(first):
                if output.error is not None:
                    raise output.error
            self._places = self.engine.stats().places
            self._ready = True
        except BaseException as error:
            self.failure = error
            if not isinstance(error, SystemExit):  # the model's own code's, which would tear the event loop down
                raise
        finally:
            self._settled.set()

    async def settled(self) -> None:
        """Waits until the start has ended, well or not."""
        await self._settled.wait()

    def new_id(self, prefix: str = "") -> str:
        """A name that no other request has."""
        return prefix + uuid.uuid4().hex

    def check_answers(self) -> None:
        """`ApiError` where new requests are not answered now."""
        if self.state != "ready":
            raise self._unavailable()

    def check_queue(self) -> None:
        """`ApiError` 429 where the queue was full after the engine's last step, so that a flood costs no parsing. What
        passes may still be refused by the engine."""
        if self.engine.stats().places <= 0:
            raise self._full(f"{self.options.max_queue} requests are waiting already; try again later.")

    def run(self, request: Request, http_request: HttpRequest | None = None) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of an engine's request for one HTTP request, whose body has been read.

        The first output comes as soon as the engine has taken the request, and has no tokens as a rule: what is refused
        is refused before it, so that a stream which waits for it can still answer with the right status. The request is
        aborted within a step when the client goes or the iterator is closed. Where an HTTP request has several, make
        all their iterators before one is awaited: more than can ever be taken at once are refused.

        Raises ApiError: 400 for what can never be answered, 429 where the queue is full, 503 where the engine has died
        or is closed, 500 for what the request itself failed by, 499 where the client has gone.
        """
        exchange = exchange_of(http_request)
        exchange.answers += 1
        return self._run(request, http_request, exchange)

    async def _run(
        self, request: Request, http_request: HttpRequest | None, exchange: Exchange
    ) -> AsyncGenerator[RequestOutput, None]:
        self._check_answers_fit(exchange.answers)
        measure = self.metrics.measure(exchange.began)
        gone = asyncio.create_task(_abort_when_gone(http_request, lambda: self.engine.abort(request)))
        outputs, taken = self.engine.generate(request), False
        reason: str | None = None
        try:
            async for output in outputs:
                if not taken:
                    taken = True
                    measure.taken(len(request.prompt_ids), exchange.count_prompt(request.prompt_ids))
                measure.queued(output.queued)
                measure.wrote(len(output.token_ids))
                exchange.answer_tokens += len(output.token_ids)
                reason = output.finish_reason
                if reason == "error":
                    logger.warning("%s failed: %r", request.id, output.error)
                    raise ApiError(500, f"the request failed: {output.error}", headers={"x-should-retry": "false"})
                if reason == "aborted":
                    raise ApiError(499, "the client has gone")
                yield output
        except QueueFull as error:
            raise self._full(str(error)) from error
        except (ValueError, NotImplementedError) as error:
            raise ApiError(400, str(error)) from error
        except RuntimeError as error:
            self._say_broken(error)
            reason = "error"
            raise self._unavailable() from error
        except asyncio.CancelledError:
            reason = "aborted"
            raise
        finally:
            exchange.answers -= 1
            if taken:
                measure.ended(reason or "aborted")  # without one it is closed before its answer's end
            gone.cancel()
            await outputs.aclose()

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """For as long as an HTTP request is answered: a drain waits for it."""
        self.num_in_flight += 1
        self._nobody.clear()
        try:
            yield
        finally:
            self.num_in_flight -= 1
            if not self.num_in_flight:
                self._nobody.set()

    async def drain(self, timeout: float | None = None) -> int:
        """Answers no further request, waits for those that run, and closes the engine. How many were still there after
        `timeout` seconds, which are aborted.

        Who sends no more of a body, or does not read, is waited for no longer than a short grace."""
        self._draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._drained()
        left = self.num_in_flight
        await self.engine.close()
        return left

    async def _drained(self) -> None:
        def runs() -> bool:
            stats = self.engine.stats()
            return stats.running + stats.waiting > 0

        while True:
            while self.num_in_flight and runs():
                await asyncio.sleep(_LOOK)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._nobody.wait(), _GRACE)
            if not runs():  # else a body has come to its end meanwhile
                return

    async def close(self) -> None:
        self._draining = True
        await self.engine.close()

    def _unavailable(self) -> ApiError:
        said = {
            "loading": "the model is still being loaded; try again soon",
            "draining": "the server is shutting down",
            "broken": "the engine has died: the server has to be started again",
        }.get(self.state, "the engine takes no requests now")
        return ApiError(503, said, headers={} if self.state == "broken" else {"Retry-After": "1"})

    def _full(self, said: str) -> ApiError:
        return ApiError(429, said, headers={"Retry-After": self._retry_after()})

    def _check_answers_fit(self, answers: int) -> None:
        """`ApiError` 400 for more answers of one HTTP request than an idle engine takes, which could try for ever."""
        if answers > self._places:
            said = f"{answers} answers are asked for at once, but this server takes {self._places:g} at most."
            raise ApiError(400, said)

    def _say_broken(self, error: RuntimeError) -> None:
        if self.state == "broken" and not self._said_broken:
            self._said_broken = True
            logger.error("the engine has died", exc_info=error)

    def _retry_after(self) -> str:
        """Whole seconds in which a place may have come free."""
        return str(min(max(math.ceil(self.metrics.mean_seconds), 1), _LONGEST_RETRY))


async def _abort_when_gone(http_request: HttpRequest | None, abort: Callable[[], None]) -> None:
    """Starlette ends no plain handler whose client has gone, and tells a stream only between two of its chunks."""
    if http_request is None:
        return
    while (await http_request.receive())["type"] != "http.disconnect":
        pass
    abort()
