"""What is guessed ahead, and what is learned from what became of it. It lives as long as its engine."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from medusa_apar.kv.slot_ledger import SlotLedger
from medusa_apar.threads.paragraph_tree import Thread
from medusa_apar.threads.request import Request

from .advance import Advance, DraftResult
from .budget import SECONDARY, EvenBudget, ForestBudget
from .candidates import MAX_DEPTH, CandidateScorer, MatchAcceptance, Proposal
from .draft_tree import DraftTree
from .drafter import AttendingDrafter, Drafter, Written
from .ngram_index import MAX_MATCH, MAX_RECALLED, NgramIndex, NgramMatch
from .options import Speculation
from .recycled_candidates import RecycledScorer
from .recycling import RecyclingTable, SeenRows


class Drafting(NamedTuple):
    """Who proposes, and the tree that it fills below every thread."""

    drafter: Drafter | AttendingDrafter
    tree: DraftTree

    @property
    def key(self) -> tuple[Hashable, DraftTree]:
        """What runs, as a part of the key of captured steps."""
        return self.drafter.key, self.tree


class Load(NamedTuple):
    """What the next step will run: threads at most, and requests; whether guesses are wanted for any of these."""

    threads: int
    requests: int
    speculation: bool = True


@dataclass(slots=True)
class Speculator:
    """Candidates for every thread's draft tree, from draft heads, what was written before and recycled tokens.

    Args:
        options: what is guessed; None for nothing.
        ledger: which slots hold what threads have written, for a drafter that attends to it.
        drafter: draft heads as the runtime drafts with them; None without.
        tree: of the heads' guesses below each root.
    """

    options: Speculation | None
    budget: ForestBudget | EvenBudget
    ledger: SlotLedger
    drafter: Drafter | AttendingDrafter | None = None
    tree: DraftTree = field(default_factory=lambda: DraftTree([]))
    scorer: CandidateScorer = field(init=False)
    recycled: RecycledScorer = field(init=False)
    # Draft nodes, and those that were right, by who proposed them.
    drafted: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    undrafted_steps: int = 0
    last_draft: tuple[int, float] | None = None  # threads that the heads drafted for in this step, and seconds
    _proposals: dict[Thread, Proposal] = field(default_factory=dict)
    _asks: bool = False  # whether the heads draft in this step
    _any_worth: bool = True  # whether guesses could pay for any thread of the latest step

    def __post_init__(self) -> None:
        self.scorer = CandidateScorer(MatchAcceptance(self.recycles))
        self.recycled = RecycledScorer(self.scorer.match_acceptance)

    @property
    def ngrams(self) -> bool:
        return self.options is not None and self.options.ngrams

    @property
    def recycles(self) -> bool:
        """Whether recycled tokens are among the guesses."""
        return self.options is not None and self.options.recycling

    @property
    def watches(self) -> bool:
        """Whether this step's rows are to be recycled. Where no thread is worth a guess, they would only cost time."""
        return self.recycles and self._any_worth

    @property
    def max_depth(self) -> int:
        """Most draft nodes that a thread can accept in a step."""
        return max(self.tree.height, MAX_DEPTH)

    def candidates(self, thread: Thread) -> Proposal | None:
        """What could hang below the thread's root in this step; None for nothing. Asked once."""
        return self._proposals.pop(thread, None)

    def begin(self, load: Load, num_segments: int) -> Drafting | None:
        """Settles whether the heads draft in this step; what they would draft on the device, for so many segments."""
        self.last_draft = None
        wanted = self.drafter is not None and load.speculation
        self._asks = wanted and self.budget.heads_enabled()
        self.undrafted_steps += wanted and not self._asks
        if isinstance(self.drafter, AttendingDrafter):  # to what is accepted, which the host has to know
            return None
        return self._drafting(load.threads, num_segments)

    def learn(self, result: DraftResult, thread: Thread) -> None:
        """Counts which of a thread's draft nodes came true, and learns from them."""
        proposal, kept = result.proposal, result.kept
        accepted = kept[result.nodes].tolist()
        if thread.live and not thread.ends_with_forced:  # else nobody knows what would have come next
            self.scorer.learn(proposal, kept, set(accepted))
            self.recycled.learn(proposal, kept, set(accepted))
        self.drafted.update(proposal.sources(kept[: result.num_candidates]), forks=len(result.forks))
        self.accepted.update(proposal.sources(kept[result.nodes]))
        self.accepted["forks"] += sum(node in result.forks for node in result.nodes)

    def recycle(self, seen: Sequence[tuple[Request, SeenRows]]) -> None:
        """Keeps what the model says behind a step's rows, each thread's with its request."""
        for request, rows in seen:
            if request.recycled is None:
                request.recycled = RecyclingTable()
            request.recycled.learn(rows)

    def draft(self, advances: Sequence[Advance], hidden: Tensor, load: Load, on_device: Drafting | None) -> None:
        """Candidates for the next step of the threads that go on.

        Args:
            advances: in the order of their requests.
            hidden: [M, input_size], hidden states of the step's verified rows.
            on_device: with what the heads have drafted behind verification; None where they draft here.
        """
        if self.drafter is None and not self.ngrams and not self.recycles:
            return
        going_on = [advance for advance in advances if advance.goes_on]
        advances = self._worth_drafting(going_on, load)
        self._any_worth = bool(advances) or not going_on
        matches = self._matches(advances) if self.ngrams else {}
        drafting = on_device
        if self._asks and advances:
            drafting = self._draft(advances, hidden, load, matches, on_device) or on_device
        self._propose(advances, None if drafting is None else drafting.tree, matches, load)

    def forget(self, threads: Sequence[Thread]) -> None:
        """Drops what was to be drafted for threads that have ended."""
        for thread in threads:
            self._proposals.pop(thread, None)

    def _worth_drafting(self, advances: list[Advance], load: Load) -> list[Advance]:
        """Keeps the threads for which drafts can pay in such a step. The n-gram indexes learn from all of them."""
        groups = []
        for request, group in groupby(advances, attrgetter("request")):
            if not request.options.speculation:
                continue
            threads = [advance.thread for advance in group]
            groups.append(threads)
            if self.ngrams:
                if request.ngrams is None:
                    request.ngrams = NgramIndex(request.tree.child_id)
                for thread in threads:
                    request.ngrams.learn(thread)
        paying = self.budget.threads_worth_drafting(groups, load.threads, load.requests)
        return [advance for advance in advances if advance.thread in paying]

    def _matches(self, advances: Sequence[Advance]) -> dict[Thread, NgramMatch]:
        """What a grammar expects behind these threads, or what followed where their last tokens were written before."""
        found = (
            (advance.thread, _expected(advance) or advance.request.ngrams.lookup(advance.thread))
            for advance in advances
        )
        return {thread: match for thread, match in found if match is not None}

    def _draft(
        self,
        advances: Sequence[Advance],
        hidden: Tensor,
        load: Load,
        matches: dict[Thread, NgramMatch],
        on_device: Drafting | None,
    ) -> Drafting | None:
        """Has the heads draft for each thread that is worth it and that they have not drafted for on the device."""
        asking: set[Thread] = set()
        for _, group in groupby(advances, attrgetter("request")):
            acceptance = {
                advance.thread: self.scorer.match_acceptance.of(matches[advance.thread].length)
                if advance.thread in matches
                else 0.0
                for advance in group
            }
            asking |= self.budget.threads_for_heads(acceptance)
        todo = [advance for advance in advances if advance.thread in asking and advance.drafted is None]
        drafting = (on_device or self._drafting(load.threads, len(todo))) if todo else None
        if drafting is None:
            return None
        min_probability = self._min_probability(load)
        rows = torch.tensor([advance.row for advance in todo], dtype=torch.long, device=hidden.device)
        last = [advance.thread.tokens[-1] for advance in todo]
        roots = torch.tensor(last, dtype=torch.long, device=hidden.device)
        started = time.perf_counter()
        drafter, tree = drafting
        if isinstance(drafter, AttendingDrafter):
            written = Written(self.ledger.pool, [self.ledger.path_slots(advance.thread) for advance in todo])
            token_ids, log_probs = drafter.propose_behind(written, roots, tree, min_probability)
        else:
            token_ids, log_probs = drafter.propose(hidden[rows], roots, tree, min_probability)
        guesses = zip(token_ids.cpu().numpy(), log_probs.float().cpu().numpy(), strict=True)
        self.last_draft = len(todo), time.perf_counter() - started
        for advance, guess in zip(todo, guesses, strict=True):
            advance.drafted = guess
        return drafting

    def _propose(
        self, advances: Sequence[Advance], tree: DraftTree | None, matches: dict[Thread, NgramMatch], load: Load
    ) -> None:
        """Candidates for these threads: what the heads drafted in `tree`, what followed the same tokens before, and
        what the model would have said behind them."""
        if self.recycles:
            least = self._min_probability(load)
            most = self.budget.nodes(load.threads, max(len(advances), 1), self.budget.rows)
        guesses = [advance.drafted for advance in advances if advance.drafted is not None]
        made: Iterator[Proposal] = iter(())
        if tree is not None and guesses:
            made = iter(self.scorer.of_heads(tree, *map(np.stack, zip(*guesses, strict=True))))
        for advance in advances:
            thread, proposal = advance.thread, None if advance.drafted is None else next(made)
            if thread in matches:
                proposal = self.scorer.with_match(proposal, tree, matches[thread])
            table = advance.request.recycled
            if self.recycles and table is not None:
                proposal = self.recycled.extend(proposal, table, thread.last_two, least, most)
            if proposal is not None and self.options is not None and self.options.forks:
                rule = advance.request.options.rule
                proposal = self.scorer.with_children(proposal, rule, thread.depth, thread.tokens[-1])
            if proposal is not None:
                self._proposals[thread] = proposal

    def _min_probability(self, load: Load) -> float:
        """The chance below which nobody need look for nodes."""
        # Beside others of its request, the thread that the answer waits for weighs about as much as all of them.
        weight = 1.0 if load.threads <= load.requests else SECONDARY
        return self.budget.min_probability(load.threads, load.requests, weight)

    def _drafting(self, roots: int, threads: int) -> Drafting | None:
        """A tree of as many nodes below each of so many threads as can be of use; None for none."""
        if self.drafter is None or not self._asks:
            return None
        tree = self.tree.first(self.budget.nodes(roots, max(min(threads, roots), 1), self.budget.rows))
        return Drafting(self.drafter, tree) if len(tree) else None


def _expected(advance: Advance) -> NgramMatch | None:
    """As sure as the longest of matches."""
    request = advance.request
    tokens = [] if request.guide is None else request.guide.expected(request.path(advance.thread))
    return NgramMatch(tokens[:MAX_RECALLED], MAX_MATCH) if tokens else None
