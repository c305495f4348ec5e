"""Answers in flight over one or more simulated engines: what their threads ask for, step by step.

An answer is the engines' own `Request`, and its threads do what `medusa_apar.engine.vllm` does with them: a `[Fork]`
becomes a further sequence, what can no longer be read is cancelled, and what is hardly going to be read waits. All of
it reaches an engine only after `Setting.lag` steps, since the next one runs while the last one's tokens are looked at.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from medusa_apar.engine.vllm.lead import Lead
from medusa_apar.engine.vllm.reading_order import priority
from medusa_apar.threads.control_tokens import DEFAULT_MAX_DEPTH
from medusa_apar.threads.fork_manager import ForkManager
from medusa_apar.threads.fork_policy import ControlTokenForks, NoForks
from medusa_apar.threads.fork_rule import ForkRule
from medusa_apar.threads.paragraph_tree import Thread, thread_key
from medusa_apar.threads.request import Request, RequestOptions

from . import cluster_engine
from .cluster_engine import EngineLimits, SimulatedEngine
from .cluster_trees import CHILD, EOS, FORK, TEXT, RecordedAnswer, Script

AFFINITIES = ("rank", "id", "none")
_BLOCKS = 1 << 20  # of a thread, that have names of their own
_THREADS = 1 << 16  # of an answer


@dataclass(frozen=True, slots=True)
class Setting:
    """A cluster and what is asked of it.

    threads: whether answers fork. in_flight: answers that run at once, over all replicas; one that has ended makes
        place for the next. answers: in all, the recorded ones in turns.
    max_new_tokens: of each answer. replicas: engines, each with a cache of its own.
    affinity: "rank" has all of an answer at the engine that has fewest answers, as an orchestrator picks a
        data-parallel rank; "id" at the one that its number says, as a router's hash; "none" has every sequence go to
        the next engine.
    lag: steps that pass between one whose tokens make a difference and the first that knows it: 1, two where vLLM
        schedules asynchronously, and as many more as the way to the engine and back takes.
    transfer: steps that KV travels from an engine that does all prefill; None where each does its own.
    free_rows: as of `VllmOptions`; None has no thread wait.
    spread: steps over which the first answers come, evenly.
    """

    threads: bool
    in_flight: int = 1
    answers: int = 16
    max_new_tokens: int = 256
    replicas: int = 1
    affinity: str = "rank"
    lag: int = 1
    transfer: int | None = None
    free_rows: float | None = None
    spread: int = 0
    limits: EngineLimits = EngineLimits()

    def __post_init__(self) -> None:
        for name, least in (("in_flight", 1), ("answers", 1), ("replicas", 1), ("lag", 0), ("spread", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, must be {least} or more.")
        if self.affinity not in AFFINITIES:
            raise ValueError(f"affinity is {self.affinity!r}, must be one of {', '.join(AFFINITIES)}.")


@dataclass(frozen=True, slots=True)
class Figures:
    """What became of a setting. Means of answers, threads and steps; KV in tokens of whole blocks.

    shown, written: tokens of the texts, and those that engines wrote for them.
    steps: until the last answer, in which any engine ran. engine_steps: of all engines.
    latency, slowest: steps from an answer's coming to its end, the mean and what nine in ten stay below.
    rows, most_rows: sequences in an engine's step. kv, most_kv: blocks in use in one engine, by their tokens.
    forwarded: tokens that an engine's step feeds. front: tokens that all engines together write in a step.
    forks: of an answer. path, recomputed: tokens of a fork's path, and those of them that were computed again.
    fork_wait: steps from the one that wrote a `[Fork]` to the one that wrote the child's first token.
    round_trips: sequences of an answer beside its first, each a message to an engine: forks, and those that waited.
    preemptions: in all. unknown: tokens that were simulated behind a recording's end.
    """

    shown: int
    written: int
    steps: int
    engine_steps: int
    latency: float
    slowest: float
    rows: float
    most_rows: int
    kv: float
    most_kv: int
    forwarded: float
    front: float
    forks: float
    path: float
    recomputed: float
    fork_wait: float
    round_trips: float
    preemptions: int
    unknown: int

    @property
    def per_100(self) -> float:
        """Tokens written for 100 shown."""
        return 100 * self.written / self.shown


@dataclass(slots=True, eq=False, kw_only=True)
class _Sequence(cluster_engine.Sequence):
    """What one engine has of a thread.

    path: tokens of its prompt. forks: whether it is the first of a thread that was forked. asked: the step that made it
    wanted; first: the one that wrote its first token.
    """

    answer: _Answer
    thread: Thread
    engine: _Engine
    path: int
    forks: bool
    asked: int
    first: int | None = None


@dataclass(slots=True, eq=False)
class _Answer:
    number: int
    script: Script
    request: Request
    engine: _Engine | None
    came: int
    roles: dict[Thread, int]  # which recorded thread each is
    open: dict[Thread, _Sequence] = field(default_factory=dict)
    names: dict[Thread, list[int]] = field(default_factory=dict)  # of the blocks before a thread's first own one
    begun: set[Thread] = field(default_factory=set)


_Engine = SimulatedEngine[_Sequence]


def simulate(recorded: Sequence[RecordedAnswer], setting: Setting) -> Figures:
    """ValueError where one answer's longest path might not fit into an engine's KV."""
    return _Simulation(recorded, setting).run()


class _Simulation:
    def __init__(self, recorded: Sequence[RecordedAnswer], setting: Setting) -> None:
        self._recorded, self._setting = recorded, setting
        self._scripts = [Script(its.forked if setting.threads else its.plain) for its in recorded]
        self._options = options_of(setting)
        self._check()
        self._manager = ForkManager(None)
        self._engines: list[_Engine] = [SimulatedEngine(setting.limits) for _ in range(setting.replicas)]
        self._lead = None if setting.free_rows is None else Lead(setting.free_rows)
        self._prefilled: set[int] = set()  # names of blocks that the engine of prefill has
        self._clock = self._steps = self._unknown = self._started = self._arrivals = 0
        self._due: defaultdict[int, list[Callable[[], None]]] = defaultdict(list)
        self._answers: dict[_Engine, int] = dict.fromkeys(self._engines, 0)  # that each has
        self._rows: dict[_Engine, int] = dict.fromkeys(self._engines, 0)  # sequences that are wanted of each
        self._sequences: list[_Sequence] = []
        self._latencies: list[int] = []
        self._shown = 0

    def _check(self) -> None:
        limits, most = self._setting.limits, self._setting.max_new_tokens
        longest = max(its.prompt for its in self._recorded) + most
        longest += self._options.policy.max_invisible_tokens(most, self._options.max_depth) + 1 + self._setting.lag
        if limits.kv_blocks is not None and limits.kv_blocks * limits.block_size < longest + limits.block_size:
            raise ValueError(
                f"{limits.kv_blocks} blocks of {limits.block_size} tokens are too few: "
                f"a path may have {longest} tokens."
            )

    def run(self) -> Figures:
        setting = self._setting
        at_once = min(setting.in_flight, setting.answers)
        for place in range(at_once):
            self._due[1 + place * setting.spread // at_once].append(self._start)
        while len(self._latencies) < setting.answers:
            self._clock += 1
            for action in self._due.pop(self._clock, ()):
                action()
            busy = [engine for engine in self._engines if engine.busy]
            assert busy or self._due, "answers are unfinished"
            before = sum(engine.steps for engine in busy)
            touched = dict.fromkeys(its for engine in busy for its in map(self._wrote, engine.step()) if its)
            for answer in touched:
                self._settle(answer)
            self._steps += sum(engine.steps for engine in busy) > before
        return self._figures()

    def _start(self) -> None:
        if self._started == self._setting.answers:
            return
        number, self._started = self._started, self._started + 1
        its, script = self._recorded[number % len(self._recorded)], self._scripts[number % len(self._recorded)]
        request = Request(str(number), [TEXT] * its.prompt, self._options, key=number)
        request.arrival = number
        answer = _Answer(number, script, request, self._engine_for(number), self._clock, {request.tree.trunk: 0})
        if answer.engine is not None:
            self._answers[answer.engine] += 1
        answer.names[request.tree.trunk] = []
        self._ask(answer, request.tree.trunk, self._clock)

    def _engine_for(self, number: int) -> _Engine | None:
        if self._setting.affinity == "none":
            return None
        if self._setting.affinity == "id":
            return self._engines[thread_key("answer", number) % len(self._engines)]
        return min(self._engines, key=lambda engine: self._answers[engine])

    def _ask(self, answer: _Answer, thread: Thread, at: int) -> None:
        """Has a thread's sequence come to an engine in time for the step `at`."""
        setting, size = self._setting, self._setting.limits.block_size
        engine = answer.engine or self._engines[self._arrivals % len(self._engines)]
        rank = priority(answer.request, thread) if setting.limits.priority else 0
        own = (answer.number * _THREADS + thread.index) * _BLOCKS
        sequence = _Sequence(
            *((rank, self._arrivals), thread.end, answer.names[thread], own),
            answer=answer,
            thread=thread,
            engine=engine,
            path=thread.end,
            forks=thread.parent is not None and thread not in answer.begun,
            asked=self._clock,
        )
        if setting.transfer is not None:
            names = [sequence.name(block) for block in range(thread.end // size)]
            hits = next((n for n, name in enumerate(names) if name not in self._prefilled), len(names))
            sequence.recomputed = thread.end - min(hits, (thread.end - 1) // size) * size
            sequence.loaded = True
            self._prefilled.update(names)
            at += 1 + setting.transfer
        self._arrivals += 1
        answer.begun.add(thread)
        answer.open[thread] = sequence
        self._rows[engine] += 1
        self._sequences.append(sequence)
        if at == self._clock:
            engine.add(sequence)
        else:
            self._due[at].append(partial(engine.add, sequence))

    def _wrote(self, sequence: _Sequence) -> _Answer | None:
        """Takes over a sequence's next token; the answer, where it is for it."""
        answer, thread = sequence.answer, sequence.thread
        sequence.first = self._clock if sequence.first is None else sequence.first
        if answer.open.get(thread) is not sequence:
            return None  # it is being cancelled
        role = answer.roles[thread]
        place, own = len(thread.tokens) - thread.num_forced, answer.script.tokens[role]
        known = place < len(own)
        self._unknown += not known
        outcome = self._manager.advance(answer.request, thread, (own[place] if known else TEXT,))
        size = self._setting.limits.block_size
        for _, child in outcome.children:
            answer.roles[child] = answer.script.children[role, place]
            whole = child.start // size
            answer.names[child] = [sequence.name(block) for block in range(whole)]
        if thread.ended:
            self._let_go(answer, thread).remove(sequence)
        return answer

    def _let_go(self, answer: _Answer, thread: Thread) -> _Engine:
        engine = answer.open.pop(thread).engine
        self._rows[engine] -= 1
        return engine

    def _settle(self, answer: _Answer) -> None:
        """What an answer's new tokens mean for its threads, once a step has brought them all."""
        request = answer.request
        request.publish()
        self._manager.trim(request)
        held: set[Thread] = set()
        if self._lead is not None and len(request.live) > 1:
            rows = self._rows[answer.engine] if answer.engine else sum(self._rows.values()) // len(self._engines)
            held = self._lead.waiting(request, answer.open, rows)
        for thread in [thread for thread in answer.open if thread.ended or thread in held]:
            self._close(answer, thread)
        if request.done:
            self._finish(answer)
            return
        for thread, _ in request.live:
            if thread not in answer.open and thread not in held:
                self._ask(answer, thread, self._clock + 1 + self._setting.lag)

    def _close(self, answer: _Answer, thread: Thread) -> None:
        sequence = answer.open[thread]
        engine = self._let_go(answer, thread)
        if self._setting.threads:
            self._due[self._clock + 1 + self._setting.lag].append(partial(engine.remove, sequence))
        else:
            engine.remove(sequence)  # which knew itself how long the answer may get

    def _finish(self, answer: _Answer) -> None:
        if self._lead is not None:
            self._lead.learn(answer.request)
        if answer.engine is not None:
            self._answers[answer.engine] -= 1
        self._latencies.append(self._clock - answer.came + 1)
        self._shown += len(answer.request.text)
        self._due[self._clock + 1].append(self._start)

    def _figures(self) -> Figures:
        engines, answers, size = self._engines, self._setting.answers, self._setting.limits.block_size
        forks = [its for its in self._sequences if its.forks and its.recomputed is not None]
        ran = [its.first - its.asked for its in forks if its.first is not None]
        steps, written = sum(its.steps for its in engines), sum(its.written for its in engines)
        return Figures(
            shown=self._shown,
            written=written,
            steps=self._steps,
            engine_steps=steps,
            latency=statistics.fmean(self._latencies),
            slowest=sorted(self._latencies)[int(0.9 * (answers - 1))],
            rows=sum(its.rows for its in engines) / steps,
            most_rows=max(its.most_rows for its in engines),
            kv=size * sum(its.held for its in engines) / steps,
            most_kv=size * max(its.most_held for its in engines),
            forwarded=sum(its.forwarded for its in engines) / steps,
            front=written / self._steps,
            forks=len(forks) / answers,
            path=_mean([its.path for its in forks]),
            recomputed=_mean([its.recomputed or 0 for its in forks]),
            fork_wait=_mean(ran),
            round_trips=(len(self._sequences) - answers) / answers,
            preemptions=sum(its.preemptions for its in engines),
            unknown=self._unknown,
        )


def options_of(setting: Setting) -> RequestOptions:
    eos_ids = frozenset((EOS,))
    if not setting.threads:
        return RequestOptions(setting.max_new_tokens, eos_ids, policy=NoForks())
    rule = ForkRule(FORK, CHILD, DEFAULT_MAX_DEPTH)
    return RequestOptions(setting.max_new_tokens, eos_ids, policy=ControlTokenForks(), rule=rule)


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0
