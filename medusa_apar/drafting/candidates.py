"""What could hang below a thread's root: the heads' drafts and n-gram matches, with a chance for each node.

Chances are measured while an answer is written. The heads' own probabilities are corrected by how often they came true
(`Calibration`). Where the same tokens were written before, the next token is the one that followed then, with a chance
that grows with the length of the match (`MatchAcceptance`); otherwise it is what the heads say. So the two sources are
mixed: a token that both propose is likelier, and where they disagree the probability is divided between them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from medusa_apar.threads.fork_rule import ForkRule

from .draft_tree import DraftTree
from .ngram_index import MAX_MATCH, MAX_RECALLED, NgramMatch

# Chance that the token which followed a match of so many tokens follows again, beside the heads' own chance for it:
# about what 59 answers of the tuned SmolLM2 showed, counted as so many observations each.
_MATCH_ACCEPTANCE = (0.0, 0.25, 0.35, 0.45, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.85, 0.9)
# The same beside recycled tokens, which know most of it: 30 answers, 2,882 recalled tokens.
_BESIDE_RECYCLED = (0.0, 0.1, 0.2, 0.25, 0.35, 0.5, 0.55, 0.55, 0.6, 0.6, 0.6, 0.65, 0.9)
_MATCH_WEIGHT = 20.0
MAX_DEPTH = MAX_RECALLED  # of nodes that do not hang in the heads' tree
_TINY = 1e-9
_BINS, _BINS_PER_OCTAVE = 16, 2  # of what heads claim
_HEADS_WEIGHT = 10.0  # observations for which a claim stands before any came in
Source = Literal["heads", "ngrams", "recycled"]


@dataclass(slots=True)
class Proposal:
    """Candidates for one thread's draft tree, parents before children; n nodes.

    tokens: int64 [n]. parents: int64 [n], -1 below the root. chances: float64 [n], of being accepted.
    heads: the first so many are the heads' drafts. head_probs: float64 [heads], the heads' own probability of each,
        given its parent.
    chain: the nodes of what was recalled, from the top; matches: tokens that matched before each;
        chain_head_probs: the heads' own probability of each, given its parent.
    forks: node of a `[Fork]` -> node of the `[Child]` below it; these are the last.
    recycled: so many before those are recycled tokens that nobody else proposes. claims: by node, what recycled tokens
        claim, and the heads beside them: a calibration of `RecycledScorer`, and the chance given the parent.
    from_heads: bool [nodes but for the `[Child]`s], what would not be there without the heads; None: the heads' drafts
        that are not of the chain.
    """

    tokens: np.ndarray
    parents: np.ndarray
    chances: np.ndarray
    heads: int = 0
    head_probs: np.ndarray | None = None
    chain: list[int] = field(default_factory=list)
    matches: list[int] = field(default_factory=list)
    chain_head_probs: list[float] = field(default_factory=list)
    forks: dict[int, int] = field(default_factory=dict)
    recycled: int = 0
    claims: dict[int, tuple[int, float]] = field(default_factory=dict)
    from_heads: np.ndarray | None = None

    def sources(self, nodes: np.ndarray) -> dict[Source, int]:
        """How many of these nodes each source proposes, in their order; what several do counts for the first.

        nodes: int64, ascending, `[Child]`s not among them.
        """
        bounds = [self.heads, len(self.tokens) - len(self.forks) - self.recycled]
        heads, others = np.searchsorted(nodes, bounds).tolist()
        return {"heads": heads, "ngrams": others - heads, "recycled": len(nodes) - others}

    def within(self, room: int) -> Proposal:
        """Without chances for nodes that stand `room` path positions or more behind the root."""
        depths: list[int] = []
        for parent in self.parents.tolist():
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        beyond = np.array(depths) >= room
        return replace(self, chances=np.where(beyond, 0.0, self.chances)) if beyond.any() else self


class MatchAcceptance:
    """How likely a recalled token is accepted, by the length of the match: an estimate that every step corrects.

    recycling: whether recycled tokens are proposed beside it.
    """

    def __init__(self, recycling: bool = False) -> None:
        known = _BESIDE_RECYCLED if recycling else _MATCH_ACCEPTANCE
        self._right = [_MATCH_WEIGHT * share for share in known]
        self._count = [_MATCH_WEIGHT] * len(known)

    def of(self, match: int) -> float:
        match = min(match, MAX_MATCH)
        return self._right[match] / self._count[match]

    def saw(self, match: int, other: float, right: bool) -> None:
        """Whether a recalled token was right that the heads gave the chance `other`: one step of
        expectation-maximisation for the share of the two sources."""
        match = min(match, MAX_MATCH)
        if right:
            share = self.of(match)
            self._right[match] += share / (share + (1 - share) * other) if other > 0 else 1.0
        self._count[match] += 1


class Calibration:
    """How often drafts were right, by octaves of the probability that is claimed for them; at first a claim is
    believed."""

    def __init__(self) -> None:
        middle = 2.0 ** -((np.arange(_BINS) + 0.5) / _BINS_PER_OCTAVE)
        self._claimed = _HEADS_WEIGHT * middle
        self._right = self._claimed.copy()

    def chances(self, head_probs: np.ndarray) -> np.ndarray:
        """Any shape of probabilities given the parent."""
        bins = _bins(head_probs)
        chances: np.ndarray = np.minimum(head_probs * self._right[bins] / self._claimed[bins], 1.0)
        return chances

    def chance(self, claim: float) -> float:
        """As `chances`, of one."""
        place = _bin(claim)
        return min(claim * float(self._right[place] / self._claimed[place]), 1.0)

    def saw(self, head_probs: np.ndarray, right: np.ndarray) -> None:
        """float and bool [k], of nodes whose parents were accepted."""
        bins = _bins(head_probs)
        np.add.at(self._right, bins, right)
        np.add.at(self._claimed, bins, head_probs)

    def saw_one(self, claim: float, right: bool) -> None:
        """As `saw`, of one."""
        place = _bin(claim)
        self._right[place] += right
        self._claimed[place] += claim


def _bins(head_probs: np.ndarray) -> np.ndarray:
    octaves = -np.log2(np.maximum(head_probs, _TINY)) * _BINS_PER_OCTAVE
    bins: np.ndarray = np.minimum(octaves, _BINS - 1).astype(np.intp)
    return bins


def _bin(claim: float) -> int:
    return min(int(-math.log2(max(claim, _TINY)) * _BINS_PER_OCTAVE), _BINS - 1)


@dataclass(slots=True)
class CandidateScorer:
    """Makes proposals for an engine's threads, and learns from what became of them."""

    match_acceptance: MatchAcceptance = field(default_factory=MatchAcceptance)
    calibration: Calibration = field(default_factory=Calibration)

    def of_heads(self, tree: DraftTree, tokens: np.ndarray, log_probs: np.ndarray) -> list[Proposal]:
        """From what heads propose for T threads, [T, n] both: a proposal each.

        What is no probability, as damaged heads or float16 may claim, is no chance either.
        """
        head_probs = np.exp(np.minimum(log_probs.astype(np.float64), 0.0))
        head_probs[np.isnan(head_probs)] = 0.0
        chances = self.calibration.chances(head_probs)
        for level in tree.levels[1:]:
            chances[:, level.nodes] *= chances[:, tree.parents[level.nodes]]
        return [
            Proposal(*(row, tree.parents, chance), heads=len(row), head_probs=probs)
            for row, chance, probs in zip(tokens, chances, head_probs, strict=True)
        ]

    def with_match(self, proposal: Proposal | None, tree: DraftTree | None, match: NgramMatch) -> Proposal:
        """The proposal of heads, or None, and below it what was recalled."""
        if proposal is None or tree is None:
            likely = [self.match_acceptance.of(match.length + ahead) for ahead in range(len(match.tokens))]
            size = len(match.tokens)
            return Proposal(
                *(np.array(match.tokens, dtype=np.int64), np.arange(-1, size - 1), np.cumprod(likely)),
                chain=list(range(size)),
                matches=list(range(match.length, match.length + size)),
                chain_head_probs=[0.0] * size,
            )
        tokens, claimed = proposal.tokens.tolist(), proposal.chances.tolist()
        chain: list[int] = []
        chain_head_probs: list[float] = []
        parents: list[int] = []  # of what hangs below the tree, and the chance of each
        added: list[float] = []
        factors: list[float] = []  # of what hangs beside the chain, by how many of its nodes are above
        node: int | None = -1  # of the heads' tree; None once the chain has left it
        on_tree: list[int] = []  # nodes of the chain, and the chance of each
        reached: list[float] = []
        chance, last = 1.0, -1
        for ahead, token in enumerate(match.tokens):
            share = self.match_acceptance.of(match.length + ahead)
            other, following = 0.0, None
            if node is not None:
                before = claimed[node] if node >= 0 else 1.0
                following = next((child for child in tree.children[node] if tokens[child] == token), None)
                if following is not None and before > 0:
                    other = claimed[following] / before
                # Only where the sibling is not followed.
                factors.append((1 - share) * chance / max(before, _TINY))
            chance *= share + (1 - share) * other
            if following is None:
                parents.append(last)
                last = len(tokens) + len(added)
                added.append(chance)
            else:
                last = following
                on_tree.append(following)
                reached.append(chance)
            node = following
            chain.append(last)
            chain_head_probs.append(other)
        if node is not None:  # what was recalled ends within the heads' tree, which goes on below
            factors.append(chance / max(claimed[node], _TINY))
        chances = proposal.chances * np.array(factors)[tree.ancestors[:, on_tree].sum(axis=1)]
        chances[on_tree] = reached
        return Proposal(
            # An empty list by itself would be one of floats.
            np.concatenate([proposal.tokens, np.array(match.tokens[len(on_tree) :], dtype=np.int64)]),
            np.concatenate([proposal.parents, np.array(parents, dtype=np.int64)]),
            np.concatenate([chances, added]),
            proposal.heads,
            proposal.head_probs,
            chain,
            list(range(match.length, match.length + len(chain))),
            chain_head_probs,
        )

    def with_children(self, proposal: Proposal, rule: ForkRule | None, depth: int, root: int) -> Proposal:
        """`[Child]` below each proposed `[Fork]`, so that a fork costs no step.

        What the fork rule bans in a thread of this depth, behind the token `root`, gets no chance.
        """
        if rule is None:
            return proposal
        control = np.flatnonzero((proposal.tokens == rule.fork_id) | (proposal.tokens == rule.child_id))
        if not len(control):
            return proposal
        chances, forks = proposal.chances.copy(), []
        banned = np.zeros(len(chances), dtype=bool)
        for node in control.tolist():
            parent = int(proposal.parents[node])
            last = int(proposal.tokens[parent]) if parent >= 0 else root
            if proposal.tokens[node] == rule.child_id or rule.bans_fork(last, depth):
                banned[node] = True
            else:
                forks.append(node)
        for node, parent in enumerate(proposal.parents.tolist() if banned.any() else ()):
            banned[node] |= parent >= 0 and banned[parent]
        chances[banned] = 0.0
        forks = [node for node in forks if not banned[node]]
        size = len(chances)
        proposal.tokens = np.concatenate([proposal.tokens, np.full(len(forks), rule.child_id)])
        proposal.parents = np.concatenate([proposal.parents, np.array(forks, dtype=np.int64)])
        proposal.chances = np.concatenate([chances, chances[forks]])
        proposal.forks = {node: size + place for place, node in enumerate(forks)}
        return proposal

    def learn(self, proposal: Proposal, kept: np.ndarray, accepted: set[int]) -> None:
        """kept: the nodes that were in the draft tree; accepted: those among them that were right."""
        chained = set(kept.tolist()).intersection(proposal.chain)
        for node, match, other in zip(proposal.chain, proposal.matches, proposal.chain_head_probs, strict=True):
            if node not in chained:
                break
            self.match_acceptance.saw(match, other, node in accepted)
            if node not in accepted:
                break
        if proposal.head_probs is None:
            return
        tried = [
            node
            for node in kept[kept < proposal.heads].tolist()
            if proposal.parents[node] < 0 or int(proposal.parents[node]) in accepted
        ]
        if tried and not chained:
            # Where something was recalled, what the heads say besides is a choice among the rest.
            right = np.array([node in accepted for node in tried])
            self.calibration.saw(proposal.head_probs[tried], right)
