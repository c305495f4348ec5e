"""Accepts tokens, spawns a child wherever the fork policy says, ends threads and gives their slots back."""

from __future__ import annotations

from dataclasses import dataclass, field

from medusa_apar.forest.forest import Stem
from medusa_apar.kv.slot_ledger import SlotLedger
from medusa_apar.threads.control_tokens import DEFAULT_MAX_DEPTH
from medusa_apar.threads.fork_policy import ControlTokenForks, NoForks, Turn
from medusa_apar.threads.paragraph_tree import Fork, ParagraphTree, Thread, thread_key
from medusa_apar.threads.request import Request
from medusa_apar.verify.verdict import Verdict


@dataclass(slots=True)
class ForkManager:
    """`context_length`: most tokens a path may have; a thread that reaches it ends with reason "length". `max_depth`:
    of threads, as far as it bounds what a path can hold."""

    ledger: SlotLedger
    context_length: int | None
    policy: NoForks = field(default_factory=ControlTokenForks)
    max_depth: int = DEFAULT_MAX_DEPTH

    def commit(self, tree: ParagraphTree, stem: Stem, verdict: Verdict) -> list[tuple[Thread, Verdict, int]]:
        """Appends the verdict's tokens up to an end token or an insertion of the fork policy, behind which the model
        has yet to be asked; books the accepted nodes' slots, frees the rejected ones.

        Returns each thread that has gone on, with its verdict and how many of its tokens it gained: the stem's (none
        where it was cancelled within the step), then children whose `[Child]` had been drafted and have begun.
        """
        thread, begun = stem.thread, []
        gained = 0
        for place, token in enumerate(verdict.tokens if thread.live else ()):
            gained += 1
            child = self._append(tree, thread, token)
            node = verdict.nodes[place] if place < len(verdict.nodes) else None
            if child is not None and child.live and node in stem.forks:
                begun.append((child, stem.forks[node], verdict.children[node]))
            if thread.ended or thread.awaits_insertion:
                break
        assert stem.slots is not None
        drafted = stem.slots[len(stem.pending) :].tolist()
        kept = [drafted[node] for node in verdict.nodes[:gained]]
        self.ledger.book(thread, kept)
        for child, node, _ in begun:
            self.ledger.book(child, [drafted[node]])
            kept.append(drafted[node])
        self.ledger.pool.release(set(drafted) - set(kept))
        for child, _, first in begun:
            self._append(tree, child, first.tokens[0])
        for member in (*(child for child, _, _ in begun), thread):
            if member.ended and (gained or member is not thread):
                member.ends_line = self.policy.ends_line(member)
                self.ledger.settle(member)
        advanced = [(thread, verdict, gained)] if gained else []
        return [*advanced, *((child, first, 1) for child, _, first in begun)]

    def _append(self, tree: ParagraphTree, thread: Thread, token: int) -> Thread | None:
        """One more token, and what it brings about; a child that it spawns is returned."""
        child = None
        thread.tokens.append(token)
        turn = None if thread.parent is None or thread.takes_over else self.policy.turn(tree, thread)
        if token in tree.eos_ids or turn is Turn.BACK:
            thread.finish_reason = "stop"
        elif (fork := self.policy.fork(tree, thread)) is not None:
            child = self._spawn(tree, thread, fork)
        if turn is Turn.OVER:
            self._take_over(tree, thread)
        if thread.live and self._at_context_end(thread):
            thread.finish_reason = "length"
        return child

    def cancel(self, thread: Thread, reason: str = "cancelled") -> None:
        thread.finish_reason = reason
        self.ledger.settle(thread)

    def trim(self, request: Request) -> None:
        """Cancels what can no longer show: everything once the request is done, else threads beyond its limit, and
        those whose path is longer than an answer within the limit can make it, whatever they choose."""
        threads = request.tree.threads if request.done else request.beyond_limit()
        for thread in threads:
            if thread.live:
                self.cancel(thread, "length" if len(request.text) >= request.max_new_tokens else "cancelled")
        if request.done:
            return
        hidden = self.policy.hidden(request.max_new_tokens, self.max_depth)
        for thread in request.tree.threads:
            if thread.live and thread.end > len(request.prompt_ids) + request.max_new_tokens + hidden:
                self.cancel(thread, "length")
        if not request.tree.live:
            request.publish()
            request.done = True

    def resume(self, request: Request, max_new_tokens: int) -> None:
        """Goes on with a request that its limit had ended, as if this had been the limit all along."""
        request.max_new_tokens, request.done = max_new_tokens, False
        for thread in request.tree.threads:
            if thread.finish_reason in ("length", "cancelled") and not self._at_context_end(thread):
                thread.finish_reason = None
        request.publish()
        self.trim(request)

    def _spawn(self, tree: ParagraphTree, parent: Thread, fork: Fork) -> Thread:
        fork_index = len(parent.tokens) - 1
        child = tree.fork(parent, fork_index, thread_key(parent.key, fork_index), fork)
        if self._at_context_end(child):
            child.finish_reason = "length"
        room = len(fork.parent) if self.context_length is None else max(self.context_length - parent.end, 0)
        tree.insert(parent, fork.parent[:room])
        if fork.takes_over:
            self._take_over(tree, child)
        return child

    def _take_over(self, tree: ParagraphTree, child: Thread) -> None:
        child.takes_over = True
        for thread in tree.beyond(child):
            if thread.live:
                self.cancel(thread)

    def _at_context_end(self, thread: Thread) -> bool:
        return self.context_length is not None and thread.end >= self.context_length
