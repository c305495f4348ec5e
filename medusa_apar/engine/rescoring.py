"""Verified mode: a finished answer held against plain decoding of the text as it is read, weak threads written anew.

A thread does not see what its siblings write, so a threaded answer is not what one thread would have written. How far
off it is, one causal pass tells: prompt and answer in reading order, without control tokens, at ordinary positions.

The runtime that wrote the answer makes that pass, over slots of its own, so the figures speak of threads and not of
rounding: with `fork=False` a greedy answer agrees with itself. It goes in pieces, each behind the slots of those before
it, since a long answer's logits would fill gigabytes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from medusa_apar.forest.forest import Forest, Stem
from medusa_apar.kv.slot_ledger import SlotLedger
from medusa_apar.runtimes.devices import device_of
from medusa_apar.threads.paragraph_tree import ParagraphTree, Thread
from medusa_apar.threads.request import Request
from medusa_apar.triton_kernels.reference import likeliest

from .engine import Decoder
from .stats import ThreadAgreement

# A thread is judged by what it wrote among the first so many tokens of its part of the text, which is its own and its
# descendants'. Were it judged by everything, a limit would change what is judged and no longer just cut the text.
JUDGED = 64
# A rewritten thread has to end within so many tokens, its end token among them, or its first version stays: now and
# then one goes on with the list it is a part of.
LONGEST = 128
_PIECE = 512  # rows of a pass: 100 MB of float32 logits where the vocabulary is 49152


def first_limit(max_new_tokens: int, regenerate_below: float | None) -> int:
    """Tokens to write at first: enough to judge every thread that begins within the limit."""
    return max_new_tokens + (0 if regenerate_below is None else JUDGED)


def last_limit(max_new_tokens: int, regenerate_below: float | None) -> int:
    """Most tokens that are ever written for an answer, where rewritten threads are shorter than they were."""
    return first_limit(max_new_tokens, regenerate_below) + (0 if regenerate_below is None else max_new_tokens)


@dataclass(slots=True)
class Scored:
    """What plain decoding says of a text, token by token; shorter than the text where the model's context ends."""

    log_probs: list[float] = field(default_factory=list)
    chosen: list[bool] = field(default_factory=list)  # whether greedy decoding chooses the token; empty when sampling


@dataclass(slots=True)
class Revision:
    """One row's final text as it comes about: `request.text`, but for the parts of weak threads."""

    request: Request
    scored: Scored  # of request.text
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
class Stitcher:
    """Scores and revises the answers of a decoder that has run, its requests' limit being `first_limit`."""

    decoder: Decoder
    max_new_tokens: int
    regenerate_below: float | None
    # Written by `_rewrite`: weak thread -> the trunk that replaces it, or None where there is no better one.
    new_threads: dict[Thread, Thread | None] = field(default_factory=dict)
    ledger: SlotLedger = field(init=False)  # of the passes

    def __post_init__(self) -> None:
        self.ledger = SlotLedger(self.decoder.runtime.pool(self.decoder.scheduler.ledger.pool.max_slots))

    def run(self) -> list[list[ThreadAgreement]]:
        """Leaves every request with its final text, and says of every row and thread how plain decoding sees it."""
        decoder, requests = self.decoder, self.decoder.requests
        scored = [self.score(request, request.text_ids) for request in requests]
        rewritten: list[list[Thread]] = [[] for _ in requests]
        if self.regenerate_below is not None:
            for row, revision in enumerate(self._revise(scored)):
                self._adopt(revision)
                rewritten[row] = revision.rewritten
                request = revision.request
                scored[row] = self.score(request, request.text_ids) if revision.rewritten else revision.scored
        reports = [_report(*entry) for entry in zip(requests, scored, rewritten, strict=True)]
        threads = [agreement for report in reports for agreement in report]
        stats, tokens = decoder.stats, sum(agreement.tokens for agreement in threads)
        if decoder.verifier.seed is None and tokens:
            stats.agreement = sum(agreement.chosen or 0 for agreement in threads) / tokens
        stats.regenerated = sum(map(len, rewritten))
        stats.generated_tokens = sum(len(request.text) for request in requests)
        stats.forks = sum(len(request.tree.threads) - 1 for request in requests)
        stats.peak_slots = max(stats.peak_slots, self.ledger.pool.peak)
        stats.final_slots += self.ledger.pool.in_use
        return reports

    def score(self, request: Request, text_ids: list[int]) -> Scored:
        """One pass over prompt and text. A text's last token is only looked for, never fed."""
        context, prompt = self.decoder.fork_manager.context_length, len(request.prompt_ids)
        if context is not None:
            text_ids = text_ids[: max(context - prompt, 0)]
        scored = Scored()
        if not text_ids:
            return scored
        runtime, stats, started = self.decoder.runtime, self.decoder.stats, time.perf_counter()
        trunk = ParagraphTree(request.prompt_ids + text_ids).trunk
        with runtime.running():
            stop = prompt
            while len(scored.log_probs) < len(text_ids):
                stem = Stem(trunk, stop, scored=1 if stop == prompt else stop - self.ledger.cached(trunk))
                forest = Forest([[stem]], self.ledger, device_of(self.decoder.model))
                self._read(runtime.forward(forest, self.ledger.pool)[0], request, text_ids, scored)
                stats.steps += 1
                stats.forward_tokens += len(forest)
                stop = min(stop + _PIECE, len(trunk.tokens) - 1)
        trunk.finish_reason = "stop"
        self.ledger.settle(trunk)
        stats.stitched_seconds += time.perf_counter() - started
        return scored

    def _read(self, logits: torch.Tensor, request: Request, text_ids: list[int], scored: Scored) -> None:
        """Appends what `logits` [rows, vocab] say of the next tokens."""
        verifier, first = self.decoder.verifier, len(scored.log_probs)
        actual = torch.tensor(text_ids[first : first + len(logits)], dtype=torch.long, device=logits.device)
        logits = logits.float()
        # One thread never writes them.
        banned = [] if verifier.control is None else [verifier.control.fork_id, verifier.control.child_id]
        if verifier.seed is None and verifier.processors:
            for row, token in enumerate(actual.tolist()):
                path = request.row_ids + text_ids[: first + row]
                scored.chosen.append(likeliest(verifier.processed(path, logits[row].clone(), request, banned)) == token)
        logits[:, banned] = -torch.inf
        log_probs = logits.gather(1, actual[:, None])[:, 0] - logits.logsumexp(dim=-1)
        scored.log_probs += log_probs.tolist()
        if verifier.seed is None and not verifier.processors:
            scored.chosen += [
                mine == token for mine, token in zip(verifier.greedy(logits), text_ids[first:], strict=False)
            ]

    def _revise(self, scored: list[Scored]) -> list[Revision]:
        """Final texts; where they are too short because of what was rewritten, more is written first."""
        manager, requests = self.decoder.fork_manager, self.decoder.requests
        most = last_limit(self.max_new_tokens, self.regenerate_below)
        revisions = [Revision(*pair, self.max_new_tokens) for pair in zip(requests, scored, strict=True)]
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
            for _ in self.decoder.run() if todo else ():
                pass
            for revision in todo:
                revision.scored = self.score(revision.request, revision.request.text_ids)
        return revisions

    def _rewrite(self, revisions: Sequence[Revision]) -> None:
        """Every row's weak threads, in reading order: a later one reads what an earlier one has become. Rows go along
        with each other, so that a batch takes as many rounds as the row that needs most."""
        decoder = self.decoder
        requests, verifier = decoder.requests, decoder.verifier
        assert self.regenerate_below is not None
        for revision in revisions:
            revision.judge(self.regenerate_below)
        while True:
            found = [
                (revision.advance(self.new_threads, decoder.fork_manager.context_length), revision)
                for revision in revisions
            ]
            asked = {thread: self._alone(thread, revision) for thread, revision in found if thread is not None}
            if not asked:
                break
            decoder.requests, decoder.verifier = list(asked.values()), replace(verifier, fork=False)
            for _ in decoder.run():
                pass
            self.new_threads |= {thread: _ended(request.tree.trunk) for thread, request in asked.items()}
        decoder.requests, decoder.verifier = requests, verifier

    def _alone(self, thread: Thread, revision: Revision) -> Request:
        """A request for the thread's part: behind the text so far, the control tokens that a part begins with and ends
        by. Its tokens are what plain greedy decoding writes there."""
        request, tree = revision.request, revision.request.tree
        assert tree.fork_id is not None and tree.child_id is not None
        before = [*revision.text_ids, tree.fork_id, tree.child_id]
        prompt_ids = request.prompt_ids + before
        return Request(
            *(request.row, request.batch_size, request.row_ids + before, prompt_ids),
            tree=ParagraphTree(prompt_ids, thread.key, tree.eos_ids, tree.fork_id, tree.child_id),
            max_new_tokens=LONGEST,
            device=device_of(self.decoder.model),
        )

    def _adopt(self, revision: Revision) -> None:
        """The final text becomes the request's, and the paragraph tree one that reads so."""
        request = revision.request
        for thread in revision.rewritten:
            new = self.new_threads[thread]
            assert new is not None
            request.tree.replace(thread, new.token_ids, new.finish_reason)
            for kept in (self.decoder.scores, self.decoder.logits):
                if new in kept:
                    kept[thread] = kept.pop(new)
        request.text, request.text_ids = revision.text[: revision.limit], revision.text_ids[: revision.limit]
        if not revision.rewritten:
            scored = revision.scored
            revision.scored = Scored(scored.log_probs[: revision.limit], scored.chosen[: revision.limit])


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


def _report(request: Request, scored: Scored, rewritten: list[Thread]) -> list[ThreadAgreement]:
    places: dict[Thread, list[int]] = {thread: [] for thread in request.tree.threads}
    for place, (thread, _) in enumerate(request.text[: len(scored.log_probs)]):
        places[thread].append(place)
    return [
        ThreadAgreement(
            thread=thread.index,
            tokens=len(own),
            chosen=sum(scored.chosen[place] for place in own) if scored.chosen else None,
            log_prob=sum(scored.log_probs[place] for place in own) / len(own) if own else None,
            regenerated=thread in rewritten,
        )
        for thread, own in places.items()
    ]
