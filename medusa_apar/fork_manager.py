"""Accepts tokens, spawns a child at every `[Fork]`, ends threads and gives their slots back."""

from __future__ import annotations

from dataclasses import dataclass

from .forest import Stem
from .paragraph_tree import ParagraphTree, Thread
from .request import Request, thread_key
from .slot_ledger import SlotLedger
from .verdict import Verdict


@dataclass(slots=True)
class ForkManager:
    """`context_length`: most tokens a path may have; a thread that reaches it ends with reason "length"."""

    ledger: SlotLedger
    context_length: int | None

    def commit(self, tree: ParagraphTree, stem: Stem, verdict: Verdict) -> int:
        """Appends the verdict's tokens up to an end token, books the accepted nodes' slots, frees the rejected ones.

        Returns how many tokens the thread gained.
        """
        thread = stem.thread
        gained = 0
        for token in verdict.tokens:
            thread.tokens.append(token)
            gained += 1
            if token in tree.eos_ids:
                thread.finish_reason = "stop"
            elif token == tree.fork_id:
                self._spawn(tree, thread)
            if thread.live and self._at_context_end(thread):
                thread.finish_reason = "length"
            if thread.ended:
                break
        assert stem.slots is not None
        drafted = stem.slots[len(stem.pending) :].tolist()
        kept = [drafted[node] for node in verdict.nodes[:gained]]
        self.ledger.book(thread, kept)
        self.ledger.pool.release(set(drafted) - set(kept))
        if thread.ended:
            self.ledger.settle(thread)
        return gained

    def cancel(self, thread: Thread, reason: str = "cancelled") -> None:
        thread.finish_reason = reason
        self.ledger.settle(thread)

    def trim(self, request: Request) -> None:
        """Cancels what can no longer show: everything once the request is done, else threads beyond its limit."""
        threads = request.tree.threads if request.done else request.beyond_limit()
        for thread in threads:
            if thread.live:
                self.cancel(thread, "length" if len(request.text) >= request.max_new_tokens else "cancelled")

    def resume(self, request: Request, max_new_tokens: int) -> None:
        """Goes on with a request that its limit had ended, as if this had been the limit all along."""
        request.max_new_tokens, request.done = max_new_tokens, False
        for thread in request.tree.threads:
            if thread.finish_reason in ("length", "cancelled") and not self._at_context_end(thread):
                thread.finish_reason = None
        request.publish()
        self.trim(request)

    def _spawn(self, tree: ParagraphTree, parent: Thread) -> None:
        fork_index = len(parent.tokens) - 1
        child = tree.fork(parent, fork_index, thread_key(parent.key, fork_index))
        if self._at_context_end(child):
            child.finish_reason = "length"

    def _at_context_end(self, thread: Thread) -> bool:
        return self.context_length is not None and thread.end >= self.context_length
