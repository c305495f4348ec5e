"""Tokens that end an answer, held back until it has so many, as a logits processor of transformers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor

from medusa_apar.threads.control_tokens import ControlTokens


class MinTokensLogitsProcessor(LogitsProcessor):
    """Bans tokens on paths that hold fewer than `min_tokens` behind the prompt; `[Fork]` and `[Child]` are not counted.

    Everything on a thread's path is read before what the thread writes next, so that no answer ends before it has so
    many tokens. What stands beside the path is not counted, though it may be read before: its threads may still run.

    Args:
        prompt_length: tokens of the prompt, a batch's padding included.
        end_ids: what is banned.
        in_children: whether they are banned behind a `[Child]` too. An end token is not: a child ends a detail by it,
            and not the answer.
    """

    def __init__(
        self,
        prompt_length: int,
        min_tokens: int,
        end_ids: Sequence[int],
        control: ControlTokens | None = None,
        in_children: bool = False,
    ) -> None:
        if min(prompt_length, min_tokens, *end_ids) < 0:
            raise ValueError(f"{prompt_length=}, {min_tokens=} and {end_ids=} must be 0 or more.")
        self.prompt_length, self.min_tokens, self.end_ids = prompt_length, min_tokens, tuple(end_ids)
        self.control, self.in_children = control, in_children

    def held(self, path: Sequence[int], tokens: Sequence[int] = (), parents: Sequence[int] = ()) -> list[bool]:
        """Whether `end_ids` are banned behind a path, prompt included, and behind each draft node below it.

        tokens, parents: of each draft node, its token and the node above, -1 for the path.
        """
        written = list(path[self.prompt_length :])
        control = () if self.control is None else self.control.ids
        child = None if self.control is None else self.control.child_id
        rows = [(len(path), len(written) - sum(map(written.count, control)), child in written)]
        for token, parent in zip(tokens, parents, strict=True):
            length, count, in_child = rows[1 + parent]
            counted = length >= self.prompt_length
            rows.append(
                (length + 1, count + (counted and token not in control), in_child or (counted and token == child))
            )
        return [count < self.min_tokens and (self.in_children or not in_child) for _, count, in_child in rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`input_ids` long [rows, length], `scores` [rows, vocab]; returns new scores."""
        scores = scores.clone()
        rows = [row for row, path in enumerate(input_ids.tolist()) if self.held(path)[0]]
        for token in self.end_ids if rows else ():
            if token < scores.shape[1]:
                scores[rows, token] = -torch.inf
        return scores
