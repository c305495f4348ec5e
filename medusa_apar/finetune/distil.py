"""Distillation from the untuned base: the tuned model writes as the base would, but for where it forks.

The base knows no control tokens, so it reads every path without them. What it says at a token is the teacher's word
there; at `[Child]`, the word of the token before the `[Fork]`, after which the detail would have begun in line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medusa_apar.models.families import end_tokens

from .packing import NO_PARENT, PackedRow, Tokens

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS = 64  # of logits that are worked on at a time


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
    depths = row.position_ids - _on_path(row.parents, control)
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


def _on_path(parents: Tensor, chosen: Tensor) -> Tensor:
    """long [N]: how many tokens of each path are `chosen`, itself included; by doubling, as `path_mask` does it."""
    n = len(parents)
    end = parents.new_full((1,), n)
    jump = torch.cat([torch.where(parents < 0, end, parents), end])
    count = torch.cat([chosen.long(), chosen.new_zeros(1).long()])
    while bool((jump < n).any()):
        count, jump = count + count[jump], jump[jump]
    return count[:n]


def taught(ids: Tensor, labels: Tensor, tokens: Tokens) -> Tensor:
    """bool [L]: the labels that the base could have written behind their tokens, both long [L].

    A fork it could not, nor what the trunk goes on with behind one: there the base would write the detail.
    """
    return (labels != tokens.fork) & (ids != tokens.fork)


def divergence(student: Tensor, teacher: Tensor, in_trunk: Tensor, tokens: Tokens, ends: Tensor) -> Tensor:
    """[D] sum over the vocabulary of p log(p / q), where p is the teacher's distribution and q the student's.

    student, teacher: logits [D, vocabulary]. in_trunk: bool [D]. ends: long [E], the tokens with which the base would
    go on to the next item. Neither distribution has the control tokens, nor, in a thread, an end: that a detail ends
    its thread is the corpus's to say. Only the student's logits have a gradient.
    """
    left_out = torch.zeros_like(student, dtype=torch.bool)
    left_out[:, [tokens.fork, tokens.child]] = True
    left_out[:, ends] |= ~in_trunk[:, None]
    found: Tensor = _Divergence.apply(student, teacher, left_out)
    return found


class _Divergence(torch.autograd.Function):
    """Keeps q - p, which is its gradient, and works on a few rows at a time: a vocabulary may have 260,000 tokens."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, left_out: Tensor) -> Tensor:
        gradient, found = torch.empty_like(student), student.new_empty(len(student))
        lowest = torch.finfo(student.dtype).min
        for start in range(0, len(student), ROWS):
            rows = slice(start, start + ROWS)
            ours, theirs = (
                logits[rows].masked_fill(left_out[rows], lowest).log_softmax(-1) for logits in (student, teacher)
            )
            p = theirs.exp()
            found[rows] = (p * (theirs - ours)).masked_fill_(left_out[rows], 0.0).sum(-1)
            gradient[rows] = ours.exp_().sub_(p)
        ctx.save_for_backward(gradient)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (own,) = ctx.saved_tensors
        return own * gradients[0][:, None], None, None


def ending_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, tokens: Tokens) -> Tensor:
    """long [E]: every end that the model or its tokenizer names, and every token with a line break in it."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    breaks = {token for token, text in enumerate(texts) if "\n" in text}
    return torch.tensor(sorted(breaks | {tokens.eos, *end_tokens(model.generation_config)}))


def check_teaches(tuned: PeftModel) -> None:
    """ValueError where an adapter changes more than LoRA's products, so that its base is not the untuned one."""
    config: Any = tuned.peft_config["default"]
    for name in ("modules_to_save", "target_parameters"):
        if getattr(config, name, None):
            raise ValueError(f"the adapter has {name}, so that its base cannot teach it: leave --distil out.")
    if getattr(config, "bias", "none") != "none":
        raise ValueError("the adapter trains biases, so that its base cannot teach it: leave --distil out.")
