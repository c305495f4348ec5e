"""One answer: a task for each of its threads, and what their tokens do to its paragraph tree.

Each task asks vLLM for its thread's next part, and hands tokens to the fork manager one by one, as they come. No thread
waits for another, but for those that `Lead` holds back.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from medusa_apar.engine.outputs import RequestOutput, next_output
from medusa_apar.events.reporter import Reporters
from medusa_apar.threads.fork_manager import ForkManager
from medusa_apar.threads.paragraph_tree import Thread
from medusa_apar.threads.request import Request, Status, TokenLogprobs

from .lead import Lead
from .part import Part, forbids, part_of
from .reading_order import priority
from .sampling import VllmSampling

_FIRST_WAIT, _LONGEST_WAIT = 0.02, 1.0  # seconds before vLLM is asked again where its queue was full
_NOTHING = frozenset[int]()


class Dialect(Protocol):
    """How a client is spoken to; `compat` is vLLM's."""

    def prompt_of(self, part: Part) -> Any: ...

    def params_of(self, part: Part) -> Any: ...

    def check(self, client: Any, part: Part) -> None: ...

    def is_full(self, error: BaseException) -> bool: ...

    def is_dead(self, error: BaseException) -> bool: ...


@dataclass(slots=True)
class Shared:
    """What all answers of an engine have in common.

    context_length: of a path. told: called with what is new of a request. slots: live tokens of vLLM's KV cache, as far
    as it tells. rows: requests of vLLM that run, by rank.
    """

    client: Any
    dialect: Dialect
    manager: ForkManager
    lead: Lead
    reporters: Reporters
    context_length: int
    told: Callable[[Request, RequestOutput], None]
    slots: Callable[[], int]
    rows: Counter[int] = field(default_factory=Counter)
    forks: int = 0
    written_tokens: int = 0
    generated_tokens: int = 0
    peak_threads: int = 0
    thread_preemptions: int = 0


class Answer:
    """Args:
    rank: of vLLM's data parallelism, 0 without. pinned: whether vLLM has to be told.
    """

    def __init__(self, request: Request, sampling: VllmSampling, shared: Shared, rank: int, pinned: bool) -> None:
        self.request, self.rank, self._pinned = request, rank, pinned
        self._sampling, self._shared = sampling, shared
        self._tasks: dict[Thread, asyncio.Task[None]] = {}  # of threads that were not stopped
        self._stopped: list[asyncio.Task[None]] = []
        self._to_wait = set[Thread]()  # as of the last review
        self._held: dict[Thread, asyncio.Future[None]] = {}  # those that do
        self._running: set[Thread] = set()  # those that vLLM writes
        self._num_requests = 0
        self._done = asyncio.Event()
        self._error: BaseException | None = None
        self._grown: set[Thread] = set()  # since the last look
        self._looks = False  # whether one is coming

    async def run(self) -> None:
        """Returns once nothing more of the answer is wanted. Raises what a thread of it has failed by."""
        request = self.request
        request.status = Status.DECODING
        if request.options.score_from is None:
            self._start(request.tree.trunk)
        else:
            self._tasks[request.tree.trunk] = asyncio.create_task(self._guarded(self._score))
        try:
            await self._done.wait()
        finally:
            self._stop(list(self._tasks))
            if self._stopped:
                await asyncio.wait(self._stopped)  # which cancels none of them where it is cancelled itself
            self._report()
        if self._error is not None:
            raise self._error

    def review(self) -> None:
        """Lets threads go on that waited, and has others wait, as things stand now."""
        self._to_wait = self._shared.lead.waiting(self.request, self._running, self._shared.rows[self.rank])
        for thread, future in self._held.items():
            if thread not in self._to_wait and not future.done():
                future.set_result(None)

    # ---- threads

    def _start(self, thread: Thread) -> None:
        self._tasks[thread] = asyncio.create_task(self._guarded(self._write, thread))

    def _stop(self, threads: Iterable[Thread]) -> None:
        """Cancels tasks, each once: a second time would break off what the first has vLLM do."""
        for thread in threads:
            if (task := self._tasks.pop(thread, None)) is not None:
                task.cancel()
                self._stopped.append(task)

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._done.set()

    async def _guarded(self, work: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        try:
            await work(*args)
        except asyncio.CancelledError:
            if asyncio.current_task() in self._tasks.values():  # nobody here has stopped it
                self._fail(RuntimeError("vLLM broke off a thread."))
            raise
        except Exception as error:
            self._fail(error)

    async def _write(self, thread: Thread) -> None:
        """A thread from its first token to its end."""
        banned = _NOTHING
        while thread.live:
            if not banned:
                await self._turn(thread)
            banned = await self._part(thread, banned)

    async def _turn(self, thread: Thread) -> None:
        """Waits while the thread is held back."""
        self.review()
        if thread in self._to_wait:
            self._held[thread] = asyncio.get_running_loop().create_future()
            try:
                await self._held[thread]
            finally:
                del self._held[thread]

    async def _part(self, thread: Thread, banned: frozenset[int]) -> frozenset[int]:
        """One request of vLLM for a thread; what may not come next, where it has written that."""
        request, shared = self.request, self._shared
        part = part_of(request, thread, self._sampling, self._room(thread), banned)
        before, sampled = len(thread.tokens), request.options.seed is not None
        async with aclosing(self._outputs(part, thread)) as outputs:
            async for output in outputs:
                its = output.outputs[0]
                if thread.parent is None and request.stats.steps == 0:
                    request.stats.cached_tokens = output.num_cached_tokens or 0
                request.stats.steps += 1
                told = its.logprobs or ()
                for place, token in enumerate(its.token_ids):
                    if thread.ended:
                        break
                    if forbidden := forbids(request, thread, token):
                        if forbidden <= banned:
                            raise RuntimeError(f"vLLM wrote the token {token}, which it was told not to.")
                        self._after(thread)
                        return banned | forbidden
                    shared.written_tokens += 1
                    request.stats.written_tokens += 1
                    self._append(thread, token, told[place] if told else None)
                    if self._is_cut(thread):
                        break
                self._after(thread)
                if thread.ended or self._is_cut(thread):
                    return _NOTHING
                if its.finish_reason in ("abort", "error") and not self._sampling.goes_on:
                    raise RuntimeError("vLLM broke off an answer that cannot be taken up again.")
                if not banned and not sampled and thread in self._to_wait:
                    shared.thread_preemptions += 1
                    return _NOTHING
        if len(thread.tokens) == before:
            raise RuntimeError("vLLM ended a request without a token.")
        return _NOTHING

    def _is_cut(self, thread: Thread) -> bool:
        """Whether vLLM has to be asked anew: behind what a rule has inserted, and behind a fork where not all threads
        may run. A sampled thread stops at all of its forks then, and nowhere else: its noise depends on no other."""
        if thread.ends_with_forced:
            return True
        most, children = self.request.options.max_threads, thread.children
        if most is None or not children or children[-1].fork_index != len(thread.tokens) - 1:
            return False
        return self.request.options.seed is not None or sum(each.live for each in self.request.tree.threads) > most

    async def _outputs(self, part: Part, thread: Thread) -> AsyncGenerator[Any, None]:
        """What vLLM brings for a part. Where its queue is full it is asked again: a fork is never lost."""
        shared, request, wait = self._shared, self.request, _FIRST_WAIT
        prompt, params = shared.dialect.prompt_of(part), shared.dialect.params_of(part)
        how: dict[str, Any] = {"priority": priority(request, thread)}
        if self._pinned:
            how["data_parallel_rank"] = self.rank
        self._running.add(thread)  # while it waits for a place, too, which is its own
        try:
            while True:
                self._num_requests += 1
                name = f"{request.id}.{thread.index}.{self._num_requests}"
                shared.rows[self.rank] += 1
                shared.peak_threads = max(shared.peak_threads, shared.rows.total())
                try:
                    async with aclosing(shared.client.generate(prompt, params, name, **how)) as outputs:
                        async for output in outputs:
                            yield output
                    return
                except Exception as error:
                    if not shared.dialect.is_full(error):
                        raise
                finally:
                    shared.rows[self.rank] -= 1
                await asyncio.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT)
        finally:
            self._running.discard(thread)

    def _room(self, thread: Thread) -> int:
        """Tokens that a thread may still write: as many as the context and an answer within its limit have room for."""
        request, options = self.request, self.request.options
        limit = request.max_new_tokens
        longest = len(request.prompt_ids) + limit + options.policy.max_invisible_tokens(limit, options.max_depth)
        return max(min(longest, self._shared.context_length) - thread.end, 1)

    def _append(self, thread: Thread, token: int, logprobs: Mapping[int, Any] | None) -> None:
        request, shared = self.request, self._shared
        if not self._grown:
            shared.reporters.began(request, shared.slots())
        self._grown.add(thread)
        outcome = shared.manager.advance(request, thread, [token])
        if request.options.logprobs is not None:
            kept = request.logprobs.setdefault(thread, [])
            kept.append(_told(token, logprobs or {}, request.options.logprobs))
            kept += [TokenLogprobs(0.0)] * (len(thread.token_ids) - len(kept))
        shared.reporters.wrote(request, thread)
        self._stop(ended for ended in outcome.ended if ended is not thread)
        shared.forks += len(outcome.children)
        for _, child in outcome.children:
            if child.live:
                self._start(child)

    def _after(self, thread: Thread) -> None:
        """Moves the readable text on, and cancels threads that can no longer show."""
        request, before = self.request, len(self.request.text)
        request.publish()
        self._stop(gone for gone in self._shared.manager.trim(request) if gone is not thread)
        self._shared.generated_tokens += len(request.text) - before
        if request.done:
            self._done.set()
        elif not self._looks:  # all that comes with the same step of vLLM is told as one
            self._looks = True
            asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        self._looks = False
        if self._done.is_set():
            return
        self.review()
        self._report()
        if not self._done.is_set() and (output := next_output(self.request)) is not None:
            self._shared.told(self.request, output)

    def _report(self) -> None:
        """Tells whoever watches of the step whose tokens have come."""
        rows, shared = len(self._grown), self._shared
        self._grown.clear()
        if rows:
            shared.reporters.stepped([self.request], rows, shared.slots())
        shared.reporters.failed.clear()
        if self.request.error is not None:  # a consumer's
            self._fail(self.request.error)

    # ---- prompts that are scored

    async def _score(self) -> None:
        """Log-probabilities of a prompt's tokens; vLLM writes one behind it, which nobody reads."""
        request, options = self.request, self.request.options
        count, start = options.logprobs or 0, options.score_from or 1
        part = Part(request.prompt_ids, VllmSampling(), 1, cache_salt=options.cache_salt, prompt_logprobs=count)
        async with aclosing(self._outputs(part, request.tree.trunk)) as outputs:
            async for output in outputs:
                if output.prompt_logprobs and not request.text_scores.told:
                    pairs = zip(request.prompt_ids[start:], output.prompt_logprobs[start:], strict=True)
                    request.text_scores.told = [_told(token, its, count) for token, its in pairs]
        request.done = True
        self._done.set()


def _told(token: int, logprobs: Mapping[int, Any], count: int) -> TokenLogprobs:
    """vLLM's log-probabilities at one token, which are by token id, the chosen one among them."""
    likeliest: Sequence[tuple[int, Any]] = sorted(logprobs.items(), key=lambda entry: entry[1].rank)[:count]
    return TokenLogprobs(logprobs[token].logprob, tuple((id, its.logprob) for id, its in likeliest))
