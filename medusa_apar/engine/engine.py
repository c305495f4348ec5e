"""The decoder loop: draft -> forest -> forward -> verify -> fork manager -> paragraph tree."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch
from transformers import PreTrainedModel

from medusa_apar.drafting.candidates import MOST_DEPTH, Proposal, Proposer
from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.drafting.drafter import Drafter
from medusa_apar.drafting.ngram_index import Recall, SiblingMemory
from medusa_apar.drafting.options import Speculation
from medusa_apar.events.reporter import Reporter
from medusa_apar.forest.forest import Forest, Stem
from medusa_apar.heads import DraftHeads
from medusa_apar.runtimes.cpu.drafting import Pruned
from medusa_apar.runtimes.devices import device_of
from medusa_apar.runtimes.runtime import Runtime
from medusa_apar.threads.paragraph_tree import Thread
from medusa_apar.threads.request import Request
from medusa_apar.verify.device_verify import Drafting
from medusa_apar.verify.verdict import Verdict
from medusa_apar.verify.verifier import Verifier

from .fork_manager import ForkManager
from .scheduler import Scheduler
from .stats import Stats

Advanced = tuple[Request, Thread, Verdict]  # a thread that has gone on in this step, and by what


@dataclass(slots=True)
class Decoder:
    """Everything one generate call needs; `run` generates for all requests at once."""

    model: PreTrainedModel
    heads: DraftHeads | None
    runtime: Runtime
    scheduler: Scheduler
    verifier: Verifier
    fork_manager: ForkManager
    requests: list[Request]
    speculation: Speculation = field(default_factory=Speculation)
    draft_tree: DraftTree = field(default_factory=lambda: DraftTree([]))  # of the heads' guesses below each root
    proposer: Proposer = field(default_factory=Proposer)
    stats: Stats = field(default_factory=Stats)
    reporter: Reporter | None = None  # None where nobody wants to know
    # Written by `run`: what drafts for the heads, and what it reads.
    drafter: Drafter | None = None
    drafter_weights: Hashable = None
    # Candidates for each thread's draft tree; written by `_propose`, read by the scheduler.
    proposals: dict[Thread, Proposal] = field(default_factory=dict)
    memories: dict[Request, SiblingMemory] = field(default_factory=dict)
    # Per thread and own token, float32 [vocab], where the caller asked for them.
    scores: dict[Thread, list[torch.Tensor]] = field(default_factory=dict)
    logits: dict[Thread, list[torch.Tensor]] = field(default_factory=dict)

    def run(self) -> Iterator[None]:
        """Steps until every request is done; yields after each step, with `requests` and `stats` up to date."""
        with self.runtime.running(checked=True):  # by whoever picked it for this call
            # Looked up once, as it asks every weight that was copied whether it has changed.
            least = self.scheduler.budget.least_chance
            self.drafter = self.heads.drafter(least) if isinstance(self.heads, DraftHeads) else self.heads
            self.drafter_weights = self.heads.weights_key() if isinstance(self.heads, DraftHeads) else None
            while any(not request.done for request in self.requests):
                self.step()
                yield
        self.stats.final_slots = self.scheduler.ledger.pool.in_use

    def step(self) -> None:
        clock = Laps(self.stats.phase_seconds)
        running = [request for request in self.requests if not request.done]
        plan = self.scheduler.plan(running, self.proposals.get)
        clock.lap("plan")
        forest = Forest([stems for _, stems in plan], self.scheduler.ledger, device_of(self.model))
        owner = {stem: request for request, stems in plan for stem in stems}
        taps = () if self.heads is None else self.heads.taps
        clock.lap("forest")
        choice, drafting = None, None
        asked = self._asks_heads()
        if self.verifier.in_one_launch is not None:
            drafting = self._drafting(self.scheduler.running(running), len(forest.verified)) if asked else None
            choice = self.verifier.choice(forest, max(self.draft_tree.height, MOST_DEPTH), drafting)
        pool = self.scheduler.ledger.pool
        if self.reporter is not None and self.reporter.watched:
            self.reporter.plans(forest, owner, pool)
            clock.skip(self.reporter.deliver())  # what is guessed is to be seen while it is checked
        logits, hidden, chosen = self.runtime.step(forest, pool, taps, choice)
        clock.lap("forward")
        if choice is None or chosen is None:
            verdicts = self.verifier(forest, logits, owner)
        else:
            verdicts = self.verifier.read(choice, chosen, forest, logits, owner)
        clock.lap("verify")
        if self.reporter is not None and not self.reporter.watched:
            self.reporter.plans(forest, owner, pool)
        advanced: list[Advanced] = []
        for stem, verdict in zip(forest.verified, verdicts, strict=True):
            self.proposals.pop(stem.thread, None)
            gains = self.fork_manager.commit(owner[stem].tree, stem, verdict)
            if self.reporter is not None:
                self.reporter.commits(owner[stem], stem, gains)
            gained = next((gained for thread, _, gained in gains if thread is stem.thread), 0)
            self._learn(stem, verdict.nodes[:gained])
            for thread, its, gained in gains:
                self.stats.accepted_lengths[gained] += 1
                self._keep_scores(thread, its, gained)
                advanced.append((owner[stem], thread, its))
        for request in running:
            request.publish()
            self.fork_manager.trim(request)
            if request.done:
                self.memories.pop(request, None)
        clock.lap("commit")
        advanced = [entry for entry in advanced if entry[1].live and not entry[1].awaits_insertion]
        going_on = [request for request in running if not request.done]
        guesses = self.drafter is not None or self.speculation.siblings
        roots = max(self.scheduler.running(going_on), 1) if guesses else 0
        advanced = self._worth_guessing(advanced, roots, len(going_on)) if guesses else []
        recalls = self._recall(advanced) if self.speculation.siblings else {}
        if choice is None:
            crowd = roots, len(going_on)
            drafting = self._draft(advanced, hidden, crowd, recalls) if asked and advanced else None
        self._propose(advanced, None if drafting is None else drafting.tree, recalls)
        clock.lap("draft")
        self._count(forest)
        if self.reporter is not None:
            self.reporter.finishes(running, forest, pool)
        clock.lap("count")
        if any(stem.thread.parent is None and len(stem.pending) >= stem.thread.num_forced for stem in forest.stems):
            self.stats.prefill_seconds += clock.total
        else:
            self.stats.decode_seconds += clock.total

    def _learn(self, stem: Stem, nodes: list[int]) -> None:
        """Lets the proposer know which of a stem's draft nodes the thread gained, and counts them."""
        if stem.proposal is None:
            return
        accepted = stem.kept[nodes].tolist()
        if stem.thread.live and not stem.thread.awaits_insertion:  # else nobody knows what would have come next
            self.proposer.learn(stem.proposal, stem.kept, set(accepted))
        of_heads = sum(node < stem.proposal.heads for node in stem.kept[: stem.guessed].tolist())
        heads_right = sum(node < stem.proposal.heads for node in accepted)
        self.stats.drafted.update(heads=of_heads, siblings=stem.guessed - of_heads, forks=len(stem.forks))
        self.stats.accepted.update(heads=heads_right, siblings=len(accepted) - heads_right)
        self.stats.accepted["forks"] += sum(node in stem.forks for node in nodes)

    def _worth_guessing(self, advanced: list[Advanced], roots: int, requests: int) -> list[Advanced]:
        """Those for which guesses can pay in a step of so many roots; all are remembered."""
        paying: set[Thread] = set()
        for request, group in groupby(advanced, itemgetter(0)):
            threads = [thread for _, thread, _ in group]
            paying |= self.scheduler.budget.paying(threads, roots, requests)
            if self.speculation.siblings:
                memory = self.memories.setdefault(request, SiblingMemory(request.tree.child_id))
                for thread in threads:
                    memory.learn(thread)
        return [entry for entry in advanced if entry[1] in paying]

    def _recall(self, advanced: list[Advanced]) -> dict[Thread, Recall]:
        """What followed where these threads' last tokens were written before."""
        found = ((thread, self.memories[request].recall(thread)) for request, thread, _ in advanced)
        return {thread: recall for thread, recall in found if recall is not None}

    def _draft(
        self, advanced: list[Advanced], hidden: torch.Tensor, crowd: tuple[int, int], recalls: dict[Thread, Recall]
    ) -> Drafting | None:
        """Has the heads look on from where the last token of each thread that is worth it was chosen.

        crowd: roots of the next step, and requests.
        """
        asking: set[Thread] = set()
        for _, group in groupby(advanced, itemgetter(0)):
            trusts = {
                thread: self.proposer.trust.of(recalls[thread].match) if thread in recalls else 0.0
                for _, thread, _ in group
            }
            asking |= self.scheduler.budget.asking(trusts)
        advanced = [entry for entry in advanced if entry[1] in asking]
        threads, requests = crowd
        drafting = self._drafting(threads, len(advanced)) if advanced else None
        if drafting is not None:
            if isinstance(self.drafter, Pruned):
                # Of several threads of a request the one that the answer waits for counts about half.
                worth = 1.0 if threads <= requests else 0.5
                self.drafter.chance = self.scheduler.budget.bar(threads, requests, worth)
            rows = torch.tensor([verdict.row for _, _, verdict in advanced], dtype=torch.long, device=hidden.device)
            last = [thread.tokens[-1] for _, thread, _ in advanced]
            roots = torch.tensor(last, dtype=torch.long, device=hidden.device)
            token_ids, log_probs = drafting.drafter.propose(hidden[rows], roots, drafting.tree)
            guessed = zip(token_ids.cpu().numpy(), log_probs.float().cpu().numpy(), strict=True)
            for (_, _, verdict), guess in zip(advanced, guessed, strict=True):
                verdict.guessed = guess
        return drafting

    def _propose(self, advanced: list[Advanced], tree: DraftTree | None, recalls: dict[Thread, Recall]) -> None:
        """Candidates for these live threads: what the heads guessed in `tree`, and what was written before behind the
        same tokens."""
        guesses = [verdict.guessed for _, _, verdict in advanced if verdict.guessed is not None]
        made: Iterator[Proposal] = iter(())
        if tree is not None and guesses:
            made = iter(self.proposer.of_heads(tree, *map(np.stack, zip(*guesses, strict=True))))
        for _, thread, verdict in advanced:
            proposal = None if verdict.guessed is None else next(made)
            if thread in recalls:
                proposal = self.proposer.with_recall(proposal, tree, recalls[thread])
            if proposal is not None and self.speculation.forks:
                proposal = self.proposer.with_children(proposal, self.verifier.may_fork(thread), thread.tokens[-1])
            if proposal is not None:
                self.proposals[thread] = proposal

    def _asks_heads(self) -> bool:
        """Once a step: not without heads, nor while they do not pay."""
        if self.drafter is None:
            return False
        pays = self.scheduler.budget.heads_pay()
        self.stats.undrafted_steps += not pays
        return pays

    def _drafting(self, roots: int, threads: int) -> Drafting | None:
        """Who drafts, and a tree of as many nodes below each of so many threads as can be of use; None for none."""
        if self.drafter is None:
            return None
        budget = self.scheduler.budget
        tree = self.draft_tree.first(budget.nodes(roots, max(min(threads, roots), 1), budget.rows))
        return Drafting(self.drafter, tree, self.drafter_weights) if len(tree) else None

    def _keep_scores(self, thread: Thread, verdict: Verdict, gained: int) -> None:
        for kept, new in ((self.scores, verdict.scores), (self.logits, verdict.logits)):
            if new and gained:
                own = kept.setdefault(thread, [])
                own += new[:gained]
                own += [_forced(token, own[-1]) for token in thread.token_ids[len(own) :]]

    def _count(self, forest: Forest) -> None:
        stats = self.stats
        stats.steps += 1
        stats.forward_tokens += len(forest)
        stats.generated_tokens = sum(len(request.text) for request in self.requests)
        stats.forks = sum(len(request.tree.threads) - 1 for request in self.requests)
        stats.peak_threads = max(stats.peak_threads, len(forest.verified))
        stats.peak_slots = self.scheduler.ledger.pool.peak


def _forced(token: int, like: torch.Tensor) -> torch.Tensor:
    """Scores of an inserted token, as transformers writes those of forced ones: nothing else was possible."""
    scores = torch.full_like(like, -torch.inf)
    scores[token] = 0
    return scores


class Laps:
    """Adds up, by name, what passes between two calls."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._started = self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    def skip(self, seconds: float) -> None:
        """As if they had not passed."""
        self._started += seconds
        self._last += seconds

    @property
    def total(self) -> float:
        return self._last - self._started
