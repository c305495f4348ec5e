"""Threads of one request, where each was forked, and the order in which people read them.

Nothing here knows of tensors, slots or models: a thread is a list of token ids hanging at a `[Fork]` of its parent.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Thread:
    """One APAR stream. The trunk's forced tokens are the prompt, a child's is the single `[Child]`."""

    index: int  # order of creation within the request
    parent: Thread | None
    fork_index: int  # where its [Fork] stands in parent.tokens; -1 for the trunk
    tokens: list[int]  # forced tokens, then what the thread wrote
    num_forced: int
    start: int  # path position of tokens[0]
    depth: int
    key: int  # 64 bits naming the thread independently of scheduling (seeds its noise)
    children: list[Thread] = field(default_factory=list)  # in fork order
    finish_reason: str | None = None  # "stop" | "length" | "cancelled", written by the fork manager

    @property
    def live(self) -> bool:
        return self.finish_reason is None

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None

    @property
    def token_ids(self) -> list[int]:
        """Its own tokens, control and end tokens included."""
        return self.tokens[self.num_forced :]

    @property
    def path_ids(self) -> list[int]:
        """Every token id visible before the thread's first own token: the prompt, ancestors, the forced `[Child]`."""
        return self.ancestor_ids() + self.tokens[: self.num_forced]

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
            lineage.append((thread.parent, thread.fork_index + 1))
            thread = thread.parent
        return lineage[::-1]

    def __repr__(self) -> str:
        return f"Thread({self.index}, parent={self.parent and self.parent.index}, tokens={len(self.token_ids)})"


class ParagraphTree:
    """The threads of one request.

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

    def fork(self, parent: Thread, fork_index: int, key: int) -> Thread:
        """Hangs a child at `parent.tokens[fork_index]`, which must be a `[Fork]` no other child hangs at."""
        assert parent.tokens[fork_index] == self.fork_id and self.child_id is not None
        assert not parent.children or parent.children[-1].fork_index < fork_index
        child = Thread(
            index=len(self.threads),
            parent=parent,
            fork_index=fork_index,
            tokens=[self.child_id],
            num_forced=1,
            start=parent.start + fork_index + 1,
            depth=parent.depth + 1,
            key=key,
        )
        parent.children.append(child)
        self.threads.append(child)
        return child

    def replace(self, thread: Thread, token_ids: list[int], finish_reason: str | None) -> None:
        """Gives a finished thread other tokens of its own, without children. Its descendants leave the tree, and
        threads are numbered anew."""
        thread.tokens[thread.num_forced :] = token_ids
        thread.finish_reason = finish_reason
        thread.children.clear()
        self.threads = sorted(self.depth_first(), key=lambda kept: kept.index)
        for index, kept in enumerate(self.threads):
            kept.index = index

    def is_visible(self, thread: Thread, token: int) -> bool:
        """Whether a thread's own token is part of the text: control tokens and the end of a child are not."""
        if token == self.fork_id or token == self.child_id:
            return False
        return thread.parent is None or token not in self.eos_ids

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

        Costs O(threads): a thread shows all its own tokens but one `[Fork]` per child and a child's final end token.
        """
        found: list[tuple[Thread, int]] = []

        def visit(thread: Thread, before: int) -> int:
            shown = thread.num_forced
            for child in thread.children:
                before = visit(child, before + child.fork_index - shown)
                shown = child.fork_index + 1
            before += len(thread.tokens) - shown
            if thread.live:
                found.append((thread, before))
            elif thread.parent is not None and thread.finish_reason == "stop":
                before -= 1
            return before

        visit(self.trunk, 0)
        return found


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
                if self._tree.is_visible(thread, thread.tokens[index]):
                    yield thread, index
            elif thread.live and self._stop_at_live:
                return
            else:
                self._stack.pop()

    @property
    def done(self) -> bool:
        return not self._stack
