"""Rescoring: a finished answer held against plain decoding of the text as it is read, weak threads written anew.

A thread does not see what its siblings write, so a threaded answer is not what one thread would have written. How far
off it is, one causal pass tells: prompt and answer in reading order, without control tokens, at ordinary positions.

The engine that wrote the answer makes that pass, so the figures speak of threads and not of rounding: with `fork=False`
a greedy answer agrees with itself. It goes in pieces, since a long answer's logits would fill gigabytes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from medusa_apar.threads.fork_policy import NoForks
from medusa_apar.threads.paragraph_tree import Thread
from medusa_apar.threads.request import Request, RequestOptions, TextScores

from .engine import Engine
from .stats import ThreadAgreement

# A thread is judged by what it wrote among the first so many tokens of its part of the text, which is its own and its
# descendants'. Were it judged by everything, a limit would change what is judged and no longer just cut the text.
JUDGED = 64
# A rewritten thread has to end within so many tokens, its end token among them, or its first version stays: now and
# then one goes on with the list it is a part of.
LONGEST = 128


def first_limit(max_new_tokens: int, regenerate_below: float | None) -> int:
    """Tokens to write at first: enough to judge every thread that begins within the limit."""
    return max_new_tokens + (0 if regenerate_below is None else JUDGED)


def last_limit(max_new_tokens: int, regenerate_below: float | None) -> int:
    """Most tokens that are ever written for an answer, where rewritten threads are shorter than they were."""
    return first_limit(max_new_tokens, regenerate_below) + (0 if regenerate_below is None else max_new_tokens)


@dataclass(slots=True)
class Revision:
    """One row's final text as it comes about: `request.text`, but for the parts of weak threads."""

    request: Request
    scored: TextScores  # of request.text
    limit: int  # tokens of the final text
    # Written by `judge`:
    weak: set[Thread] = field(default_factory=set)
    usable: int = 0  # tokens of request.text before the first thread of which too little is known to judge it
    # Written by `advance`:
    text: list[tuple[Thread, int]] = field(default_factory=list)  # as Request.text
    text_ids: list[int] = field(default_factory=list)
    rewritten: list[Thread] = field(default_factory=list)
    place: int = 0  # in request.text

    @property
    def cut(self) -> bool:
        """Whether more of the answer could be had than `request.text` holds."""
        return len(self.request.text) >= self.request.max_new_tokens

    def judge(self, regenerate_below: float) -> None:
        begins: dict[Thread, int] = {}
        judged: dict[Thread, list[bool]] = {}
        for place, (thread, _) in enumerate(self.request.text):
            for member in _lineage(thread):
                begins.setdefault(member, place)
            if thread in begins and place - begins[thread] < JUDGED and place < len(self.scored.chosen):
                judged.setdefault(thread, []).append(self.scored.chosen[place])
        self.weak = {thread for thread, chosen in judged.items() if sum(chosen) < regenerate_below * len(chosen)}
        written = len(self.request.text)
        unknown = [begin for begin in begins.values() if self.cut and begin + JUDGED > written]
        self.usable = min(unknown, default=written)

    def advance(self, new_threads: dict[Thread, Thread | None], context: int | None) -> Thread | None:
        """Extends the final text as far as can be; returns the weak thread that has to be written anew to go on.

        new_threads: those that have been, each with the trunk that replaces it, or None where the first version stays.
        context: the model's, in tokens.
        """
        while self.place < self.usable and len(self.text) < self.limit:
            thread, index = self.request.text[self.place]
            weak = next((member for member in reversed(_lineage(thread)) if self._is_weak(member, new_threads)), None)
            # Behind the text there must be room for [Fork], [Child] and a token.
            if weak is None or (context and len(self.request.prompt_ids) + len(self.text) + 2 >= context):
                self.text.append((thread, index))
                self.text_ids.append(thread.tokens[index])
                self.place += 1
            elif (new := new_threads.get(weak)) is not None:
                self._splice(weak, new)
            else:
                return weak
        return None

    def _is_weak(self, thread: Thread, new_threads: dict[Thread, Thread | None]) -> bool:
        return thread in self.weak and new_threads.get(thread, thread) is not None

    def _splice(self, thread: Thread, new: Thread) -> None:
        visible = new.token_ids[:-1]
        self.text += [(thread, thread.num_forced + index) for index in range(len(visible))]
        self.text_ids += visible
        self.rewritten.append(thread)
        while self.place < len(self.request.text) and thread in _lineage(self.request.text[self.place][0]):
            self.place += 1


@dataclass(slots=True)
class Rescoring:
    """Scores and revises the answers of requests that have finished, their limit being `first_limit`.

    It is a client of the engine: a text is scored, and a thread written anew, as a request like any other.
    """

    engine: Engine
    requests: list[Request]
    max_new_tokens: int
    regenerate_below: float | None
    # Written by `_rewrite`: weak thread -> the trunk that replaces it, or None where there is no better one.
    new_threads: dict[Thread, Thread | None] = field(default_factory=dict)
    _new_requests: dict[Thread, Request] = field(default_factory=dict)  # by the trunk that replaces a thread

    def run(self) -> list[list[ThreadAgreement]]:
        """Leaves every request with its final text, and says of every row and thread how plain decoding sees it."""
        requests = self.requests
        for request in requests:
            request.watcher = None  # what is rewritten is not told
        scored = self.scores(requests)
        rewritten: list[list[Thread]] = [[] for _ in requests]
        if self.regenerate_below is not None:
            revisions = self._revise(scored)
            for row, revision in enumerate(revisions):
                self._adopt(revision)
                rewritten[row], scored[row] = revision.rewritten, revision.scored
            changed = [row for row, threads in enumerate(rewritten) if threads]
            for row, its in zip(changed, self.scores([requests[row] for row in changed]), strict=True):
                scored[row] = its
        reports = [_report(*entry) for entry in zip(requests, scored, rewritten, strict=True)]
        threads = [agreement for report in reports for agreement in report]
        stats, tokens = self.engine.stats, sum(agreement.tokens for agreement in threads)
        if requests[0].options.seed is None and tokens:
            stats.agreement = sum(agreement.chosen or 0 for agreement in threads) / tokens
        stats.regenerated = sum(map(len, rewritten))
        stats.generated_tokens = sum(len(request.text) for request in requests)
        stats.forks = sum(len(request.tree.threads) - 1 for request in requests)
        return reports

    def scores(self, requests: Sequence[Request]) -> list[TextScores]:
        """What plain decoding says of each request's text, in one pass over prompt and text."""
        started, context = time.perf_counter(), self.engine.fork_manager.context_length
        asked: dict[int, Request] = {}
        for place, request in enumerate(requests):
            prompt, text_ids = request.prompt_ids, request.text_ids
            if context is not None:
                text_ids = text_ids[: max(context - len(prompt), 0)]
            if text_ids:
                row = replace(request.row, ids=request.row.ids + text_ids)
                options = self._alone(request, score_from=len(prompt), max_new_tokens=1)
                asked[place] = Request(f"{request.id}/score", prompt + text_ids, options, row=row)
        run(self.engine, list(asked.values()))
        self.engine.stats.rescore_seconds += time.perf_counter() - started
        return [asked[place].text_scores if place in asked else TextScores() for place in range(len(requests))]

    def _alone(self, request: Request, **changes: Any) -> RequestOptions:
        """The request's options, for one thread that nobody watches."""
        rule = request.options.rule and replace(request.options.rule, fork=False)
        alone = {"rule": rule, "fork_if": None, "policy": NoForks(), "stop": None, "watcher": None, "events": False}
        return replace(request.options, **alone | changes)

    def _revise(self, scored: list[TextScores]) -> list[Revision]:
        """Final texts; where they are too short because of what was rewritten, more is written first."""
        manager = self.engine.fork_manager
        most = last_limit(self.max_new_tokens, self.regenerate_below)
        revisions = [Revision(*pair, self.max_new_tokens) for pair in zip(self.requests, scored, strict=True)]
        todo = revisions
        while todo:
            self._rewrite(todo)
            todo = []
            for row, revision in enumerate(revisions):
                request, missing = revision.request, self.max_new_tokens - len(revision.text)
                if missing > 0 and revision.cut and request.max_new_tokens < most:
                    manager.resume(request, min(request.max_new_tokens + missing + JUDGED, most))
                    revisions[row] = Revision(request, revision.scored, self.max_new_tokens)
                    todo.append(revisions[row])
            run(self.engine, [revision.request for revision in todo if not revision.request.done])
            for revision, its in zip(todo, self.scores([revision.request for revision in todo]), strict=True):
                revision.scored = its
        return revisions

    def _rewrite(self, revisions: Sequence[Revision]) -> None:
        """Every row's weak threads, in reading order: a later one reads what an earlier one has become. Rows go along
        with each other, so that a batch takes as many rounds as the row that needs most."""
        assert self.regenerate_below is not None
        for revision in revisions:
            revision.judge(self.regenerate_below)
        while True:
            found = [
                (revision.advance(self.new_threads, self.engine.fork_manager.context_length), revision)
                for revision in revisions
            ]
            asked = {thread: self._anew(thread, revision) for thread, revision in found if thread is not None}
            if not asked:
                return
            run(self.engine, list(asked.values()))
            for thread, request in asked.items():
                new = self.new_threads[thread] = _ended(request.tree.trunk)
                if new is not None:
                    self._new_requests[new] = request

    def _anew(self, thread: Thread, revision: Revision) -> Request:
        """A request for the thread's part: behind the text so far, the control tokens that a part begins with and ends
        by. Its tokens are what plain greedy decoding writes there."""
        request, tree = revision.request, revision.request.tree
        assert tree.fork_id is not None and tree.child_id is not None
        before = [*revision.text_ids, tree.fork_id, tree.child_id]
        options = self._alone(request, max_new_tokens=LONGEST)
        row = replace(request.row, ids=request.row.ids + before)
        return Request(f"{request.id}/{thread.index}", request.prompt_ids + before, options, thread.key, row)

    def _adopt(self, revision: Revision) -> None:
        """The final text becomes the request's, and the paragraph tree one that reads so."""
        request = revision.request
        for thread in revision.rewritten:
            new = self.new_threads[thread]
            assert new is not None
            request.tree.replace(thread, new.token_ids, new.finish_reason)
            other = self._new_requests[new]
            for own, theirs in ((request.scores, other.scores), (request.logits, other.logits)):
                if new in theirs:
                    own[thread] = theirs[new]
        request.text, request.text_ids = revision.text[: revision.limit], revision.text_ids[: revision.limit]
        if not revision.rewritten:
            scored = revision.scored
            revision.scored = TextScores(scored.logprobs[: revision.limit], scored.chosen[: revision.limit])


def finish(engine: Engine) -> Iterator[None]:
    """Steps until nothing is unfinished; yields after each step. Raises what a request fails by."""
    while engine.unfinished:
        for output in engine.step():
            if output.error is not None:
                raise output.error
        yield


def run(engine: Engine, requests: Sequence[Request]) -> None:
    """Has the engine finish these requests."""
    for request in requests:
        engine.add(request)
    for _ in finish(engine):
        pass


def _ended(thread: Thread) -> Thread | None:
    """The thread if it ended by itself in time; by its length, since accepted drafts may go beyond a limit."""
    return thread if thread.finish_reason == "stop" and len(thread.token_ids) <= LONGEST else None


def _lineage(thread: Thread) -> list[Thread]:
    """The thread and its ancestors from it up, without the trunk."""
    lineage: list[Thread] = []
    while thread.parent is not None:
        lineage.append(thread)
        thread = thread.parent
    return lineage


def _report(request: Request, scored: TextScores, rewritten: list[Thread]) -> list[ThreadAgreement]:
    places: dict[Thread, list[int]] = {thread: [] for thread in request.tree.threads}
    for place, (thread, _) in enumerate(request.text[: len(scored.logprobs)]):
        places[thread].append(place)
    return [
        ThreadAgreement(
            thread=thread.index,
            tokens=len(own),
            chosen=sum(scored.chosen[place] for place in own) if scored.chosen else None,
            log_prob=sum(scored.logprobs[place] for place in own) / len(own) if own else None,
            regenerated=thread in rewritten,
        )
        for thread, own in places.items()
    ]
