"""How often a head's guesses are what the base itself chooses, and the draft tree that follows from it.

At every position of the model's own answers, each head has a rank for the token that the base chose: its place among
the head's guesses. A node of a draft tree is accepted exactly where the ranks begin with the node's path, so the ranks
of all positions say all there is to know about every tree (Medusa, arXiv 2401.10774, section 2.3.3).
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.finetune.packing import IGNORED
from medusa_apar.job import write_text
from medusa_apar.json_files import json_object

from .answers import AnswerFile, Answers, encode, greedy
from .draft_heads import DraftHeads

UNKNOWN = -1  # the rank where the thread has ended, or has left the path the base would have taken
LEAST = 1e-4  # chance of a rank that was never right: config.json keeps four digits, and a tree divides by it
WINDOW = 256  # positions guessed at once: 8 MB of logits per head at 8192 ids
BINS_PER_OCTAVE, OCTAVES = 2, 10  # of claimed probability; what is claimed less falls into the last bin

Table = list[list[float]]  # [heads][ranks]


@dataclass(slots=True)
class Ranks:
    """T positions of many threads, a thread's positions in a row."""

    ranks: np.ndarray  # int [T, heads] place of the base's choice among the guesses, `top_k` if it is none of them
    threads: np.ndarray  # int [T] distinct for every thread
    records: np.ndarray  # int [T] the answer it belongs to
    top_k: int

    def __len__(self) -> int:
        return len(self.ranks)

    def of(self, chosen: np.ndarray) -> Ranks:
        """The positions where `chosen` [T] is true; whole threads, please."""
        return Ranks(self.ranks[chosen], self.threads[chosen], self.records[chosen], self.top_k)

    def halves(self) -> tuple[Ranks, Ranks]:
        """Every other answer. All serve as both where a half has no position at which every head can be counted."""
        odd = np.unique(self.records, return_inverse=True)[1] % 2 == 1
        whole = self.ranks[:, -1] != UNKNOWN
        return (self.of(~odd), self.of(odd)) if whole[odd].any() and whole[~odd].any() else (self, self)


@dataclass(slots=True)
class Reliability:
    """Per head and bin of claimed probability, over guesses whose path so far is right; all [heads, bins]."""

    claimed: np.ndarray  # summed probabilities
    right: np.ndarray  # guesses that were the base's choice
    count: np.ndarray

    @classmethod
    def empty(cls, num_heads: int) -> Reliability:
        return cls(*(np.zeros((num_heads, BINS_PER_OCTAVE * OCTAVES + 1)) for _ in range(3)))

    def add(self, log_probs: np.ndarray, ranks: np.ndarray) -> None:
        """Counts float [T, heads, top_k] claims against int [T, heads] ranks."""
        top_k = log_probs.shape[-1]
        path_right = np.ones(len(ranks), dtype=bool)
        for head in range(ranks.shape[1]):
            known = path_right & (ranks[:, head] != UNKNOWN)
            claims = log_probs[known, head]
            bins = np.minimum(-claims / np.log(2) * BINS_PER_OCTAVE, BINS_PER_OCTAVE * OCTAVES).astype(int).ravel()
            right = (ranks[known, head, None] == np.arange(top_k)).ravel()
            size = self.count.shape[1]
            self.claimed[head] += np.bincount(bins, np.exp(claims).ravel(), size)
            self.right[head] += np.bincount(bins, right, size)
            self.count[head] += np.bincount(bins, minlength=size)
            path_right = known & (ranks[:, head] < top_k)

    def rows(self, head: int) -> list[dict[str, Any]]:
        """Bins that hold guesses: limits of the claim, its mean, the share that was right, how many guesses."""
        found = []
        for bin in np.flatnonzero(self.count[head]):
            count = self.count[head, bin]
            found.append(
                {
                    "from": 2 ** (-(bin + 1) / BINS_PER_OCTAVE) if bin < BINS_PER_OCTAVE * OCTAVES else 0.0,
                    "to": 2 ** (-bin / BINS_PER_OCTAVE),
                    "claimed": self.claimed[head, bin] / count,
                    "right": self.right[head, bin] / count,
                    "count": int(count),
                }
            )
        return found

    def errors(self) -> list[float]:
        """Per head, the gap between claimed and right, mean over guesses (expected calibration error)."""
        gaps: list[float] = (np.abs(self.claimed - self.right).sum(1) / self.count.sum(1).clip(min=1)).tolist()
        return gaps


# ---- measuring


def guess(heads: DraftHeads, hidden: torch.Tensor, drafted: torch.Tensor, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and log-probabilities, both [T, heads, top_k], of guesses whose path is `drafted` [T, heads]."""
    ids, log_probs = heads.guess(hidden, drafted, top_k)
    return ids.cpu().numpy(), log_probs.float().cpu().numpy()


def paths(answers: Answers, chosen: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the base chooses behind every position, `chosen` [T] being its choice at each.

    Returns drafted [T, heads], the tokens t+1 to t+heads that were written, and truth [T, heads], the choice t+2+h that
    head h is to guess, UNKNOWN where the thread is over or what was written is not what the base would have chosen.
    """
    length = len(answers)
    written = torch.where(answers.next_ids == IGNORED, chosen, answers.next_ids)
    drafted = torch.zeros(length, num_heads, dtype=torch.long)
    truth = torch.full((length, num_heads), UNKNOWN)
    known = written == chosen
    for head in range(num_heads):
        ahead = head + 1
        drafted[: max(0, length - head), head] = written[head:]
        if ahead >= length:
            break
        same_thread = answers.threads[:-ahead] == answers.threads[ahead:]
        truth[:-ahead, head] = torch.where(known[:-ahead] & same_thread, chosen[ahead:], UNKNOWN)
        known[:-ahead] &= same_thread & (written[ahead:] == chosen[ahead:])
        known[-ahead:] = False
    return drafted, truth


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    heads: DraftHeads,
    file: AnswerFile,
    eos_ids: list[int],
    top_k: int,
    advance: Callable[[], None] = lambda: None,
) -> tuple[Ranks, Reliability, float]:
    """Runs the model over its answers, one after the other; `advance` is called after each.

    Returns the ranks, the reliability of the heads' claims, and the share of written tokens that are the base's own
    choice (1 but for rounding, if the answers are the model's). ValueError where no head has anything to guess.
    """
    parts: list[Ranks] = []
    reliability = Reliability.empty(heads.num_heads)
    own = written = threads = 0
    for record in range(len(file.records)):
        answers = encode(model, file, record, eos_ids, heads.aux_layers)
        advance()
        if not len(answers):
            continue
        chosen = greedy(model, file, answers)
        known = answers.next_ids != IGNORED
        own, written = own + int((answers.next_ids == chosen)[known].sum()), written + int(known.sum())
        drafted, truth = paths(answers, chosen, heads.num_heads)
        ranks = np.full(truth.shape, UNKNOWN)
        for start in range(0, len(answers), WINDOW):
            part = slice(start, start + WINDOW)
            hidden, before = answers.hidden[part].to(model.device), drafted[part].to(model.device)
            ids, log_probs = guess(heads, hidden, before, top_k)
            true = truth[part].numpy()
            hits = ids == true[..., None]
            place = np.where(hits.any(-1), hits.argmax(-1), top_k)
            ranks[part] = np.where(true == UNKNOWN, UNKNOWN, place)
            reliability.add(log_probs, ranks[part])
        # The threads of a record are numbered from 0 each time.
        parts.append(Ranks(ranks, answers.threads.numpy() + threads, answers.records.numpy(), top_k))
        threads = int(parts[-1].threads.max()) + 1
    if not parts or not any((part.ranks[:, -1] != UNKNOWN).any() for part in parts):
        raise ValueError(
            f"the answers are too short for {heads.num_heads} heads: no thread has {heads.num_heads + 1} tokens that "
            "the model itself would write"
        )
    ranks, threads_, records = (np.concatenate([getattr(p, n) for p in parts]) for n in ("ranks", "threads", "records"))
    return Ranks(ranks, threads_, records, top_k), reliability, own / max(written, 1)


# ---- what follows from it


def acceptance(ranks: Ranks, conditional: bool = True) -> tuple[Table, list[int]]:
    """Share of positions where a head's guess of each rank is right [heads][top_k], and of how many positions [heads].

    conditional: only positions where all earlier heads had the base's choice among their guesses, which is where a
        tree has a node to hang the guess at. Where there is no such position, the share of all positions stands.
    """
    shares, counts = [], []
    path_right = np.ones(len(ranks), dtype=bool)
    for head in range(ranks.ranks.shape[1]):
        column = ranks.ranks[:, head]
        known = (column != UNKNOWN) & path_right
        if not known.any():
            known = column != UNKNOWN
        hits = np.bincount(column[known], minlength=ranks.top_k + 1)[: ranks.top_k]
        shares.append((hits / max(1, known.sum())).tolist())
        counts.append(int(known.sum()))
        if conditional:
            path_right = known & (column < ranks.top_k)
    return shares, counts


def positive(table: Table) -> Table:
    """Four digits as config.json keeps them, none of them zero."""
    return [[round(max(share, LEAST), 4) for share in ranks] for ranks in table]


def accepted(ranks: Ranks, tree: DraftTree) -> np.ndarray:
    """int [T, n]: how many of the tree's first 1 to n nodes are accepted at each position; at most its depth."""
    matched = np.zeros((len(ranks), len(tree)), dtype=bool)
    for node, (parent, depth, rank) in enumerate(zip(tree.parents, tree.depths, tree.ranks, strict=True)):
        matched[:, node] = ranks.ranks[:, depth] == rank
        if parent >= 0:
            matched[:, node] &= matched[:, parent]
    return matched.cumsum(1)


def products(tree: DraftTree, table: Table) -> list[float]:
    """Each node's chance if heads were independent: its guess's share times its parent's chance."""
    chances: list[float] = []
    for parent, depth, rank in zip(tree.parents, tree.depths, tree.ranks, strict=True):
        chances.append(table[depth][rank] * (chances[parent] if parent >= 0 else 1.0))
    return chances


def expected_tokens(tree: DraftTree, table: Table) -> list[float]:
    """Tokens a thread gains in a step with the tree's first 1 to n nodes: the base's own, and each node's chance."""
    tokens: list[float] = (1 + np.cumsum(products(tree, table))).tolist()
    return tokens


def measured_tokens(ranks: Ranks, tree: DraftTree) -> list[float]:
    """The same counted over all positions that are not too near to their thread's end for the deepest head."""
    whole = ranks.ranks[:, -1] != UNKNOWN
    tokens: list[float] = (1 + accepted(ranks, tree)[whole].mean(0)).tolist()
    return tokens


def simulated_tokens(ranks: Ranks, tree: DraftTree) -> list[float]:
    """The same by going through every thread as the engine does, from where one step's tokens end to the next.

    Steps begin more often where guesses fail, and a thread's end cuts its last one short. The step that feeds a
    thread's prompt has no drafts and is not counted.
    """
    gained = 1 + accepted(ranks, tree)
    starts = np.flatnonzero(np.diff(ranks.threads, prepend=-1))
    stops = [*starts[1:], len(ranks)]
    tokens = sum(stop - start - 1 for start, stop in zip(starts, stops, strict=True))
    found = []
    for size in range(len(tree)):
        steps, gain = 0, gained[:, size].tolist()
        for start, stop in zip(starts.tolist(), stops, strict=True):
            place = start
            while place < stop - 1:
                place += gain[place]
                steps += 1
        found.append(float(tokens / max(steps, 1)))
    return found


def joint_tree(ranks: Ranks, size: int) -> DraftTree:
    """The tree of the `size` paths that were most often right, no independence assumed.

    A path counts as often as it was right where its last token could be known at all.
    """
    rows = ranks.ranks.tolist()
    right: Counter[tuple[int, ...]] = Counter()
    known: Counter[tuple[int, ...]] = Counter()  # by parent: positions where the next head's token is known
    for row in rows:
        for depth, rank in enumerate(row):
            if rank == UNKNOWN:
                break
            known[tuple(row[:depth])] += 1
            if rank >= ranks.top_k:
                break
            right[tuple(row[: depth + 1])] += 1
    below: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for path in right:
        below.setdefault(path[:-1], []).append(path)
    choices: list[tuple[int, ...]] = []
    frontier: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]
    while frontier and len(choices) < size:
        chance, path = heapq.heappop(frontier)
        if path:
            choices.append(path)
        for child in below.get(path, []):
            heapq.heappush(frontier, (chance * right[child] / known[path], child))
    return DraftTree(choices)


def report(ranks: Ranks, reliability: Reliability, nodes: int) -> dict[str, Any]:
    """What report.json says of the heads; trees are chosen on one half of the answers and measured on the other.

    The lists under `tokens` have an entry per node count from 1.
    """
    table, counts = acceptance(ranks)
    marginal, marginal_counts = acceptance(ranks, conditional=False)
    choosing, other = ranks.halves()
    chosen = positive(acceptance(choosing)[0])
    tree, joint = DraftTree.likeliest(nodes, chosen), joint_tree(choosing, nodes)
    whole = other.ranks[:, -1] != UNKNOWN
    hits = np.diff(accepted(other, tree)[whole], axis=1, prepend=0).mean(0)
    chances = products(tree, chosen)
    final = positive(table)
    return {
        "positions": len(ranks),
        "answers": len(np.unique(ranks.records)),
        "acceptance": final,
        "acceptance_positions": counts,
        "marginal": marginal,
        "marginal_positions": marginal_counts,
        "reliability": [reliability.rows(head) for head in range(len(table))],
        "calibration_error": reliability.errors(),
        "tokens": {
            "expected": expected_tokens(tree, chosen),
            "measured": measured_tokens(other, tree),
            "simulated": simulated_tokens(other, tree),
            "joint_measured": measured_tokens(other, joint),
            "joint_simulated": simulated_tokens(other, joint),
        },
        "nodes": [
            {"path": list(path), "product": chance, "measured": float(hit)}
            for path, chance, hit in zip(tree.choices, chances, hits, strict=True)
        ],
        "node_error": float(np.abs(np.array(chances) - hits).mean()),
        "tree": [list(path) for path in DraftTree.likeliest(nodes, final).choices],
        "joint_tree": [list(path) for path in joint_tree(ranks, nodes).choices],
    }


def write_acceptance(folder: Path, table: Table) -> None:
    """Puts the table into the heads' config.json, from where `attach` makes the draft tree."""
    path = folder / "config.json"
    config = json_object(path) if path.exists() else {}
    write_text(path, json.dumps(config | {"acceptance": positive(table)}, indent=2) + "\n")
