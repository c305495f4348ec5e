"""What happens in a generate call, as a stream of small typed events: `generate(..., events=consumer)`.

A consumer is called with every event, in this order: for each request `RequestStarted` and its trunk's `ThreadStarted`;
then step by step

    StepStarted       which threads run and what is guessed for them; the forward pass begins when consumers return
    then thread by thread:
    TokensAccepted    what it wrote
    TokensInserted    what a fork rule has it go on with
    TokensRejected    its guesses that were wrong
    ThreadStarted     a child that it forked; what the child wrote in the same step follows as `TokensAccepted`
    then of all threads:
    ThreadContinuedParent    those that write the rest of their parent's text
    ThreadFinished    those that have ended
    StepFinished      what the step cost, and how much of each answer can be read by now

Nothing in them refers to anything that changes, so they can be kept, sent elsewhere (`dataclasses.asdict`) and
replayed: `medusa_apar.events.recording` adds them up to paragraph trees, and feeds them to a `TextStreamer`. Steps
count from 1; what happens before the first has step 0. A thread is named by its request's id and its
index in the paragraph tree; a generate call's requests are named by the numbers of its rows.

With `regenerate_below` they tell of the answer as first written; what is written anew replaces it afterwards, and
threads may be numbered anew then.

An exception in a consumer ends the requests that it watches. The time that consumers take is in no figure.

The events themselves lie here; beside them

    reporter.py   makes them of what the engine's steps do
    recording.py  adds them up to paragraph trees, and feeds them to a `TextStreamer`
    streaming.py  the reading order of a batch as columns, as transformers streams and returns it
    texts.py      the text of an answer as its tokens come, up to its first stop string
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

# Who guessed a token: draft heads, what had been written before, what the model would have said behind the same token
# before, or the `[Child]` below a guessed `[Fork]`.
Source = Literal["heads", "ngrams", "recycled", "fork"]


@dataclass(frozen=True, slots=True)
class RequestStarted:
    """A request. Control tokens are None where the model has none."""

    step: int
    request: str
    prompt_ids: tuple[int, ...]
    eos_ids: frozenset[int]
    fork_id: int | None
    child_id: int | None


@dataclass(frozen=True, slots=True)
class ThreadStarted:
    """A thread's first step is a later one, or, where its `[Child]` had been guessed, this one.

    parent: None for the trunk. fork_index: the token of the parent behind which the thread is read, counted from the
    parent's first, forced ones included; -1 for the trunk. forced_ids: what a child begins with, no part of its text.
    seen: how many of the parent's tokens are on its path. line_break: how many of the parent's tokens behind the fork
    are only read where the child does not end with a line break.
    """

    step: int
    request: str
    thread: int
    parent: int | None = None
    fork_index: int = -1
    forced_ids: tuple[int, ...] = ()
    seen: int = 0
    line_break: int = 0


@dataclass(frozen=True, slots=True)
class Drafted:
    """A thread's part of a forest: tokens that are not cached yet, the last of them the root, and the draft tree below.

    cached: how many of its own tokens, forced ones included, are in the KV pool. pending: how many are fed now.
    token_ids, parents, sources: one per node of the draft tree, parents before children, -1 for a child of the root.
    verified: False for an ancestor that is only fed again because its slots had been taken.
    """

    request: str
    thread: int
    cached: int
    pending: int
    token_ids: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    sources: tuple[Source, ...] = ()
    verified: bool = True


@dataclass(frozen=True, slots=True)
class StepStarted:
    """The forest of a step, in the order of its rows."""

    step: int
    drafted: tuple[Drafted, ...]


@dataclass(frozen=True, slots=True)
class TokensAccepted:
    """A thread's next tokens. nodes: which nodes of its draft tree had guessed the first of them, in order."""

    step: int
    request: str
    thread: int
    token_ids: tuple[int, ...]
    nodes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TokensRejected:
    """Nodes of a thread's draft tree that did not become part of the answer."""

    step: int
    request: str
    thread: int
    token_ids: tuple[int, ...]
    nodes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokensInserted:
    """A thread's next tokens, written by a fork rule in place of what the model would have chosen."""

    step: int
    request: str
    thread: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ThreadContinuedParent:
    """The thread writes the rest of its parent's text: what that has behind the fork is no part of the answer."""

    step: int
    request: str
    thread: int


@dataclass(frozen=True, slots=True)
class ThreadFinished:
    """reason: "stop", "length", or "cancelled" for what can no longer be part of the answer.

    ends_line: whether its text brings the line break that its parent has behind the fork, which then is not read.
    """

    step: int
    request: str
    thread: int
    reason: str
    ends_line: bool = False


@dataclass(frozen=True, slots=True)
class StepFinished:
    """A step is over.

    rows: of the forest.
    slots_used: of the KV pool during the pass, draft nodes included.
    slots_kept: of the KV pool afterwards.
    text_lengths: of each request whose answer can be read further than before, its id and how many tokens are final.
    seconds: since decoding began, a streamer's time included.
    """

    step: int
    rows: int
    slots_used: int
    slots_kept: int
    text_lengths: tuple[tuple[str, int], ...]
    seconds: float


Event = (
    RequestStarted
    | ThreadStarted
    | StepStarted
    | TokensAccepted
    | TokensRejected
    | TokensInserted
    | ThreadContinuedParent
    | ThreadFinished
    | StepFinished
)
Consumer = Callable[[Event], None]
