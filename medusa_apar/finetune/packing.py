"""Trie packing: trunk and threads in one row, every token once, attention along paths only.

A token's parent is the token before it on its path, so the parents alone give positions and mask. The trunk goes on
under its `[Fork]` token and so does the child: they are siblings and share position ids.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from medusa_apar.forest.mask import ForestMask, Group
from medusa_apar.models.chat import rendered

from .corpus import Example
from .rules import Thread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    avoided: torch.Tensor  # [N] bool: what follows the token is to become unlikely (`repeats.py`)

    def __len__(self) -> int:
        return self.input_ids.numel()

    def to(self, device: torch.device) -> PackedRow:
        return PackedRow(*(getattr(self, name).to(device) for name in self.__slots__))

    def labels(self, ahead: int = 1, of: torch.Tensor | None = None) -> torch.Tensor:
        """[N] the token `ahead` places further in the same thread; IGNORED beyond its end and where `of` is False.

        of: bool [N]; None: what is trained.
        """
        labels = torch.full_like(self.input_ids, IGNORED)
        if len(self) > ahead:
            chosen = (self.trained if of is None else of)[:-ahead]
            usable = chosen & (self.thread_ids[:-ahead] == self.thread_ids[ahead:])
            labels[:-ahead] = torch.where(usable, self.input_ids[ahead:], IGNORED)
        return labels


@dataclass(slots=True, frozen=True)
class Tokens:
    """The ids that packing writes by itself."""

    fork: int
    child: int
    eos: int


class TokenTree(NamedTuple):
    """An example's threads as token lists, the prompt at the head of the trunk."""

    threads: list[TokenThread]
    prompt_length: int
    in_line: list[tuple[int, int]]  # (thread, index) of the first token of each detail that was written in line


Forks = Callable[[Thread], bool]  # whether a detail is a thread of its own; else it is written in line


def tokenize_example(
    example: Example, tokenizer: PreTrainedTokenizerBase, tokens: Tokens, forks: Forks | None = None
) -> TokenTree:
    """An example's threads; `forks` None forks every detail.

    ValueError where the tokenizer's chat template refuses the prompt.
    """
    prompt = tokenizer(rendered(tokenizer, example.messages), add_special_tokens=False)["input_ids"]
    writer = _Writer(tokenizer, tokens, forks or (lambda detail: True))
    writer.thread(example.tree, prompt, NO_PARENT, 0)
    return TokenTree(writer.threads, len(prompt), writer.in_line)


class _Writer:
    """Writes paragraph trees as token lists. Pieces are tokenized apart, as a seam in decoding lies between tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: Tokens, forks: Forks) -> None:
        self._tokenizer, self._tokens, self._forks = tokenizer, tokens, forks
        self.threads: list[TokenThread] = []
        self.in_line: list[tuple[int, int]] = []

    def thread(self, thread: Thread, opening: list[int], parent: int, fork: int) -> None:
        own, ids = len(self.threads), list(opening)
        self.threads.append((ids, parent, fork))
        children: list[tuple[Thread, int]] = []
        self._pieces(thread, own, ids, children)
        ids.append(self._tokens.eos)
        for child, at in children:
            self.thread(child, [self._tokens.child], own, at)

    def _pieces(self, thread: Thread, own: int, ids: list[int], children: list[tuple[Thread, int]]) -> None:
        for piece in thread.pieces:
            if isinstance(piece, str):
                ids += self._tokenizer(piece, add_special_tokens=False)["input_ids"]
            elif self._forks(piece):
                children.append((piece, len(ids)))
                ids.append(self._tokens.fork)
            else:
                self.in_line.append((own, len(ids)))
                self._pieces(piece, own, ids, children)


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
    avoided = torch.zeros(len(ids), dtype=torch.bool)
    return PackedRow(
        torch.tensor(ids), torch.tensor(parents), torch.tensor(depths), owner, trained, owner == 0, avoided
    )


def pack_example(
    example: Example, tokenizer: PreTrainedTokenizerBase, tokens: Tokens, forks: Forks | None = None
) -> PackedRow:
    """A corpus example as one row.

    What comes before a detail written in line could have been followed by `[Fork]` as well. Its prediction is not
    trained: the text must not tell the model that forking is wrong there.
    """
    tree = tokenize_example(example, tokenizer, tokens, forks)
    row = pack_threads(tree.threads, tree.prompt_length)
    return untrained_before(row, tree.threads, tree.in_line)


def untrained_before(row: PackedRow, threads: Sequence[TokenThread], places: Sequence[tuple[int, int]]) -> PackedRow:
    """The row of these threads, without training the predictions of the tokens at (thread, index)."""
    if not places:
        return row
    trained = row.trained.clone()
    trained[row_index(threads, [(thread, index - 1) for thread, index in places])] = False
    return replace(row, trained=trained)


def row_index(threads: Sequence[TokenThread], places: Sequence[tuple[int, int]]) -> torch.Tensor:
    """long [P]: where `pack_threads` puts the tokens at (thread, index)."""
    starts = [0, *itertools.accumulate(len(ids) for ids, _, _ in threads)]
    return torch.tensor([starts[thread] + index for thread, index in places], dtype=torch.long)


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
        torch.cat([row.avoided for row in rows]),
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
    """A row in the place of an engine's `Forest`, so that training attends as decoding does (`attention.py`).

    Each tree of a joined row is a group of its own: no tree pays for another's tokens.
    """

    def __init__(self, row: PackedRow) -> None:
        roots = (row.parents == NO_PARENT).nonzero()[:, 0].tolist()
        self._groups = [_group(row, start, stop) for start, stop in itertools.pairwise([*roots, len(row)])]

    def mask(self, mask_function: Callable) -> ForestMask:
        """The path mask, narrowed by a layer's own pattern (a sliding window, say) taken at path positions."""
        return ForestMask(
            self._groups,
            [
                group.visible & mask_function(0, 0, group.row_positions, group.column_positions)
                for group in self._groups
            ],
        )


def _group(row: PackedRow, start: int, stop: int) -> Group:
    """A tree that takes up so much of a row."""
    parents, positions = row.parents[start:stop], row.position_ids[start:stop]
    own = torch.where(parents < 0, parents, parents - start)
    return Group(slice(start, stop), slice(start, stop), path_mask(own), positions[:, None], positions[None])
