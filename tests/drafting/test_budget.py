"""Which candidates become nodes: those that bring most, as long as they pay."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import medusa_apar
from medusa_apar.drafting.budget import MIN_CHANCE, ForestBudget, thread_weights
from medusa_apar.drafting.candidates import Proposal
from medusa_apar.drafting.step_cost import StepCost
from medusa_apar.threads.paragraph_tree import ParagraphTree
from tests.support.models import CHILD, FORK


@st.composite
def forests(draw):
    made = []
    for _ in range(draw(st.integers(1, 5))):
        size = draw(st.integers(0, 9))
        if not size:
            made.append(None)
            continue
        parents = np.array([draw(st.integers(-1, node - 1)) for node in range(size)])
        chances = np.zeros(size)
        for node in range(size):
            chances[node] = draw(st.floats(0, 1)) * (chances[parents[node]] if parents[node] >= 0 else 1)
        made.append(Proposal(np.arange(size), parents, chances, heads=size))
    return made, np.array([draw(st.sampled_from([0.5, 1.0])) for _ in made])


@settings(deadline=None)
@given(forests(), st.integers(0, 30), st.integers(0, 40))
def test_the_budget_keeps_the_best_nodes_with_their_parents(forest, rows, room):
    proposals, worth = forest
    kept = ForestBudget(rows).choose(proposals, worth, room)
    count = sum(map(len, kept))
    assert count <= max(0, min(room, rows - len(proposals)))
    some = [(p.chances, w) for p, w in zip(proposals, worth, strict=True) if p is not None]
    gains = np.concatenate([[], *(np.where(chances > MIN_CHANCE, chances * w, 0) for chances, w in some)])
    got = sum(float((p.chances[k] * w).sum()) for p, w, k in zip(proposals, worth, kept, strict=True) if p is not None)
    worthwhile = np.sort(gains[gains > 0])[::-1]
    assert got == pytest.approx(worthwhile[:count].sum())
    assert count == min(len(worthwhile), max(0, min(room, rows - len(proposals))))
    for proposal, nodes in zip(proposals, kept, strict=True):
        assert proposal is not None or not len(nodes)
        if proposal is not None:
            assert set(proposal.parents[nodes].tolist()) <= {-1, *nodes.tolist()}


@settings(deadline=None)
@given(forests(), st.floats(1, 20), st.floats(0.1, 5))
def test_the_budget_stops_where_nodes_cost_more_than_they_bring(forest, fixed, row):
    proposals, worth = forest
    assume(any(p is not None for p in proposals))
    budget = ForestBudget(64, StepCost(((1, fixed), (64, fixed + 63 * row))))
    rate = 1.5 / (fixed + row * (len(proposals) - 1))  # of a first step: what is assumed of it
    for proposal, nodes, weight in zip(proposals, budget.choose(proposals, worth, 99), worth, strict=True):
        if proposal is not None:
            likely = proposal.chances > MIN_CHANCE
            pays = np.flatnonzero((proposal.chances * weight > rate * row + 1e-9) & likely)
            assert set(pays.tolist()) <= set(nodes.tolist())
            assert (proposal.chances[nodes] * weight > rate * row - 1e-9).all()


def test_no_thread_has_more_nodes_than_the_kernels_take():
    proposal = Proposal(np.arange(90), np.arange(90) - 1, 0.99 ** np.arange(90), heads=90)
    (kept,) = ForestBudget(500, max_nodes=64).choose([proposal], np.ones(1), 500)
    assert kept.tolist() == list(range(64))


def test_the_answer_waits_for_who_can_fork_then_for_who_wrote_least():
    tree = ParagraphTree([1, 2], fork_id=FORK, child_id=CHILD)
    tree.trunk.tokens += [5, FORK, 6, FORK]
    children = [tree.fork(tree.trunk, index, 0) for index in (3, 5)]
    children[0].tokens += [7] * 30
    assert thread_weights([tree.trunk, *children]).tolist() == [0.5, 0.25, 0.25]
    np.testing.assert_allclose(thread_weights(children), [1 / 3, 2 / 3])
    assert thread_weights(children[:1]).tolist() == [1.0]


def test_nothing_is_looked_for_where_nothing_pays():
    """Alone a thread's guesses pay; beside forty others they cost more than they could bring (promise 7)."""
    tree = ParagraphTree([1, 2], fork_id=FORK, child_id=CHILD)
    for _ in range(40):
        tree.trunk.tokens += [5, FORK]
        tree.fork(tree.trunk, len(tree.trunk.tokens) - 1, 0)
    cost = StepCost(((1, 10.0), (64, 136.0)), ((1, 1.0),))
    budget = ForestBudget(64, cost)
    assert budget.threads_worth_drafting([[tree.trunk]], 1, 1) == {tree.trunk}
    assert budget.threads_worth_drafting([tree.threads], len(tree.threads), 1) == {
        tree.trunk
    }  # which they all wait for
    assert budget.threads_worth_drafting([tree.threads[1:]], len(tree.threads) - 1, 1) == set()
    assert budget.threads_worth_drafting([tree.threads[:3]], 3, 1) == set(tree.threads[:3])
    unpriced = ForestBudget(64)  # fills its rows, whatever they cost
    assert unpriced.threads_worth_drafting([tree.threads], 41, 1) == set(tree.threads)

    trunk, child, other = tree.threads[:3]
    assert budget.threads_for_heads({trunk: 0.0, child: 0.0}) == {trunk}  # the answer waits for it
    assert budget.threads_for_heads({trunk: 0.9}) == set()  # its sibling leads
    assert budget.threads_for_heads({child: 0.0, other: 0.0}) == {child, other}
    assert 0.01 < budget.min_probability(1, 1, 1.0) < budget.min_probability(1, 1, 0.5) <= 0.5
    unlikely = Proposal(np.array([5]), np.array([-1]), np.array([budget.min_probability(1, 1, 1.0) * 0.9]))
    assert not budget.choose([unlikely], np.ones(1), 9)[0].size


def test_the_first_nodes_of_every_size_are_trees():
    """What is cut from a proposal is renumbered: a shape is known by its parents alone."""
    for parents in itertools.product([-1, 0], [-1, 0, 1], [-1, 0, 1, 2]):
        shape = medusa_apar.drafting.draft_tree.TreeShape.of(np.array([-1, *parents]))
        for node, parent in enumerate(shape.parents.tolist()):
            assert shape.depths[node] == (0 if parent < 0 else shape.depths[parent] + 1)
            assert shape.ancestors[node].sum() == shape.depths[node] + 1
