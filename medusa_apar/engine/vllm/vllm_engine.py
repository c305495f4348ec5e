"""`VllmEngine`: admission by answers, and one task for each."""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import replace
from functools import partial

from medusa_apar.engine.admission import QueueFull
from medusa_apar.engine.inbox import Inbox
from medusa_apar.engine.outputs import RequestOutput, next_output
from medusa_apar.engine.stats import Stats
from medusa_apar.events.reporter import Reporters
from medusa_apar.threads.fork_manager import ForkManager
from medusa_apar.threads.fork_policy import NoForks
from medusa_apar.threads.request import Request, Status

from . import compat
from .answer import Answer, Dialect, Shared
from .lead import Lead
from .options import VllmOptions
from .part import part_of
from .sampling import VllmSampling, sampling_of


class VllmEngine:
    """An `AsyncEngine` over anything that has vLLM's `generate()`. All of it belongs to one event loop.

    Args:
        client: vLLM's, an `EngineClient`.
        context_length: most tokens of a path, vLLM's `max_model_len`.
        counts: what the client counts, where it was made to tell.
        owned: whether closing this engine shuts the client down.
        dialect: how the client is spoken to.
    """

    def __init__(
        self,
        client: compat.Client,
        context_length: int,
        options: VllmOptions | None = None,
        counts: compat.Counts | None = None,
        owned: bool = True,
        dialect: Dialect = compat,
    ) -> None:
        self.options = VllmOptions() if options is None else options
        self._client, self._counts, self._owned = client, counts or compat.Counts(), owned
        self._shared = Shared(
            client=client,
            dialect=dialect,
            manager=ForkManager(context_length),
            lead=Lead(self.options.free_rows),
            reporters=Reporters(),
            context_length=context_length,
            told=self._tell,
            slots=lambda: round(sum(self._counts.live.values())),
        )
        self._unfinished: dict[str, _Place] = {}
        self._waiting: list[tuple[int, int, _Place]] = []  # a heap
        self._running: dict[Request, Answer] = {}
        self._ranks = [0] * self.options.data_parallel_size  # answers of each
        self._arrivals = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = self._closed = False
        self._broken: BaseException | None = None

    # ---- requests

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        place = self._add(request)
        try:
            output = RequestOutput(request.id)
            while True:
                yield output
                if output.finish_reason is not None:
                    return
                output = await place.inbox.take()
        finally:
            place.stop()

    def abort(self, request: Request) -> None:
        place = self._unfinished.get(request.id)
        if place is not None and place.request is request:
            place.stop()

    def _add(self, request: Request) -> _Place:
        """ValueError, NotImplementedError: can never be. QueueFull: not now. RuntimeError: never again."""
        if self._broken is not None or self._client.errored:
            self._break(self._broken)
            raise self._gone() from self._broken
        if self._draining or self._closed:
            raise RuntimeError("the engine takes no requests: it is closing.")
        if request.id in self._unfinished:
            raise ValueError(f"a request named {request.id!r} is unfinished.")
        if request.added or request.status is not Status.WAITING:
            raise ValueError(f"the request {request.id!r} has been added before: make a new one.")
        length, most = len(request.prompt_ids), self._shared.context_length
        if length >= most:
            raise ValueError(f"The prompt has {length} tokens, but vLLM's max_model_len is {most}.")
        if request.options.score_from is not None and request.options.score_from >= length:
            raise ValueError(f"score_from={request.options.score_from} leaves no token of the text to score.")
        sampling = sampling_of(request.options, self.options.speculates)
        room = max(most - length, 1)
        self._shared.dialect.check(self._client, part_of(request, request.tree.trunk, sampling, room, frozenset()))
        if self._places <= 0:
            raise QueueFull(f"{self.options.max_waiting} requests are waiting already; try again later.")
        if sampling.counts_written:
            _unfork(request)
        request.arrival, self._arrivals = self._arrivals, self._arrivals + 1
        request.added = time.perf_counter()
        place = _Place(request, sampling)
        self._unfinished[request.id] = place
        self._idle.clear()
        heapq.heappush(self._waiting, (request.options.priority, request.arrival, place))
        self._shared.reporters.added(request)
        place.task = asyncio.get_running_loop().create_task(self._answer(place))
        place.task.add_done_callback(partial(self._end, place))  # one that is cancelled at once never begins
        self._admit()
        return place

    @property
    def _places(self) -> float:
        """How many answers could be added now."""
        options = self.options
        if options.max_waiting is None or options.max_requests is None:
            return math.inf
        return options.max_waiting + options.max_requests - len(self._unfinished)

    def _admit(self) -> None:
        """Answers whose turn it is may begin."""
        most = math.inf if self.options.max_requests is None else self.options.max_requests
        while self._waiting and len(self._running) < most:
            *_, place = heapq.heappop(self._waiting)
            if place.request.id in self._unfinished and not place.turn.done():
                place.rank = min(range(len(self._ranks)), key=self._ranks.__getitem__)
                self._ranks[place.rank] += 1
                pinned = len(self._ranks) > 1
                self._running[place.request] = Answer(place.request, place.sampling, self._shared, place.rank, pinned)
                place.turn.set_result(None)

    async def _answer(self, place: _Place) -> None:
        """Waits in the queue, and runs to its end."""
        await place.turn
        request = place.request
        request.stats.queued = time.perf_counter() - request.added
        await self._running[request].run()

    def _end(self, place: _Place, task: asyncio.Task[None]) -> None:
        """Whatever happens here, somebody waits for the last output, and others for the place."""
        if self._running.pop(place.request, None) is not None:
            self._ranks[place.rank] -= 1
        del self._unfinished[place.request.id]
        place.turn.cancel()
        try:
            self._tell_end(place, task)
        except Exception as error:
            place.inbox.put(error)
        finally:
            self._waiting = [entry for entry in self._waiting if entry[2] is not place]
            heapq.heapify(self._waiting)
            self._admit()
            for answer in self._running.values():
                answer.review()
            if not self._unfinished:
                self._idle.set()

    def _tell_end(self, place: _Place, task: asyncio.Task[None]) -> None:
        request, error = place.request, None if task.cancelled() else task.exception()
        status, reason = Status.FINISHED, request.finish_reason or "stop"
        if task.cancelled():
            status, reason = Status.ABORTED, "aborted"
        elif error is not None:
            status, reason = Status.FAILED, "error"
        request.done, request.status, request.finish_reason = True, status, reason
        request.stats.finished = time.perf_counter() - request.added
        if isinstance(error, Exception):
            request.error = request.error or error
        self._shared.manager.trim(request)
        self._shared.lead.learn(request)
        self._shared.reporters.ended(request)
        if error is not None and (self._shared.dialect.is_dead(error) or self._client.errored):
            self._break(error)
        if self._broken is not None and status is Status.FAILED:
            place.inbox.put(self._gone())
        elif self._closed and status is Status.ABORTED:
            place.inbox.put(RuntimeError("the engine was closed."))
        elif (output := next_output(request)) is not None:
            place.inbox.put(output)

    def _tell(self, request: Request, output: RequestOutput) -> None:
        if request.stats.first_token is None and output.token_ids:
            request.stats.first_token = time.perf_counter() - request.added
        self._unfinished[request.id].inbox.put(output)

    def _break(self, error: BaseException | None) -> None:
        self._broken = self._broken or error or RuntimeError("vLLM has ended")

    def _gone(self) -> RuntimeError:
        return RuntimeError(f"the engine has broken: {self._broken or 'vLLM has ended'}")

    # ---- all of it

    async def drain(self, timeout: float | None = None) -> bool:
        self._draining = True
        done = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            done = False
        await self.close()
        return done

    async def close(self) -> None:
        """Shuts vLLM down too, where it is this engine's own."""
        was_closed, self._closed = self._closed, True
        places = list(self._unfinished.values())
        for place in places:
            place.stop()
        if places:
            await asyncio.wait([place.task for place in places])
        if self._owned and not was_closed:
            await asyncio.to_thread(compat.shut_down, self._client)

    @property
    def healthy(self) -> bool:
        return self._broken is None and not self._draining and not self._closed and not self._client.errored

    def stats(self) -> Stats:
        """What vLLM does not tell stays 0. A prompt counts once, though every thread's request has its whole path."""
        counts, shared, live = self._counts, self._shared, self._shared.slots()
        return Stats(
            steps=counts.steps,
            generated_tokens=shared.generated_tokens,
            written_tokens=shared.written_tokens,
            forward_tokens=counts.forward_tokens,
            forks=shared.forks,
            requests=self._arrivals,
            preemptions=counts.preemptions,
            thread_preemptions=shared.thread_preemptions,
            peak_threads=shared.peak_threads,
            peak_slots=counts.peak_live,
            live_slots=live,
            free_slots=max(counts.kv_tokens - live, 0),
            prefix_cache_queries=counts.prefix_queries,
            prefix_cache_hits=counts.prefix_hits,
            drafted=Counter({counts.draft_method: counts.draft_tokens} if counts.draft_tokens else {}),
            accepted=Counter({counts.draft_method: sum(counts.accepted)} if counts.accepted else {}),
            drafts=_by_accepted(counts),
            running=len(self._running),
            waiting=len(self._unfinished) - len(self._running),
            places=self._places,
            threads=sum(len(request.live) for request in self._running),
            unread_tokens=sum(request.stats.written_tokens - len(request.text) for request in self._running),
        )


class _Place:
    """A request between `generate` and its last output."""

    def __init__(self, request: Request, sampling: VllmSampling) -> None:
        self.request, self.sampling, self.inbox = request, sampling, Inbox()
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.rank = 0
        self.task: asyncio.Task[None]
        self._stopped = False

    def stop(self) -> None:
        """Cancels the task, once: a second time would break off its tidying up."""
        if not self._stopped:
            self._stopped = True
            self.task.cancel()


def _unfork(request: Request) -> None:
    """Has an answer keep to one thread: a child's request of vLLM would not know what was written before it."""
    rule = request.options.rule
    rule = None if rule is None else replace(rule, fork=False)
    request.options = replace(request.options, policy=NoForks(), rule=rule, fork_if=None)


def _by_accepted(counts: compat.Counts) -> Counter[int]:
    """`Stats.drafts`, from how often each position was right."""
    at_least = [counts.drafts, *counts.accepted, 0]
    by = {number: at_least[number] - at_least[number + 1] for number in range(len(at_least) - 1)}
    return Counter({number: times for number, times in by.items() if times})
