"""The engine: requests join and leave it at every step, and one forward pass serves them all.

engine = Engine(model, runtime, heads, options)
engine.add(request)
while engine.unfinished:
    for output in engine.step():
        ...
engine.close()
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack

import torch
from transformers import PreTrainedModel

from medusa_apar.drafting.advance import Advance, DraftResult
from medusa_apar.drafting.drafter import Heads, Reads
from medusa_apar.drafting.speculator import Speculator
from medusa_apar.drafting.step_cost import LearnedCost, StepCost
from medusa_apar.events.reporter import Reporters
from medusa_apar.forest.forest import Forest, Segment
from medusa_apar.kv.slot_ledger import SlotLedger
from medusa_apar.models.families import context_length, embedding_rows
from medusa_apar.runtimes.devices import device_of
from medusa_apar.runtimes.measure import keep_learned, known_cost
from medusa_apar.runtimes.runtime import Runtime
from medusa_apar.threads.fork_manager import ForkManager
from medusa_apar.threads.request import Request, Status
from medusa_apar.verify.processor_state import StateWatch
from medusa_apar.verify.sampler import Sampler
from medusa_apar.verify.tail import Tail
from medusa_apar.verify.verify_result import VerifyResult

from . import admission
from .admission import QueueFull
from .commit import commit
from .counting import Counting
from .options import EngineOptions
from .outputs import RequestOutput, keep_scores, next_output
from .plan import Plan
from .scheduler import Scheduler
from .stats import PhaseTimer, Stats


class Engine:
    """Owns the KV pool, the scheduler, and what is learned while answers are written. One Python thread calls it.

    Args:
        runtime: what runs the model's steps, as `pick_runtime` returns it.
        heads: draft heads trained for the model, or None.
        checked: whether the runtime has just been asked if it can run what the model has become.

    Raises ValueError for what cannot be. The model's weights may change while no request is unfinished: they are looked
    at when the first one joins.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        runtime: Runtime,
        heads: Heads | None = None,
        options: EngineOptions | None = None,
        checked: bool = False,
    ) -> None:
        options = EngineOptions() if options is None else options
        self.model, self.runtime, self.heads, self.options = model, runtime, heads, options
        self.device, context = device_of(model), context_length(model)
        self._reads = Reads()
        self.ledger = SlotLedger(runtime.pool(options.pool_slots), options.prefix_cache)
        self.cost: StepCost | LearnedCost | None = options.step_cost
        self._learned: LearnedCost | None = None
        if options.step_cost is None and options.budget is None:
            self.cost = self._learned = LearnedCost(known_cost(model, runtime, heads, options.draft_tree))
        budget = options.forest_budget(self.device.type, self.cost, runtime.facts.max_nodes)
        prefill = options.prefill_rows(self.device.type, self.cost)
        self.scheduler = Scheduler(
            self.ledger, budget, context, max_prefill_rows=prefill, max_requests=options.max_requests, cost=self.cost
        )
        self.speculator = Speculator(options.speculation, budget, self.ledger, tree=options.draft_tree)
        self.fork_manager = ForkManager(context)
        self.reporters = Reporters()
        self.stats = Stats(drafted=self.speculator.drafted, accepted=self.speculator.accepted)
        self._counting = Counting(self.stats, self.ledger, self.scheduler, self.speculator)
        self._requests: dict[str, Request] = {}  # that have not ended
        self._watches: dict[tuple[int, ...], StateWatch] = {}
        self._arrivals = 0
        self._session: ExitStack | None = None  # while requests are unfinished
        self._weights: weakref.ref[object] | None = None  # `Runtime.weights`, which made what the prefix cache holds
        self._checked = checked
        self._stepping, self._to_abort = False, set[Request]()  # what is aborted during a step ends with it
        self._closed = False

    # ---- requests

    def add(self, request: Request) -> None:
        """Queues a request. ValueError, with the numbers, for one that can never fit; QueueFull for one too many."""
        if self._closed:
            raise RuntimeError("the engine is closed.")
        if request.id in self._requests:
            raise ValueError(f"a request named {request.id!r} is unfinished.")
        if request.added or request.status is not Status.WAITING:
            raise ValueError(f"the request {request.id!r} has been added before: make a new one.")
        admission.check_ids(embedding_rows(self.model), request.prompt_ids)
        admission.check_fits(self.model, self.options.pool_slots, [request.prompt_ids], request.options)
        if self._places <= 0:
            raise QueueFull(f"{self.options.max_waiting} requests are waiting already; try again later.")
        request.sampler = self._sampler(request)
        request.guide = request.sampler.guide
        request.arrival, self._arrivals = self._arrivals, self._arrivals + 1
        request.added, request.status = time.perf_counter(), Status.WAITING
        self._requests[request.id] = request
        self.ledger.share(request.tree.trunk, request.options.cache_salt)
        self.scheduler.add(request)
        self.reporters.added(request)
        self.stats.requests += 1

    def abort(self, request_id: str) -> None:
        """Ends a request and gives its slots back; one that has ended or is unknown stays as it is.

        A consumer, a processor or whatever else a step asks may call it too: the request then ends with that step, and
        its output says so.
        """
        request = self._requests.get(request_id)
        if request is None:
            return
        if self._stepping:
            self._to_abort.add(request)
        else:
            self._end(request, Status.ABORTED, "aborted")

    @property
    def unfinished(self) -> int:
        """How many requests have not ended."""
        return len(self._requests)

    @property
    def _places(self) -> float:
        """How many requests could be added now; none or less: the queue is full."""
        most = self.options.max_waiting
        return math.inf if most is None else most + self.scheduler.free_places - self.scheduler.num_waiting

    def snapshot(self) -> Stats:
        """Counts so far, and how the engine stands between two steps; a copy."""
        return self._counting.snapshot(self._places)

    def close(self) -> None:
        """Aborts what is unfinished and gives every slot back, and the memory of all of them, whoever still knows the
        engine. A closed engine takes no further request."""
        was_closed, self._closed = self._closed, True  # first: what fails below leaves nothing that takes requests
        self._stepping = False
        self.ledger.stop_sharing()
        for request_id in list(self._requests):
            self.abort(request_id)
        self._leave()
        self._counting.record_slot_usage()
        if self._learned is not None and not was_closed:
            keep_learned(self.model, self.runtime, self.heads, self.options.draft_tree, self._learned)
        self.ledger.let_go()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- steps

    @torch.no_grad()
    def step(self) -> list[RequestOutput]:
        """plan -> forward -> verify -> commit -> draft, for the requests that run now.

        Returns what it has brought each of them, if anything. What a single request fails by is in its own output.
        ValueError where the model has become one that the runtime cannot run. What else a forward pass raises leaves
        the engine broken: it can only be closed.
        """
        if not self._begin():
            return []
        phase = PhaseTimer(self.stats.phase_seconds)
        with phase("plan"):
            plan, segments = self.scheduler.plan(self.speculator.candidates)
            self._counting.record_queue_times(plan)
        with phase("forest"):
            forest = Forest(segments, self.ledger, self.device)
            drafting = self.speculator.begin(plan.load, len(forest.verified))
            verify, argmax, chooser = self.runtime.verify, self.runtime.argmax, self.runtime.chooser
            top = self.runtime.top if self.speculator.watches else None
            tail = Tail(forest, verify, argmax, chooser, drafting, self.speculator.max_depth, top)
        self.reporters.planned(forest, self.ledger.pool.live)
        with phase("forward"), forest.undone_on_error():
            output = self.runtime.step(forest, self.ledger.pool, self._reads, tail)
        with phase("verify"):
            results = tail.read(output)
        with phase("commit"):
            self._keep_prompts(forest)
            pairs = zip(forest.verified, results, strict=True)
            advances = [advance for segment, result in pairs for advance in self._commit(segment, result)]
            for request in plan.requests:
                self._publish(request)
        with phase("draft"):
            self.speculator.recycle(tail.seen)
            self.speculator.draft(advances, output.hidden, self.scheduler.load(), tail.drafting)
        with phase("count"):
            self._counting.record_iteration(plan, forest, phase, advances)
            self._learn_cost(plan, forest, phase)
        self.reporters.stepped(plan.requests, len(forest), self.ledger.pool.live)
        return self._outputs(plan)

    def _begin(self) -> bool:
        """Whether there is anything to run. A step that does not come to its end leaves the engine broken."""
        if self._closed or self._stepping:
            raise RuntimeError(
                "the engine is closed." if self._closed else "the engine has broken in a step: close it."
            )
        if not self._requests:
            return False
        self._enter()
        self._stepping = True
        return True

    def _is_gone(self, request: Request) -> bool:
        """Whether what it has chosen in this step counts no more."""
        return request.error is not None or request in self._to_abort

    def _keep_prompts(self, forest: Forest) -> None:
        """Others that begin like what was fed need not wait for its end."""
        for segment in forest.segments if self.ledger.shares else ():
            if segment.request.status is Status.PREFILLING or len(segment.extend_tokens) > 1:
                self.ledger.keep(segment.thread)

    def _commit(self, segment: Segment, result: VerifyResult | None) -> list[Advance]:
        """The threads that went on: the segment's, then children whose `[Child]` had been drafted."""
        request, thread = segment.request, segment.thread
        if result is None or self._is_gone(request):
            self.ledger.commit(segment.drafted_slots.tolist(), [], [])
            if request.options.score_from is not None and segment.stop == len(thread.tokens) - 1:
                request.done = True
            return []
        try:
            made = commit(segment, result, self.fork_manager, self.ledger)
        except Exception as error:  # a fork policy's
            request.error = error
            return []
        request.status = Status.DECODING
        went_on = [(thread, result, made.gained)] if made.gained else []
        went_on += [(child, first, 1) for child, first in made.begun]
        advances = []
        for member, its, gained in went_on:
            keep_scores(request, member, its, gained)
            advances.append(Advance(request, member, gained, its.row, its.drafted))
        self._counting.record_written_tokens(advances, made.forks)
        if segment.proposal is not None:
            drafted = DraftResult(
                segment.proposal, segment.kept, made.nodes, segment.num_candidates, list(segment.forks)
            )
            self.speculator.learn(drafted, thread)
            self.stats.drafts[len(made.nodes)] += 1
        self.reporters.committed(segment, made.nodes, advances)
        return advances

    def _publish(self, request: Request) -> None:
        """Moves a request's readable text on, and cancels threads that can no longer show."""
        before = len(request.text)
        if request.status is Status.DECODING and not self._is_gone(request):
            try:
                request.publish()
            except Exception as error:  # a stopping criterion's
                request.error = error
            else:
                self.ledger.free_unneeded(*self.fork_manager.trim(request))
        self._counting.record_generated_tokens(request, before)

    def _outputs(self, plan: Plan) -> list[RequestOutput]:
        """What is new of each request; those that are done or have failed leave the engine."""
        self._stepping = False
        outputs, aborted = [], set(self._to_abort)
        for request in self._touched(plan):
            if request.error is not None:
                self._end(request, Status.FAILED, "error")
            elif request in aborted:
                self._end(request, Status.ABORTED, "aborted")
            elif request.done:
                self._end(request, Status.FINISHED, request.finish_reason or "stop")
            if (output := next_output(request)) is not None:
                outputs.append(output)
        return outputs

    def _touched(self, plan: Plan) -> Iterator[Request]:
        """Requests that ran, were aborted or have a consumer that failed, each once; telling of one's end may be what
        makes another's consumer fail."""
        told: set[Request] = set()
        todo = [*plan.requests, *self._to_abort]
        self._to_abort.clear()
        while todo := [*todo, *self.reporters.failed]:
            self.reporters.failed.clear()
            request = todo.pop(0)
            if request not in told:
                told.add(request)
                yield request

    def _end(self, request: Request, status: Status, reason: str) -> None:
        """Takes a request out, whatever it was doing."""
        if request.id not in self._requests:  # the end of another has brought it about
            return
        del self._requests[request.id]
        request.done, request.status, request.finish_reason = True, status, reason
        request.stats.finished = time.perf_counter() - request.added
        self.fork_manager.trim(request)
        self.ledger.free_unneeded(*request.tree.threads)
        self.ledger.leave(request.tree.trunk)
        self._counting.record_slot_usage()
        self.scheduler.remove(request)
        self.speculator.forget(request.tree.threads)
        self.reporters.ended(request)
        if request.sampler.before:
            request.sampler.watch.users -= 1
            if not request.sampler.watch.users:
                del self._watches[tuple(map(id, request.sampler.before))]
        if not self._requests:
            self._leave()

    def _learn_cost(self, plan: Plan, forest: Forest, phase: PhaseTimer) -> None:
        if self._learned is None:
            return
        if not plan.prefill_rows:
            # A GPU is waited for while results are read.
            waited = phase.seconds["verify"] if self.device.type == "cuda" else 0.0
            self._learned.observe(len(forest), phase.seconds["forward"] + waited)
        if self.speculator.last_draft is not None:
            self._learned.observe_draft(*self.speculator.last_draft)

    # ---- what it is made of

    def _enter(self) -> None:
        if self._session is not None:
            return
        with ExitStack() as session:
            session.enter_context(self.runtime.session(self._checked))
            if self.heads is not None:
                # Looked up once, as it asks every weight that was copied whether it has changed.
                self.speculator.drafter = self.runtime.drafter(self.heads)
                guessed = self.options.speculation is not None
                self._reads = Reads.of(self.heads, self.speculator.drafter if guessed else None)
            if self.options.prefix_cache:
                weights = self.runtime.weights()
                if self._weights is None or self._weights() is not weights:
                    self.ledger.reset_prefix_cache()  # other weights would make other keys and values
                    self._weights = weakref.ref(weights)
            self._session, self._checked = session.pop_all(), False

    def _leave(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None
        self.stats.final_slots = self.ledger.pool.live

    def _sampler(self, request: Request) -> Sampler:
        """Requests that share logits processors share what watches them for state."""
        sampler = Sampler(request.options, request.row.index)
        if sampler.before:
            watch = self._watches.setdefault(tuple(map(id, sampler.before)), sampler.watch)
            watch.users += 1
            watch.shared |= watch.users > 1
            sampler.watch = watch
        return sampler
