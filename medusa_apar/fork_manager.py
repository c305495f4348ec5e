"""Accepts tokens, spawns a child at every `[Fork]`, ends threads and gives their slots back."""

from __future__ import annotations

from dataclasses import dataclass

from .forest import Stem
from .paragraph_tree import ParagraphTree, Thread, thread_key
from .request import Request
from .slot_ledger import SlotLedger
from .verdict import Verdict


@dataclass(slots=True)
class ForkManager:
    """`context_length`: most tokens a path may have; a thread that reaches it ends with reason "length"."""

    ledger: SlotLedger
    context_length: int | None

    def commit(self, tree: ParagraphTree, stem: Stem, verdict: Verdict) -> list[tuple[Thread, Verdict, int]]:
        """Appends the verdict's tokens up to an end token, books the accepted nodes' slots, frees the rejected ones.

        Returns each thread that has gone on, with its verdict and how many tokens it gained: the stem's, then children
        whose `[Child]` had been drafted and have begun.
        """
        thread, begun = stem.thread, []
        gained = 0
        for place, token in enumerate(verdict.tokens):
            gained += 1
            child = self._append(tree, thread, token)
            node = verdict.nodes[place] if place < len(verdict.nodes) else None
            if child is not None and child.live and node in stem.forks:
                begun.append((child, stem.forks[node], verdict.children[node]))
            if thread.ended:
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
        for ended in (member for member in (*(child for child, _, _ in begun), thread) if member.ended):
            self.ledger.settle(ended)
        return [(thread, verdict, gained), *((child, first, 1) for child, _, first in begun)]

    def _append(self, tree: ParagraphTree, thread: Thread, token: int) -> Thread | None:
        """One more token, and whatever it brings about: a child that it spawns is returned."""
        child = None
        thread.tokens.append(token)
        if token in tree.eos_ids:
            thread.finish_reason = "stop"
        elif token == tree.fork_id:
            child = self._spawn(tree, thread)
        if thread.live and self._at_context_end(thread):
            thread.finish_reason = "length"
        return child

    def cancel(self, thread: Thread, reason: str = "cancelled") -> None:
        thread.finish_reason = reason
        self.ledger.settle(thread)

    def trim(self, request: Request) -> None:
        """Cancels what can no longer show: everything once the request is done, else threads beyond its limit."""
        threads = request.tree.threads if request.done else request.beyond_limit()
        for thread in threads:
            if thread.live:
                self.cancel(thread, "length" if len(request.text) >= request.max_new_tokens else "cancelled")

    def _spawn(self, tree: ParagraphTree, parent: Thread) -> Thread:
        fork_index = len(parent.tokens) - 1
        child = tree.fork(parent, fork_index, thread_key(parent.key, fork_index))
        if self._at_context_end(child):
            child.finish_reason = "length"
        return child

    def _at_context_end(self, thread: Thread) -> bool:
        return self.context_length is not None and thread.end >= self.context_length
