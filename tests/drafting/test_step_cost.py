"""How many nodes pay, by what a step costs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.drafting.step_cost import StepCost
from tests.support.acceptance import ACCEPTANCE, chance


@given(ACCEPTANCE, st.integers(1, 12), st.floats(1, 100), st.floats(0.1, 10), st.floats(0, 2))
def test_nodes_that_pay_are_the_best_of_all_sizes(acceptance, threads, fixed, row, level):
    tree = DraftTree.likeliest(12, acceptance)
    cost = StepCost(((1, fixed), (9, fixed), (10, fixed + row)), ((1, level),))

    def rate(nodes):
        tokens = 1 + sum(chance(choice, acceptance) for choice in tree.choices[:nodes])
        return tokens / (fixed + row * max(threads * (1 + nodes) - 9, 0) + level * (nodes > 0))

    assert rate(cost.nodes(threads, tree)) == pytest.approx(max(rate(n) for n in range(len(tree) + 1)))
    assert cost.nodes(threads, DraftTree(tree.choices)) == len(tree)  # chances that nobody said


def test_more_threads_draft_less_each():
    tree, cost = DraftTree.likeliest(15), StepCost(((1, 5), (2, 6)))
    nodes = [cost.nodes(threads, tree) for threads in range(1, 20)]
    assert nodes == sorted(nodes, reverse=True) and nodes[0] > 0 == nodes[-1]
