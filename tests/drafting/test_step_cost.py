"""How many nodes pay, by what a step costs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.drafting.step_cost import LearnedCost, StepCost
from tests.support.acceptance import ACCEPTANCE, chance


@given(ACCEPTANCE, st.integers(1, 12), st.floats(1, 100), st.floats(0.1, 10), st.floats(0, 2))
def test_nodes_that_pay_are_the_best_of_all_sizes(acceptance, threads, fixed, row, level):
    tree = DraftTree.likeliest(12, acceptance)
    cost = StepCost(((1, fixed), (9, fixed), (209, fixed + 200 * row)), ((1, level),))

    def rate(nodes):
        tokens = 1 + sum(chance(choice, acceptance) for choice in tree.choices[:nodes])
        return tokens / (fixed + row * max(threads * (1 + nodes) - 9, 0) + level * (nodes > 0))

    assert rate(cost.nodes(threads, tree)) == pytest.approx(max(rate(n) for n in range(len(tree) + 1)))
    assert cost.nodes(threads, DraftTree(tree.choices)) == len(tree)  # chances that nobody said


def test_more_threads_draft_less_each():
    tree, cost = DraftTree.likeliest(15), StepCost(((1, 5), (2, 6)))
    nodes = [cost.nodes(threads, tree) for threads in range(1, 20)]
    assert nodes == sorted(nodes, reverse=True) and nodes[0] > 0 == nodes[-1]


def test_a_cost_that_was_measured_while_the_machine_was_busy_becomes_that_of_the_steps_that_run():
    true = StepCost(((1, 10.0), (4, 13.0), (8, 18.0), (32, 60.0)), ((1, 2.0), (8, 3.0)))
    busy = StepCost(tuple((size, 3 * cost) for size, cost in true.curve), ((1, 24.0), (8, 24.0)))
    learned = LearnedCost(busy)
    random = np.random.default_rng(0)
    for rows in random.integers(1, 9, 600).tolist():
        learned.observe(rows, 1e-3 * float(true.rows(rows)[-1]))
    for _ in range(40):
        learned.observe_draft(1, 2e-3)
    np.testing.assert_allclose(learned.rows(8), true.rows(8), rtol=0.1)
    assert learned.rows(32)[-1] < 0.7 * busy.rows(32)[-1]  # never seen, but the machine is the same
    assert abs(learned.drafting(1) - 2.0) < 0.1
    costs = [cost for _, cost in learned.cost.curve]
    assert costs == sorted(costs)


def test_one_slow_moment_and_what_is_larger_than_was_measured_change_little():
    learned = LearnedCost(StepCost(((1, 10.0), (8, 18.0)), ((1, 2.0),)))
    for _ in range(15):
        learned.observe(4, 1e-3 * float(learned.rows(4)[-1]))
    learned.observe(4, 5.0)
    learned.observe(4000, 5.0)
    learned.observe_draft(1, 5.0)
    assert learned.steps == 16 and learned.rows(4)[-1] < 1.05 * StepCost(((1, 10.0), (8, 18.0))).rows(4)[-1]
    assert learned.drafting(1) < 2.5
