"""One prompt row and everything generated for it: its paragraph tree, and the finished part of its reading order."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .paragraph_tree import ParagraphTree, ReadingCursor, Thread


class Request:
    """Args:
    row, batch_size: its place in the caller's batch.
    row_ids: the row as the user passed it, padding included: what logits processors and criteria see.
    prompt_ids: the row without padding: what the model sees.
    max_new_tokens: limit on the visible text.
    criteria: transformers' stopping criteria, asked after every token of the reading order.
    """

    def __init__(
        self,
        row: int,
        batch_size: int,
        row_ids: list[int],
        prompt_ids: list[int],
        tree: ParagraphTree,
        max_new_tokens: int,
        criteria: list[Callable] | None = None,
        device: torch.device | str = "cpu",
    ):
        self.row, self.batch_size = row, batch_size
        self.row_ids, self.prompt_ids = row_ids, prompt_ids
        self.tree = tree
        self.max_new_tokens = max_new_tokens
        self.text: list[tuple[Thread, int]] = []  # finished reading order: (thread, index into its tokens)
        self.text_ids: list[int] = []
        self.done = False
        self._criteria, self._device = criteria or [], device
        self._cursor = ReadingCursor(tree)

    def path(self, thread: Thread) -> list[int]:
        """The row a logits processor sees at the thread's root: padding, prompt, path, the thread's tokens."""
        ancestors = thread.ancestor_ids() + thread.tokens
        return self.row_ids + ancestors[len(self.prompt_ids) :]

    def publish(self) -> None:
        """Moves the finished part of the reading order on; sets `done` at the limit, a criterion, or the end."""
        for thread, index in self._cursor.advance():
            self.text.append((thread, index))
            self.text_ids.append(thread.tokens[index])
            if len(self.text) >= self.max_new_tokens or self._criterion_met():
                self.done = True
                return
        self.done = self._cursor.done

    def beyond_limit(self) -> list[Thread]:
        """Live threads whose next token could no longer be part of the limited text."""
        return [thread for thread, before in self.tree.live_in_reading_order() if before >= self.max_new_tokens]

    def _criterion_met(self) -> bool:
        if not self._criteria:
            return False
        # Criteria may hold something per row of the batch, so they are shown the whole batch and asked for one row.
        row = self.row_ids + self.text_ids
        ids = torch.tensor([row], dtype=torch.long, device=self._device).expand(self.batch_size, -1)
        verdicts = [torch.as_tensor(criterion(ids, None)).expand(self.batch_size) for criterion in self._criteria]
        return any(bool(verdict[self.row]) for verdict in verdicts)
