"""What draft heads would have done for answers that are already there, without decoding them again.

Speculation never changes a thread's tokens (DESIGN.md, promise 1), so an answer decoded without heads tells everything
about decoding it with them: the base reads it once, the heads propose from the states of each step's root, and what
they guessed right is seen in the answer. The steps come out as the decoder would have taken them, at a fraction of its
cost: the nodes of the draft trees never run through the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medusa_apar.draft_tree import DraftTree
from medusa_apar.finetune.packing import IGNORED
from medusa_apar.heads.answers import AnswerFile, Answers, encode
from medusa_apar.heads.draft_heads import DraftHeads

Record = dict[str, Any]  # prompt_ids, and threads with parent, fork_index and token_ids, as `heads.ask` writes them


@dataclass(slots=True)
class Drafting:
    """A draft tree for every root: always the same one, or the likeliest nodes of a larger one.

    nodes: how many of the candidates are kept at each root, by the chance the heads give to the path down to a node
        (EAGLE-2, arXiv 2406.16858); None keeps them all.
    """

    tree: DraftTree
    nodes: int | None = None

    def propose(self, heads: DraftHeads, hidden: Tensor, roots: Tensor) -> tuple[Tensor, Tensor]:
        """Below each of T roots: token ids of the candidates, and bool which of them are nodes, both [T, n]."""
        token_ids, log_probs = heads.propose(hidden, roots, self.tree)
        if self.nodes is None or self.nodes >= len(self.tree):
            return token_ids, torch.ones_like(token_ids, dtype=torch.bool)
        chances = path_log_probs(self.tree, log_probs)
        kept = torch.zeros_like(token_ids, dtype=torch.bool)
        # A path is never likelier than its beginning, and ties go to the lower index: a kept node's parent is kept.
        order = chances.sort(dim=1, descending=True, stable=True).indices
        return token_ids, kept.scatter_(1, order[:, : self.nodes], True)


def path_log_probs(tree: DraftTree, log_probs: Tensor) -> Tensor:
    """[T, n] log-probabilities given the parent -> of the whole path from the root down to each node."""
    chances = log_probs.clone()
    for node, parent in enumerate(tree.parents.tolist()):
        if parent >= 0:
            chances[:, node] += chances[:, parent]
    return chances


@dataclass(slots=True)
class Replayed:
    """One answer's steps; the names are those of `weights.StepCounter`."""

    steps: int
    thread_steps: int
    gained: int


@torch.no_grad()
def replay(
    heads: DraftHeads,
    records: Sequence[Record],
    drafting: Drafting,
    eos_ids: list[int],
    limits: Sequence[int],
    control: frozenset[int] = frozenset(),
) -> list[Replayed]:
    """The steps of answers whose first so many visible tokens were asked for.

    limits: per record, tokens of the reading order (`max_new_tokens`).
    control: ids of the control tokens, which are not part of the text.
    A record must hold every thread as far as the limit shows it. What an accepted guess brings beyond the end of a
    record's thread is not known and not counted.
    """
    found = []
    for record, limit in zip(records, limits, strict=True):
        file = AnswerFile([record])
        answers = encode(heads.base, file, 0, eos_ids, heads.taps)
        times, gained, steps = _thread_times(heads, answers, drafting)
        found.append(Replayed(_request_steps(record, times, limit, set(eos_ids), control), steps, gained))
    return found


def _thread_times(heads: DraftHeads, answers: Answers, drafting: Drafting) -> tuple[list[list[int]], int, int]:
    """Per thread, the thread's own step (from 1) in which it got each of its tokens; tokens gained and steps in all."""
    device = heads.base.device
    starts = (answers.threads.diff(prepend=answers.threads[:1] - 1) != 0).nonzero()[:, 0]
    stops = torch.cat([starts[1:], torch.tensor([len(answers)])])
    known = answers.next_ids != IGNORED
    lengths = torch.stack([known[start:stop].sum() for start, stop in zip(starts, stops, strict=True)])
    depth = drafting.tree.num_heads
    tokens = torch.cat([torch.where(known, answers.next_ids, -1), torch.full((depth + 1,), -1)])
    times = [[1] if length else [] for length in lengths.tolist()]
    place = torch.zeros_like(starts)  # of each thread's last token
    step, gained, steps = 1, sum(map(len, times)), sum(map(len, times))
    while len(active := (place < lengths - 1).nonzero()[:, 0]):
        step += 1
        at = starts[active] + place[active]
        guessed, kept = drafting.propose(heads, answers.hidden[at].to(device, heads.dtype), tokens[at].to(device))
        ahead = tokens[at[:, None] + torch.arange(1, depth + 2)]  # [T, depth + 1]
        # Behind a thread's end lies another thread: nothing there is this one's.
        beyond = place[active, None] + torch.arange(1, depth + 2) >= lengths[active, None]
        right = _matched(drafting.tree, guessed.cpu(), kept.cpu(), ahead.masked_fill(beyond, -1))
        gain = torch.minimum(1 + right, lengths[active] - 1 - place[active])
        place[active] += gain
        for thread, count in zip(active.tolist(), gain.tolist(), strict=True):
            times[thread] += [step] * count
        gained, steps = gained + int(gain.sum()), steps + len(active)
    return times, gained, steps


def _matched(tree: DraftTree, guessed: Tensor, kept: Tensor, ahead: Tensor) -> Tensor:
    """[T] how many nodes are what the thread went on with."""
    right = kept & (guessed == ahead[:, torch.from_numpy(tree.depths)])
    for node, parent in enumerate(tree.parents.tolist()):
        if parent >= 0:
            right[:, node] &= right[:, parent]
    return right.sum(1)


def _request_steps(record: Record, times: list[list[int]], limit: int, eos: set[int], control: frozenset[int]) -> int:
    """The step in which the first `limit` visible tokens of the reading order, or all of them, are there.

    A child's first step is the one after its `[Fork]` was accepted.
    """
    threads = record["threads"]
    begun = [0] * len(threads)  # request's step before a thread's first
    children: list[list[int]] = [[] for _ in threads]
    for index, thread in enumerate(threads[1:], 1):
        parent, forced = thread["parent"], int(thread["parent"] > 0)
        children[parent].append(index)
        begun[index] = begun[parent] + times[parent][thread["fork_index"] - forced]

    def walk(index: int) -> Iterator[tuple[int, bool]]:
        """(step, whether it shows) of a thread's tokens and those below it, as they are read."""
        forced, below = int(index > 0), iter(children[index])
        child = next(below, None)
        for place, token in enumerate(threads[index]["token_ids"][forced:]):
            yield begun[index] + times[index][place], token not in control and not (index and token in eos)
            if child is not None and threads[child]["fork_index"] == place + forced:
                yield from walk(child)
                child = next(below, None)

    last = shown = 0
    for step, shows in walk(0):
        last = max(last, step)
        shown += shows
        if shown == limit:
            break
    return last
