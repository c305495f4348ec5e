"""Threads of one request, where each was forked, and the order in which people read them.

Nothing here knows of tensors, slots or models: a thread is a list of token ids hanging behind a token of its parent, a
`[Fork]` or where a rule forked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field


def thread_key(*parts: object) -> int:
    """64 bits that name a thread by its content, never by when or beside what it runs."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class Fork:
    """What one fork forces, on both sides.

    child: the child's first tokens, at least one. seen: how many of the parent's tokens stand before them on its path
        (None: all).
    parent: tokens the parent goes on with, in place of what it would have chosen.
    line_break: how many of the latter, from the first, are only read where the child did not end with a line break.
    continues_parent: the child writes the rest of the parent's text, and the parent ends.
    """

    child: tuple[int, ...]
    seen: int | None = None
    parent: tuple[int, ...] = ()
    line_break: int = 0
    continues_parent: bool = False


@dataclass(slots=True, eq=False)
class Thread:
    """One APAR stream. The trunk's forced tokens are the prompt, a child's is the single `[Child]`; one that was forked
    by rule begins with tokens of its parent."""

    index: int  # order of creation within the request
    parent: Thread | None
    fork_index: int  # the token of the parent it is read behind, a [Fork] or where a rule forked; -1 for the trunk
    tokens: list[int]  # forced tokens, then what the thread wrote
    num_forced: int
    start: int  # path position of tokens[0]
    depth: int
    key: int  # 64 bits naming the thread independently of scheduling (seeds its noise)
    children: list[Thread] = field(default_factory=list)  # in fork order
    finish_reason: str | None = None  # "stop" | "length" | "cancelled", written by the fork manager
    seen: int = 0  # how many of the parent's tokens are on its path
    line_break: int = 0  # how many of the parent's tokens behind the fork are read only if `ends_line` stays False
    # Written by the fork manager:
    ends_line: bool = False  # whether its text, now ended, brings the line break that follows it
    continues_parent: bool = False  # whether it writes the rest of its parent's text, which ends at the fork then
    inserted: set[int] = field(default_factory=set)  # which of `tokens`, behind the forced ones, a fork rule wrote

    @property
    def live(self) -> bool:
        return self.finish_reason is None

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None

    @property
    def trunk(self) -> Thread:
        """Its request's first thread."""
        thread = self
        while thread.parent is not None:
            thread = thread.parent
        return thread

    @property
    def token_ids(self) -> list[int]:
        """Its own tokens, control and end tokens included."""
        return self.tokens[self.num_forced :]

    @property
    def path_ids(self) -> list[int]:
        """Every token id visible before the thread's first own token: the prompt, ancestors, the forced `[Child]`."""
        return self.ancestor_ids() + self.tokens[: self.num_forced]

    @property
    def ends_with_forced(self) -> bool:
        """Whether its last token was inserted and not chosen, so that nothing was drafted behind it."""
        return len(self.tokens) - 1 in self.inserted

    @property
    def last_two(self) -> tuple[int, int]:
        """The last two tokens of its path, what runs next being behind them; -1 for one that is not there."""
        if len(self.tokens) > 1:
            return self.tokens[-2], self.tokens[-1]
        above = -1 if self.parent is None or not self.seen else self.parent.tokens[self.seen - 1]
        return above, self.tokens[-1]

    @property
    def end(self) -> int:
        """Path position behind its last token."""
        return self.start + len(self.tokens)

    def ancestor_ids(self) -> list[int]:
        return [token for thread, stop in self.ancestors() for token in thread.tokens[:stop]]

    def ancestors(self) -> list[tuple[Thread, int]]:
        """From the trunk down: each ancestor and how many of its tokens this thread sees."""
        lineage: list[tuple[Thread, int]] = []
        thread = self
        while thread.parent is not None:
            lineage.append((thread.parent, thread.seen))
            thread = thread.parent
        return lineage[::-1]

    def __repr__(self) -> str:
        return f"Thread({self.index}, parent={self.parent and self.parent.index}, tokens={len(self.token_ids)})"


class ParagraphTree:
    """The threads of one request.

    threads: every `Thread`, the trunk first; `len(tree.threads)` is how many have written.

    `eos_ids` end a thread; `fork_id` and `child_id` are None where the model has no control tokens.
    """

    def __init__(
        self,
        prompt_ids: list[int],
        key: int = 0,
        eos_ids: Collection[int] = (),
        fork_id: int | None = None,
        child_id: int | None = None,
    ):
        trunk = Thread(0, None, -1, list(prompt_ids), len(prompt_ids), 0, 0, key)
        self.threads = [trunk]
        self.eos_ids = frozenset(eos_ids)
        self.fork_id, self.child_id = fork_id, child_id

    @property
    def trunk(self) -> Thread:
        return self.threads[0]

    @property
    def live(self) -> bool:
        return any(thread.live for thread in self.threads)

    def fork(self, parent: Thread, fork_index: int, key: int, fork: Fork | None = None) -> Thread:
        """Hangs a child behind `parent.tokens[fork_index]`, where no other hangs; by default that is a `[Fork]`."""
        if fork is None:
            assert parent.tokens[fork_index] == self.fork_id and self.child_id is not None
            fork = Fork((self.child_id,))
        assert not parent.children or parent.children[-1].fork_index < fork_index
        seen = fork_index + 1 if fork.seen is None else fork.seen
        child = Thread(
            index=len(self.threads),
            parent=parent,
            fork_index=fork_index,
            tokens=list(fork.child),
            num_forced=len(fork.child),
            start=parent.start + seen,
            depth=parent.depth + 1,
            key=key,
            seen=seen,
            line_break=fork.line_break,
        )
        parent.children.append(child)
        self.threads.append(child)
        return child

    def insert(self, thread: Thread, tokens: Sequence[int]) -> None:
        """Appends what the thread did not choose."""
        thread.inserted.update(range(len(thread.tokens), len(thread.tokens) + len(tokens)))
        thread.tokens += tokens

    def replace(self, thread: Thread, token_ids: list[int], finish_reason: str | None) -> None:
        """Gives a finished thread other tokens of its own, without children. Its descendants leave the tree, and
        threads are numbered anew."""
        thread.tokens[thread.num_forced :] = token_ids
        thread.finish_reason = finish_reason
        thread.children.clear()
        self.threads = sorted(self.depth_first(), key=lambda kept: kept.index)
        for index, kept in enumerate(self.threads):
            kept.index = index

    def beyond(self, child: Thread) -> list[Thread]:
        """The child's parent, and everything that hangs at it behind the child: what is not read if the child takes
        over."""
        parent = child.parent
        assert parent is not None
        found = [parent]
        waiting = [later for later in parent.children if later.fork_index > child.fork_index]
        while waiting:
            found.append(waiting.pop())
            waiting += found[-1].children
        return found

    def is_visible(self, thread: Thread, index: int) -> bool:
        """Whether a thread's own token is part of the text: control tokens and what a child ends with are not.

        A line break that a child brought itself is told by `skipped`.
        """
        if thread.tokens[index] in (self.fork_id, self.child_id):
            return False
        ends_child = thread.finish_reason == "stop" and index == len(thread.tokens) - 1
        return not ends_child or thread.parent is None or thread.continues_parent

    def depth_first(self) -> Iterator[Thread]:
        """Threads parents first, every subtree in one run."""
        stack = [self.trunk]
        while stack:
            thread = stack.pop()
            yield thread
            stack += reversed(thread.children)

    def reading_order(self) -> Iterator[tuple[Thread, int]]:
        """(thread, index into its tokens) of every visible token written so far, children spliced in at their forks."""
        return ReadingCursor(self, stop_at_live=False).advance()

    def live_in_reading_order(self) -> list[tuple[Thread, int]]:
        """Live threads as they are read, each with how many visible tokens now stand before its end.

        Costs O(threads): a thread shows all its own tokens but one `[Fork]` per child, line breaks that children bring,
        and a child's final end token. The number never falls while threads write on.
        """
        found: list[tuple[Thread, int]] = []

        def visit(thread: Thread, before: int) -> int:
            shown = thread.num_forced
            for child in thread.children:
                forked = child.fork_index + (thread.tokens[child.fork_index] != self.fork_id)
                before = visit(child, before + forked - shown)
                if child.continues_parent:
                    return before
                shown = child.fork_index + 1 + skipped(child)
            before += max(len(thread.tokens) - shown, 0)
            if thread.live:
                found.append((thread, before))
            elif thread.finish_reason == "stop" and thread.parent is not None and not thread.continues_parent:
                before -= 1
            return before

        visit(self.trunk, 0)
        return found


def skipped(child: Thread) -> int:
    """How many of the parent's tokens behind a child are not read: the child's own line break stands for them. Until it
    has ended nobody knows, and they count as not read."""
    return child.line_break if child.live or child.ends_line else 0


class ReadingCursor:
    """Walks a growing paragraph tree in reading order and yields each visible token once, as soon as it is final.

    The finished part of the reading order ends at the first live thread: what stands behind that thread's last token
    is not known yet. `stop_at_live=False` walks everything written so far.
    """

    def __init__(self, tree: ParagraphTree, stop_at_live: bool = True):
        self._tree, self._stop_at_live = tree, stop_at_live
        trunk = tree.trunk
        # One [thread, next token, next child] per level from the trunk to where the cursor stands.
        self._stack: list[list] = [[trunk, trunk.num_forced, 0]]

    def advance(self) -> Iterator[tuple[Thread, int]]:
        while self._stack:
            frame = self._stack[-1]
            thread, index, child = frame
            if child < len(thread.children) and thread.children[child].fork_index < index:
                frame[2] += 1
                self._stack.append([thread.children[child], thread.children[child].num_forced, 0])
            elif index < len(thread.tokens):
                frame[1] += 1
                if self._tree.is_visible(thread, index):
                    yield thread, index
            elif thread.live and self._stop_at_live:
                return
            else:
                self._stack.pop()
                if thread.continues_parent:
                    self._stack.pop()
                elif self._stack:
                    self._stack[-1][1] += skipped(thread)

    @property
    def done(self) -> bool:
        return not self._stack
