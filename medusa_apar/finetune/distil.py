"""Distillation from the untuned base: the tuned model writes as the base would, but for where it forks.

The base knows no control tokens, so it reads every path without them. What it says at a token is the teacher's word
there; at `[Child]`, the word of the token before the `[Fork]`, after which the detail would have begun in line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .packing import NO_PARENT, PackedRow, Tokens, path_mask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class PlainRow:
    """A row of N tokens as the base reads it."""

    row: PackedRow  # without the control tokens
    places: Tensor  # long [N] for each token of the whole row: whose prediction of the plain row is the teacher's


def without_control(row: PackedRow, tokens: Tokens) -> PlainRow:
    """ValueError where a path begins with a control token, of which the base could say nothing."""
    control = (row.input_ids == tokens.fork) | (row.input_ids == tokens.child)
    heard = torch.arange(len(row), device=row.input_ids.device)
    while bool((beyond := control[heard]).any()):
        heard = torch.where(beyond, row.parents[heard], heard)
        if bool((heard < 0).any()):
            raise ValueError("a prompt begins with [Fork] or [Child], which only an answer may have.")
    kept = ~control
    index = kept.cumsum(0) - 1
    parents = torch.where(row.parents < 0, NO_PARENT, index[heard[row.parents.clamp(min=0)]])
    depths = row.position_ids - (path_mask(row.parents) & control).sum(1)
    return PlainRow(
        PackedRow(
            row.input_ids[kept],
            parents[kept],
            depths[kept],
            row.thread_ids[kept],
            row.trained[kept],
            row.in_trunk[kept],
            row.avoided[kept],
        ),
        index[heard],
    )


def taught(ids: Tensor, labels: Tensor, tokens: Tokens) -> Tensor:
    """bool [L]: the labels that the base could have written behind their tokens, both long [L].

    A fork it could not, nor what the trunk goes on with behind one: there the base would write the detail.
    """
    return (labels != tokens.fork) & (ids != tokens.fork)


def divergence(student: Tensor, teacher: Tensor, in_trunk: Tensor, tokens: Tokens, ends: Tensor) -> Tensor:
    """[D] Kullback-Leibler divergence of the student's distribution from the teacher's, both logits [D, vocabulary].

    in_trunk: bool [D]. ends: long [E], the tokens with which the base would go on to the next item. Neither
    distribution has the control tokens, nor, in a thread, an end: that a detail ends its thread is the corpus's to say.
    """
    left_out = torch.zeros_like(student, dtype=torch.bool)
    left_out[:, [tokens.fork, tokens.child]] = True
    left_out[:, ends] |= ~in_trunk[:, None]
    lowest = torch.finfo(student.dtype).min
    ours, theirs = (logits.masked_fill(left_out, lowest).log_softmax(-1) for logits in (student, teacher))
    return (theirs.exp() * (theirs - ours)).masked_fill(left_out, 0.0).sum(-1)


def ending_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> Tensor:
    """long [E]: the end of the text, and every token with a line break in it."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    breaks = {token for token, text in enumerate(texts) if "\n" in text}
    return torch.tensor(sorted(breaks | {tokens.eos}))
