"""The decoder loop: draft -> forest -> forward -> verify -> fork manager -> paragraph tree."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from transformers import PreTrainedModel

from .choice import Drafting
from .forest import Forest, Stem
from .fork_manager import ForkManager
from .heads import DraftHeads
from .heads.draft_heads import Drafter
from .kv_pool import KVPool
from .output import Stats
from .paragraph_tree import ParagraphTree, Thread
from .request import Request
from .scheduler import Scheduler
from .slot_ledger import SlotLedger
from .torch_runtime import Runtime
from .verdict import Verdict
from .verify import Verifier


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
    stats: Stats = field(default_factory=Stats)
    # Written by `run`: what drafts for the heads, and what it reads.
    drafter: Drafter | None = None
    drafter_weights: Hashable = None
    # Tokens of the draft tree's first nodes below the thread's last token; written by `_draft`, read by the scheduler.
    guesses: dict[Thread, list[int]] = field(default_factory=dict)
    # Per thread and own token, float32 [vocab], where the caller asked for them.
    scores: dict[Thread, list[torch.Tensor]] = field(default_factory=dict)
    logits: dict[Thread, list[torch.Tensor]] = field(default_factory=dict)

    def run(self) -> Iterator[None]:
        """Steps until every request is done; yields after each step, with `requests` and `stats` up to date."""
        with self.runtime.running():
            # Looked up once: what it is made of is asked of every weight, 0.15 ms.
            self.drafter = self.heads.drafter() if isinstance(self.heads, DraftHeads) else self.heads
            self.drafter_weights = self.heads.weights_key() if isinstance(self.heads, DraftHeads) else None
            while any(not request.done for request in self.requests):
                self.step()
                yield
        self.stats.final_slots = self.scheduler.ledger.pool.in_use

    def step(self) -> None:
        clock = Laps(self.stats.phase_seconds)
        running = [request for request in self.requests if not request.done]
        plan = self.scheduler.plan(running, self.guesses.get)
        clock.lap("plan")
        forest = Forest([stems for _, stems in plan], self.scheduler.ledger, self.model.device)
        owner = {stem: request for request, stems in plan for stem in stems}
        taps = () if self.heads is None else self.heads.taps
        clock.lap("forest")
        choice = None
        if self.verifier.in_one_launch is not None:
            drafting = self._drafting(running, len(forest.verified))
            choice = self.verifier.choice(forest, self.scheduler.draft_tree.num_heads, drafting)
        pool = self.scheduler.ledger.pool
        logits, hidden, chosen = self.runtime.step(forest, pool, taps, choice)
        clock.lap("forward")
        guesses = None
        if choice is None or chosen is None:
            verdicts = self.verifier(forest, logits, owner)
        else:
            verdicts, guesses = choice.read(chosen)
        clock.lap("verify")
        for stem, verdict in zip(forest.verified, verdicts, strict=True):
            gained = self.fork_manager.commit(owner[stem].tree, stem, verdict)
            self.stats.accepted_lengths[gained] += 1
            self._keep_scores(stem.thread, verdict, gained)
        for request in running:
            request.publish()
            self.fork_manager.trim(request)
        clock.lap("commit")
        threads = [stem.thread for stem in forest.verified]
        if chosen is None:
            guesses = self._draft(threads, verdicts, hidden)
        for index, thread in enumerate(threads):
            self.guesses.pop(thread, None)
            if guesses is not None and thread.live and not thread.awaits_insertion:
                self.guesses[thread] = guesses[index]
        clock.lap("draft")
        self._count(forest)
        clock.lap("count")
        if any(stem.thread.parent is None and len(stem.pending) >= stem.thread.num_forced for stem in forest.stems):
            self.stats.prefill_seconds += clock.total
        else:
            self.stats.decode_seconds += clock.total

    def _draft(self, threads: list[Thread], verdicts: list[Verdict], hidden: torch.Tensor) -> list[list[int]] | None:
        """The heads look on from where each live thread's last token was chosen; empty for the others."""
        live = [index for index, thread in enumerate(threads) if thread.live and not thread.awaits_insertion]
        if self.drafter is None or not live:
            return None
        running = [request for request in self.requests if not request.done]
        drafting = self._drafting(running, len(live))
        if drafting is None:
            return None
        rows = torch.tensor([verdicts[index].row for index in live], device=hidden.device)
        roots = torch.tensor([threads[index].tokens[-1] for index in live], device=hidden.device)
        drafted, _ = drafting.drafter.propose(hidden[rows], roots, drafting.tree)
        guesses: list[list[int]] = [[] for _ in threads]
        for index, guessed in zip(live, drafted.tolist(), strict=True):
            guesses[index] = guessed
        return guesses

    def _drafting(self, running: list[Request], threads: int) -> Drafting | None:
        """Who drafts, and as many nodes below each of so many threads as pay; None without heads, or if none pays."""
        if self.drafter is None:
            return None
        tree = self.scheduler.draft_tree.first(self.scheduler.most_nodes(running, threads))
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

    @property
    def total(self) -> float:
        return self._last - self._started


@torch.no_grad()
def check_agrees(model: PreTrainedModel, runtime: Runtime, largest: float | None) -> None:
    """ValueError unless a few tokens over a forest, in two steps, give the logits of the model's own forward pass.

    largest: share of the largest logit by which they may differ; None only tries whether they can be had.

    Families differ in more ways than a config tells (what they do to keys behind the cache, other kinds of attention);
    two tiny forward passes tell at once what would otherwise fail, or silently differ, in mid-run.
    """
    vocab_size = cast(torch.Tensor, model.get_input_embeddings().weight).shape[0]
    ids = [index % vocab_size for index in (1, 3, 5, 7)]
    ledger = SlotLedger(KVPool())
    trunk = ParagraphTree(ids).trunk
    try:
        with runtime.running():
            for stop in (2, 4):
                stem = Stem(trunk, stop)
                ours, _ = runtime.forward(Forest([[stem]], ledger, model.device), ledger.pool)
        plain = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1]
        difference = float((ours[-1].float() - plain.float()).abs().max() / plain.float().abs().max().clamp(min=1e-6))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{type(model).__name__} cannot decode over a KV pool: {reason}") from error
    if largest is not None and not model.training and not difference < largest:  # dropout differs by itself
        raise ValueError(
            f"{type(model).__name__} cannot be attached: over a KV pool its logits are {difference:.0%} off its own."
        )
