"""What draft heads would have done for answers that are already there, without decoding them again.

Speculation never changes a thread's tokens (CONTRIBUTING, promise 1), so an answer decoded without heads tells
everything about decoding it with them: the base reads it once, the heads propose from the states of each step's root,
and what they guessed right is seen in the answer. In float32 the steps come out as the engine takes them (states are
kept in float16, so two guesses that are all but equally likely may change places), at a fraction of its cost: the
nodes of the draft trees never run through the base. The engine gives every root the same tree; `Drafting.nodes` asks
what choosing nodes root by root would bring.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.drafting.drafter import Drafter
from medusa_apar.finetune.packing import IGNORED
from medusa_apar.heads.answers import AnswerFile, Answers, encode
from medusa_apar.heads.draft_heads import DraftHeads

NOTHING = -1  # no token: what no guess equals
Record = dict[str, Any]  # prompt_ids, and threads with parent, fork_index and token_ids, as `heads.ask` writes them


@dataclass(slots=True)
class Drafting:
    """A draft tree for every root: always the same one, or the likeliest nodes of a larger one.

    nodes: how many of the candidates are kept at each root, by the chance the heads give to the path down to a node
        (EAGLE-2, arXiv 2406.16858); None keeps them all.
    """

    tree: DraftTree
    nodes: int | None = None

    def propose(self, drafter: Drafter, hidden: Tensor, roots: Tensor) -> tuple[Tensor, Tensor]:
        """Below each of T roots: token ids of the candidates, and bool which of them are nodes, both [T, n]."""
        token_ids, log_probs = drafter.propose(hidden, roots, self.tree)
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
    """One answer's steps; the names are those of `answering.StepCounter`."""

    steps: int
    thread_steps: int
    gained: int


def as_answer(prompt_ids: list[int], threads: Sequence[Record], child_id: int) -> Record:
    """`eval.answering`'s threads, which hold their own tokens only, as `heads.ask` writes them."""
    trunk, *children = threads
    found = [{"parent": -1, "fork_index": -1, "token_ids": trunk["token_ids"]}]
    for child in children:
        fork_index = child["fork_index"] + (child["parent"] > 0)  # behind the parent's own [Child]
        token_ids = [child_id, *child["token_ids"]]
        found.append({"parent": child["parent"], "fork_index": fork_index, "token_ids": token_ids})
    return {"prompt_ids": prompt_ids, "threads": found}


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
    parts = [encode(heads.base, AnswerFile([record]), 0, eos_ids, heads.aux_layers) for record in records]
    counts = [len(record["threads"]) for record in records]
    for part, before in zip(parts, itertools.accumulate(counts, initial=0), strict=False):
        part.threads += before
    written = [len(t["token_ids"]) - (place > 0) for record in records for place, t in enumerate(record["threads"])]
    times = iter(_thread_times(heads, Answers.join(parts), written, drafting))
    found = []
    for record, count, limit in zip(records, counts, limits, strict=True):
        own = list(itertools.islice(times, count))
        steps = _request_steps(record, own, limit, set(eos_ids), control)
        found.append(Replayed(steps, sum(thread[-1] for thread in own if thread), sum(map(len, own))))
    return found


def _thread_times(heads: DraftHeads, answers: Answers, counts: list[int], drafting: Drafting) -> list[list[int]]:
    """Per thread of `counts` tokens, the thread's own step (from 1) in which it got each of its tokens.

    All threads go on side by side, so that the heads' weights are read once a step for all of them.
    """
    device, drafter = heads.base.device, heads.drafter()
    starts = (answers.threads.diff(prepend=answers.threads[:1] - 1) != 0).nonzero()[:, 0]
    known = answers.next_ids != IGNORED
    assert len(starts) == len(counts), "a thread has no position that predicts its first token"
    lengths = torch.stack([part.sum() for part in known.tensor_split(starts[1:])])
    assert lengths.tolist() == counts, "a thread's tokens are not all predicted: does its prompt end with an end token?"
    depth = drafting.tree.num_heads
    tokens = torch.cat([torch.where(known, answers.next_ids, NOTHING), torch.full((depth + 1,), NOTHING)])
    times = [[1] if length else [] for length in lengths.tolist()]
    place = torch.zeros_like(starts)  # of each thread's last token
    step = 1
    while len(active := (place < lengths - 1).nonzero()[:, 0]):
        step += 1
        at = starts[active] + place[active]
        guessed, kept = drafting.propose(drafter, answers.hidden[at].to(device, heads.dtype), tokens[at].to(device))
        places = torch.arange(1, depth + 2)
        # Behind a thread's end lies another thread: nothing there is this one's.
        beyond = place[active, None] + places >= lengths[active, None]
        right = _matched(
            drafting.tree, guessed.cpu(), kept.cpu(), tokens[at[:, None] + places].masked_fill(beyond, NOTHING)
        )
        gain = torch.minimum(1 + right, lengths[active] - 1 - place[active])
        place[active] += gain
        for thread, count in zip(active.tolist(), gain.tolist(), strict=True):
            times[thread] += [step] * count
    return times


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
