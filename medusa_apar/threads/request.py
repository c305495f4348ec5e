"""One prompt row and everything generated for it: its paragraph tree, and the finished part of its reading order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import GenerationConfig
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from .paragraph_tree import ParagraphTree, ReadingCursor, Thread


class Ends(NamedTuple):
    """What ends an answer. `eos_ids` end a thread, `criteria` are asked of the reading order."""

    max_new_tokens: int
    eos_ids: frozenset[int]
    criteria: list[Callable]

    @classmethod
    def of(
        cls, stopping_criteria: Sequence[Callable], config: GenerationConfig, prompt_length: int, one_thread: bool
    ) -> Ends:
        """From the list that transformers makes of a call's own criteria and of the config's.

        A `MaxLengthCriteria` or `EosTokenCriteria` of the call's, but no subclass of them, replaces the config's there.
        Threads end at the config's end tokens all the same, as they were trained to; with `one_thread` nothing does.
        """
        lengths = [criterion.max_length for criterion in stopping_criteria if type(criterion) is MaxLengthCriteria]
        eos: torch.Tensor | None = config._eos_token_tensor
        eos_ids = frozenset() if eos is None else frozenset(eos.flatten().tolist())
        ends = [criterion for criterion in stopping_criteria if type(criterion) is EosTokenCriteria]
        configs = [criterion for criterion in ends if set(criterion.eos_token_id.flatten().tolist()) == eos_ids]
        criteria = [
            criterion
            for criterion in stopping_criteria
            if type(criterion) is not MaxLengthCriteria and not any(criterion is known for known in configs)
        ]
        replaced = one_thread and bool(ends) and not configs
        length = math.ceil(min(lengths, default=config.max_length)) - prompt_length
        # transformers asks a criterion behind a token, so that there is one.
        return cls(max(length, 1), frozenset() if replaced else eos_ids, criteria)


class Request:
    """Args:
    row, batch_size: its place in the caller's batch.
    row_ids: the row as the user passed it, padding included: what logits processors and criteria see.
    prompt_ids: the row without padding: what the model sees.
    max_new_tokens: limit on the visible text.
    criteria: transformers' stopping criteria, asked after every token of the reading order.
    scores: for each thread the processed scores, float32 [vocab], of every token it has chosen so far. Criteria are
        given those of the text; None gives them no scores.
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
        scores: dict[Thread, list[torch.Tensor]] | None = None,
    ):
        self.row, self.batch_size = row, batch_size
        self.row_ids, self.prompt_ids = row_ids, prompt_ids
        self.tree = tree
        self.max_new_tokens = max_new_tokens
        self.text: list[tuple[Thread, int]] = []  # finished reading order: (thread, index into its tokens)
        self.text_ids: list[int] = []
        self.done = False
        self._criteria, self._device = criteria or [], device
        self._scores, self._shown = scores, list[torch.Tensor]()  # those of `text`, as criteria see them
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
            if self._criterion_met() or len(self.text) >= self.max_new_tokens:
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
        scores = None
        if self._scores is not None:
            for thread, index in self.text[len(self._shown) :]:
                own = self._scores[thread][index - thread.num_forced]
                self._shown.append(own.expand(self.batch_size, -1))
            scores = tuple(self._shown)
        verdicts = [torch.as_tensor(criterion(ids, scores)).expand(self.batch_size) for criterion in self._criteria]
        return any(bool(verdict[self.row]) for verdict in verdicts)
