"""Trie packing: trunk and threads in one row, every token once, attention along paths only.

A token's parent is the token before it on its path, so the parents alone give positions and mask. The trunk goes on
under its `[Fork]` token and so does the child: they are siblings and share position ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from medusa_apar.forest.mask import ForestMask, Group
from medusa_apar.models.chat import rendered

from .corpus import Example
from .rules import Thread

IGNORED = -100  # label of a token whose prediction is not trained; cross_entropy's default
NO_PARENT = -1

TokenThread = tuple[list[int], int, int]  # token ids, parent thread (-1: the trunk), index of its [Fork] in the parent


@dataclass(slots=True)
class PackedRow:
    """N tokens of one or more paragraph trees. Threads are contiguous; a thread's next token is its neighbour."""

    input_ids: torch.Tensor  # [N]
    parents: torch.Tensor  # [N] index of the token before on the path, -1 at a prompt's first token
    position_ids: torch.Tensor  # [N] depth along the path
    thread_ids: torch.Tensor  # [N] distinct for every thread of the row
    trained: torch.Tensor  # [N] bool: the token's prediction is trained
    in_trunk: torch.Tensor  # [N] bool

    def __len__(self) -> int:
        return self.input_ids.numel()

    def to(self, device: torch.device) -> PackedRow:
        return PackedRow(*(getattr(self, name).to(device) for name in self.__slots__))

    def labels(self, ahead: int = 1) -> torch.Tensor:
        """[N] the token `ahead` places further in the same thread; IGNORED beyond its end and where not trained."""
        labels = torch.full_like(self.input_ids, IGNORED)
        if len(self) > ahead:
            usable = self.trained[:-ahead] & (self.thread_ids[:-ahead] == self.thread_ids[ahead:])
            labels[:-ahead] = torch.where(usable, self.input_ids[ahead:], IGNORED)
        return labels


@dataclass(slots=True, frozen=True)
class Tokens:
    """The ids that packing writes by itself."""

    fork: int
    child: int
    eos: int


def tokenize_example(example: Example, tokenizer, tokens: Tokens) -> tuple[list[TokenThread], int]:
    """An example's threads as token lists, the prompt at the head of the trunk, and the prompt's length.

    ValueError where the tokenizer's chat template refuses the prompt.
    """
    prompt = tokenizer(rendered(tokenizer, example.messages), add_special_tokens=False)["input_ids"]
    threads: list[TokenThread] = []
    _tokenize_thread(example.tree, tokenizer, tokens, prompt, NO_PARENT, 0, threads)
    return threads, len(prompt)


def _tokenize_thread(
    thread: Thread, tokenizer, tokens: Tokens, opening: list[int], parent: int, fork: int, threads: list[TokenThread]
) -> None:
    own = len(threads)
    ids = list(opening)
    threads.append((ids, parent, fork))
    children: list[tuple[Thread, int]] = []
    for piece in thread.pieces:
        if isinstance(piece, Thread):
            children.append((piece, len(ids)))
            ids.append(tokens.fork)
        else:
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    ids.append(tokens.eos)
    for child, at in children:
        _tokenize_thread(child, tokenizer, tokens, [tokens.child], own, at, threads)


def pack_threads(threads: Sequence[TokenThread], prompt_length: int = 0) -> PackedRow:
    """One paragraph tree as a row. Parents come before their children; the trunk is thread 0.

    The prompt's own tokens are not trained, but its last one predicts the answer's first. In a child the `[Child]`
    token predicts the first token of the detail, and is itself predicted by nothing.
    """
    starts: list[int] = []
    ids: list[int] = []
    parents: list[int] = []
    owners: list[int] = []
    for index, (tokens, parent, fork) in enumerate(threads):
        if parent >= index or (parent < 0) != (index == 0):
            raise ValueError(f"thread {index} has parent {parent}: parents come first, and only thread 0 has none")
        if parent >= 0 and not 0 <= fork < len(threads[parent][0]):
            raise ValueError(f"thread {index} forks at {fork} of a thread of {len(threads[parent][0])} tokens")
        starts.append(len(ids))
        parents.append(NO_PARENT if parent < 0 else starts[parent] + fork)
        parents += range(len(ids), len(ids) + len(tokens) - 1)
        ids += tokens
        owners += [index] * len(tokens)
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    trained = torch.arange(len(ids)) >= prompt_length - 1
    owner = torch.tensor(owners)
    return PackedRow(torch.tensor(ids), torch.tensor(parents), torch.tensor(depths), owner, trained, owner == 0)


def pack_example(example: Example, tokenizer, tokens: Tokens) -> PackedRow:
    """A corpus example as one row."""
    return pack_threads(*tokenize_example(example, tokenizer, tokens))


def join(rows: Sequence[PackedRow]) -> PackedRow:
    """Several rows as one; their paths stay apart because no parent crosses over."""
    parents, thread_ids = [], []
    tokens = threads = 0
    for row in rows:
        parents.append(torch.where(row.parents < 0, row.parents, row.parents + tokens))
        thread_ids.append(row.thread_ids + threads)
        tokens += len(row)
        threads += int(row.thread_ids.max()) + 1
    return PackedRow(
        torch.cat([row.input_ids for row in rows]),
        torch.cat(parents),
        torch.cat([row.position_ids for row in rows]),
        torch.cat(thread_ids),
        torch.cat([row.trained for row in rows]),
        torch.cat([row.in_trunk for row in rows]),
    )


def path_mask(parents: torch.Tensor) -> torch.Tensor:
    """[N, N] bool: entry (i, j) says that j is i or an ancestor of i.

    Doubling: a row joined with the row of the token 2^k above it covers 2^(k+1) ancestors.
    """
    n = parents.numel()
    nowhere = torch.full((1,), n, dtype=parents.dtype, device=parents.device)
    jump = torch.cat([torch.where(parents < 0, nowhere, parents), nowhere])
    mask = torch.eye(n + 1, dtype=torch.bool, device=parents.device)
    mask[n, n] = False
    while bool((jump < n).any()):
        mask = mask | mask[jump]
        jump = jump[jump]
    return mask[:n, :n]


def attention_mask(parents: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[1, 1, N, N] additive path mask, as transformers' sdpa and eager attention take it."""
    visible = path_mask(parents)
    mask = torch.zeros(visible.shape, dtype=dtype, device=parents.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[None, None]


class PackedForest:
    """A row in the place of an engine's `Forest`, so that training attends as decoding does (`attention.py`)."""

    def __init__(self, row: PackedRow) -> None:
        everything, positions = slice(0, len(row)), row.position_ids
        self._group = Group(everything, everything, path_mask(row.parents), positions[:, None], positions[None])

    def mask(self, mask_function: Callable) -> ForestMask:
        """The path mask, narrowed by a layer's own pattern (a sliding window, say) taken at path positions."""
        group = self._group
        narrowed = group.visible & mask_function(0, 0, group.row_positions, group.column_positions)
        return ForestMask([group], [narrowed])
