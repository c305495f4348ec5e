"""One prompt and everything generated for it: its options, its paragraph tree, and the finished part of its text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from .fork_policy import ForkIf, NoForks
from .fork_rule import ForkRule
from .paragraph_tree import ParagraphTree, ReadingCursor, Thread, thread_key


class Status(Enum):
    """Where a request is between `add` and its end."""

    WAITING = "waiting"  # in the queue, without slots
    PREFILLING = "prefilling"  # its prompt is being fed
    DECODING = "decoding"
    PREEMPTED = "preempted"  # back in the queue: its slots were needed by an older request
    FINISHED = "finished"
    ABORTED = "aborted"
    FAILED = "failed"  # by `Request.error`

    @property
    def ended(self) -> bool:
        return self in (Status.FINISHED, Status.ABORTED, Status.FAILED)


@dataclass(frozen=True, slots=True, eq=False)
class RequestOptions:
    """How one request is answered. No other request's options change its text.

    Args:
        max_new_tokens: most visible tokens of the answer.
        eos_ids: tokens that end a thread.
        ignore_eos: end tokens are tokens like others on a path without `[Child]`, so that the answer ends by its limit.
            A `[Child]`'s thread ends by them all the same: they lead back to its parent, and nothing behind it could be
            read if it went on.
        stop_ids: tokens that end the answer where they would be read, in whichever thread; the text ends before them.
            An end token among them does so on a path without `[Child]`, whatever `ignore_eos` says.
        stop: asked with the request after every token of its reading order; True ends the request.
        policy: where threads fork.
        rule: the fork rule, None where the model has no control tokens.
        fork_if: asked wherever the model would choose `[Fork]`; where it says no, that token is banned.
        max_threads: most of the request's threads that run in one step; the others wait. None: no limit.
        seed: of the sampling noise, 64 bits; None decodes greedily.
        processors: transformers' logits processors, asked as transformers asks them.
        typical: (epsilon, delta) of Medusa's lossy acceptance, None for exact acceptance.
        scores, logits: whether `Request.scores` and `Request.logits` are kept.
        logprobs: how many of the likeliest tokens are kept beside each token's own log-probability, be it written or
            scored; None keeps nothing.
        priority: of two waiting requests the one with the lower number goes first, then the one that came first.
        events: whether the engine's outputs carry the request's events.
        watcher: a `medusa_apar.events.reporter.Reporter` that is told of them in another way, or None.
        speculation: whether anything is guessed ahead for it, where its engine guesses at all.
        score_from: with a number nothing is generated: the prompt's tokens from this index on are scored
            (`Request.text_scores`). At least 1.
        cache_salt: requests find in an engine's prefix cache what others of the same salt have left there.
    """

    max_new_tokens: int = 256
    eos_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    stop_ids: frozenset[int] = frozenset()
    stop: Callable[[Request], bool] | None = None
    policy: NoForks = field(default_factory=NoForks)
    rule: ForkRule | None = None
    fork_if: ForkIf | None = None
    max_threads: int | None = None
    seed: int | None = None
    processors: Sequence[Callable] = ()
    typical: Any = None
    scores: bool = False
    logits: bool = False
    logprobs: int | None = None
    priority: int = 0
    events: bool = False
    watcher: Any = None
    speculation: bool = True
    score_from: int | None = None
    cache_salt: str = ""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "max_threads", "score_from"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, must be 1 or more.")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs is {self.logprobs}, must be 0 or more.")
        if self.events and self.watcher is not None:
            raise ValueError("a request's events go to its outputs or to a watcher, not to both.")
        if self.fork_if is not None and self.typical is not None and self.seed is not None:
            raise NotImplementedError(
                "fork_if is asked token by token, and typical acceptance judges whole paths at once."
            )

    @property
    def max_depth(self) -> int:
        """Depth at which threads do not fork, as far as it bounds what a path can hold."""
        return 0 if self.rule is None else self.rule.max_depth


@dataclass(frozen=True, slots=True)
class Row:
    """What transformers' processors and criteria are shown of a batch: the row's number, the batch's size, and the row
    as the caller passed it, padding included."""

    index: int
    batch_size: int
    ids: list[int]


@dataclass(slots=True)
class RequestStats:
    """Counts of one request; times in seconds since it was added."""

    steps: int = 0  # in which one of its threads ran
    preemptions: int = 0  # times that all of its slots were taken back
    written_tokens: int = 0  # that its threads chose, control and end tokens included
    cached_tokens: int = 0  # of its prompt, that came from the prefix cache
    queued: float | None = None  # when its first step began
    first_token: float | None = None
    finished: float | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities at one token, of the model's own distribution before any processor.

    top: (token id, log-probability) of the likeliest, as many as were asked for.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class TextScores:
    """What plain decoding says of a given text, token by token; shorter than the text where the context ends.

    told: of the model's own distribution, control tokens included, where the options ask for it."""

    logprobs: list[float] = field(default_factory=list)
    chosen: list[bool] = field(default_factory=list)  # whether greedy decoding chooses the token; empty when sampling
    told: list[TokenLogprobs] = field(default_factory=list)


class Request:
    """Args:
    id: names the request in its engine, its events and its outputs.
    prompt_ids: token ids without padding, at least one.
    key: 64 bits that seed its noise beside the options' seed; by default made of the prompt.
    row: its place in a batch of transformers; None for a request that stands alone.
    """

    def __init__(
        self,
        id: str,
        prompt_ids: list[int],
        options: RequestOptions,
        key: int | None = None,
        row: Row | None = None,
    ):
        if not prompt_ids:
            raise ValueError("The prompt is empty: a request needs at least one token.")
        self.id, self.prompt_ids, self.options = id, prompt_ids, options
        self.row = Row(0, 1, prompt_ids) if row is None else row
        rule = options.rule
        control = (None, None) if rule is None else (rule.fork_id, rule.child_id)
        self.tree = ParagraphTree(prompt_ids, thread_key(prompt_ids) if key is None else key, options.eos_ids, *control)
        self.max_new_tokens = options.max_new_tokens  # which rescoring may raise
        self.text: list[tuple[Thread, int]] = []  # finished reading order: (thread, index into its tokens)
        self.text_ids: list[int] = []
        self.done = False
        self.finish_reason: str | None = None  # "stop" | "length" | "aborted" | "error"
        self.error: Exception | None = None
        # Per thread and own token, float32 [vocab], where the options ask for them.
        self.scores: dict[Thread, list[Any]] = {}
        self.logits: dict[Thread, list[Any]] = {}
        self.logprobs: dict[Thread, list[TokenLogprobs]] = {}
        self.text_scores = TextScores()
        # Live threads as they are read, each with how many visible tokens stand before its end; kept by `publish`.
        self.live: list[tuple[Thread, int]] = self.tree.live_in_reading_order()
        self.stats = RequestStats()
        # Set by the engine that the request was added to:
        self.status = Status.WAITING
        self.arrival = 0  # number among the engine's requests
        self.added = 0.0  # time.perf_counter(); 0 before
        self.sampler: Any = None  # verify.sampler.Sampler
        self.guide: Any = None  # verify.guides.GuideLogitsProcessor, None without one
        self.watcher: Any = options.watcher  # events.reporter.Reporter, None where nobody watches
        self.ngrams: Any = None  # drafting.ngram_index.NgramIndex, None where none is kept
        self.recycled: Any = None  # drafting.recycling.RecyclingTable, likewise
        self.sent = 0  # tokens of the text that were handed out
        self._cursor = ReadingCursor(self.tree)

    def __repr__(self) -> str:
        return f"Request({self.id!r}, {self.status.value}, prompt={len(self.prompt_ids)}, text={len(self.text)})"

    def path(self, thread: Thread) -> list[int]:
        """The row a logits processor sees at the thread's root: padding, prompt, path, the thread's tokens."""
        ancestors = thread.ancestor_ids() + thread.tokens
        return self.row.ids + ancestors[len(self.prompt_ids) :]

    def end_ids(self, thread: Thread) -> frozenset[int]:
        """Tokens that end this thread."""
        if self.options.ignore_eos and (thread.parent is None or thread.tokens[0] != self.tree.child_id):
            return frozenset()
        return self.tree.eos_ids

    def publish(self) -> None:
        """Moves the finished part of the reading order on; sets `done` at the limit, where `stop` says so, before a
        stop token, or at the end."""
        for thread, index in self._cursor.advance():
            if thread.tokens[index] in self.options.stop_ids:
                self.done, self.finish_reason = True, "stop"
                break
            self.text.append((thread, index))
            self.text_ids.append(thread.tokens[index])
            stopped = self.options.stop is not None and self.options.stop(self)
            if stopped or len(self.text) >= self.max_new_tokens:
                # A visible token that ends its thread ends the text, be it the last that the limit lets through.
                ended = thread.finish_reason == "stop" and index == len(thread.tokens) - 1
                self.done, self.finish_reason = True, "stop" if stopped else self._end() if ended else "length"
                break
        else:
            if self._cursor.done:
                self.done, self.finish_reason = True, self._end()
        self.live = [] if self.done else self.tree.live_in_reading_order()

    def _end(self) -> str:
        """Why a text ends that is read to its end."""
        return "length" if any(thread.finish_reason == "length" for thread in self.tree.threads) else "stop"

    def reopen(self, max_new_tokens: int) -> None:
        """Goes on with a text that its limit had ended, as if this had been the limit all along."""
        self.max_new_tokens, self.done, self.finish_reason = max_new_tokens, False, None
        self.status, self.added = Status.WAITING, 0.0
        self.publish()
