"""The fork manager: appends what a thread has chosen, spawns children where the fork policy says, and ends threads.

It knows threads alone. Whoever runs them books slots (`SlotLedger.commit`) or tells another engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .fork_policy import Turn
from .paragraph_tree import Fork, Thread, thread_key
from .request import Request


@dataclass(slots=True)
class Outcome:
    """What became of tokens that a thread has chosen.

    gained: how many of them were appended; the model has yet to be asked behind the last. children: the place among
    them of what forked, and the child. ended: all threads that ended by it, cancelled ones among them.
    """

    gained: int = 0
    children: list[tuple[int, Thread]] = field(default_factory=list)
    ended: list[Thread] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ForkManager:
    """`context_length`: most tokens a path may have; a thread that reaches it ends with reason "length"."""

    context_length: int | None

    def advance(self, request: Request, thread: Thread, tokens: Sequence[int]) -> Outcome:
        """Appends the tokens up to an end token or an insertion of the fork policy; none to a thread that has ended."""
        outcome = Outcome()
        for place, token in enumerate(tokens if thread.live else ()):
            outcome.gained += 1
            child = self._append(request, thread, token, outcome)
            if child is not None:
                outcome.children.append((place, child))
            if thread.ended or thread.ends_with_forced:
                break
        if outcome.gained and thread.ended:
            thread.ends_line = request.options.policy.ends_line(thread)
            outcome.ended.append(thread)
        return outcome

    def trim(self, request: Request) -> list[Thread]:
        """Cancels and returns what can no longer show: everything once the request is done, else threads beyond its
        limit, and those whose path is longer than an answer within the limit can make it, whatever they choose."""
        if request.done:
            reason = "length" if len(request.text) >= request.max_new_tokens else "cancelled"
            gone = [thread for thread in request.tree.threads if thread.live]
            return self._cancel(request, gone, reason)
        limit, options = request.max_new_tokens, request.options
        longest = len(request.prompt_ids) + limit + options.policy.max_invisible_tokens(limit, options.max_depth)
        gone = self._cancel(request, [thread for thread, before in request.live if before >= limit], "cancelled")
        gone += self._cancel(request, [thread for thread, _ in request.live if thread.end > longest], "length")
        if not request.live:
            request.publish()
            request.done = True
            request.finish_reason = request.finish_reason or "length"
        return gone

    def resume(self, request: Request, max_new_tokens: int) -> None:
        """Goes on with a request that its limit had ended, as if this had been the limit all along."""
        for thread in request.tree.threads:
            if thread.finish_reason in ("length", "cancelled") and not self._at_context_end(thread):
                thread.finish_reason = None
        request.reopen(max_new_tokens)
        self.trim(request)

    def _cancel(self, request: Request, threads: list[Thread], reason: str) -> list[Thread]:
        for thread in threads:
            thread.finish_reason = reason
        request.live = [entry for entry in request.live if entry[0].live]
        return threads

    def _append(self, request: Request, thread: Thread, token: int, outcome: Outcome) -> Thread | None:
        """One more token, and what it brings about; a child that it spawns is returned."""
        tree, policy, child = request.tree, request.options.policy, None
        thread.tokens.append(token)
        turn = None if thread.parent is None or thread.continues_parent else policy.turn(tree, thread)
        if token in request.end_ids(thread) or turn is Turn.RETURN:
            thread.finish_reason = "stop"
        elif (fork := policy.fork(tree, thread)) is not None:
            child = self._spawn(request, thread, fork, outcome)
        if turn is Turn.CONTINUE_PARENT:
            self._take_over(request, thread, outcome)
        if thread.live and self._at_context_end(thread):
            thread.finish_reason = "length"
        return child

    def _spawn(self, request: Request, parent: Thread, fork: Fork, outcome: Outcome) -> Thread:
        tree, fork_index = request.tree, len(parent.tokens) - 1
        child = tree.fork(parent, fork_index, thread_key(parent.key, fork_index), fork)
        if self._at_context_end(child):
            child.finish_reason = "length"
        room = len(fork.parent) if self.context_length is None else max(self.context_length - parent.end, 0)
        tree.insert(parent, fork.parent[:room])
        if fork.continues_parent:
            self._take_over(request, child, outcome)
        return child

    def _take_over(self, request: Request, child: Thread, outcome: Outcome) -> None:
        child.continues_parent = True
        for thread in request.tree.beyond(child):
            if thread.live:
                thread.finish_reason = "cancelled"
                outcome.ended.append(thread)

    def _at_context_end(self, thread: Thread) -> bool:
        return self.context_length is not None and thread.end >= self.context_length
