"""What choosing a step's nodes costs the host: proposals from heads and siblings, and the budget over all threads.

  python -m medusa_apar.eval.budget_host

Milliseconds, medians; threads that have written some words in common, 32 guesses of four heads each.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from medusa_apar.drafting.budget import ForestBudget, thread_weights
from medusa_apar.drafting.candidates import CandidateScorer
from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.drafting.ngram_index import NgramIndex
from medusa_apar.drafting.step_cost import StepCost
from medusa_apar.threads.fork_rule import ForkRule
from medusa_apar.threads.paragraph_tree import ParagraphTree

from .kernel_timing import table

THREADS, STEPS, WORDS = (1, 4, 16, 64), 200, 300
FORK, CHILD = 1, 2


def measure(threads: int, seed: int = 0) -> dict[str, object]:
    random, heads = np.random.default_rng(seed), DraftTree.likeliest(32)
    tree = ParagraphTree(random.integers(5, WORDS, 60).tolist(), fork_id=FORK, child_id=CHILD)
    for _ in range(threads - 1):
        tree.trunk.tokens += [*random.integers(5, WORDS, 8).tolist(), FORK]
        tree.fork(tree.trunk, len(tree.trunk.tokens) - 1, key=0)
    memory, proposer = NgramIndex(CHILD), CandidateScorer()
    budget = ForestBudget(64, StepCost(((1, 12.0), (8, 20.0), (64, 110.0)), ((1, 1.0),)))
    laps: dict[str, list[float]] = {"proposals, ms": [], "budget, ms": []}
    for _ in range(STEPS):
        # Steep like heads' own claims; some threads say what has been said.
        log_probs = -random.gamma(1.0, 2.0, (threads, len(heads)))
        ids = random.integers(5, WORDS, (threads, len(heads)))
        for thread in tree.threads:
            said = tree.trunk.tokens
            place = int(random.integers(0, len(said) - 4))
            thread.tokens += said[place : place + 3] if random.random() < 0.5 else random.integers(5, WORDS, 2).tolist()
        started = time.perf_counter()
        proposals = []
        for thread, proposal in zip(tree.threads, proposer.of_heads(heads, ids, log_probs), strict=True):
            memory.learn(thread)
            if (recall := memory.lookup(thread)) is not None:
                proposal = proposer.with_match(proposal, heads, recall)
            proposals.append(proposer.with_children(proposal, ForkRule(FORK, CHILD, 3), 0, WORDS))
        made = time.perf_counter()
        budget.choose(proposals, thread_weights(tree.threads), 64)
        laps["proposals, ms"].append(made - started)
        laps["budget, ms"].append(time.perf_counter() - made)
    return {"threads": threads} | {name: 1e3 * statistics.median(times) for name, times in laps.items()}


if __name__ == "__main__":
    print(table([measure(threads) for threads in THREADS]))
