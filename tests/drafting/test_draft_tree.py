"""Draft trees: the likeliest of their size, and well formed."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medusa_apar.drafting.draft_tree import DraftTree
from tests.support.acceptance import ACCEPTANCE, chance


@given(ACCEPTANCE, st.integers(0, 40))
def test_likeliest_tree_is_a_tree_and_optimal(acceptance, size):
    tree = DraftTree.likeliest(size, acceptance)
    chosen = set(tree.choices)
    assert len(chosen) == len(tree)
    for node, choice in enumerate(tree.choices):
        assert tree.parents[node] == (-1 if len(choice) == 1 else tree.choices.index(choice[:-1]))
        assert tree.parents[node] < node
        ancestors = {tree.choices[n] for n in np.flatnonzero(tree.ancestors[node])}
        assert ancestors == {choice[:length] for length in range(1, len(choice) + 1)}
    assert tree.chances == pytest.approx([chance(choice, acceptance) for choice in tree.choices])
    # Nothing left out is likelier than something taken in.
    worst = min((chance(choice, acceptance) for choice in chosen), default=1.0)
    for choice in [*chosen, ()]:
        if len(choice) < len(acceptance):
            for rank in range(len(acceptance[len(choice)])):
                candidate = (*choice, rank)
                if candidate not in chosen and len(tree) == size > 0:
                    assert chance(candidate, acceptance) <= worst * (1 + 1e-9)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_tree_equals_medusa_llm_buffers(widths):
    """The user's own medusa-llm as an independent oracle: ancestors, depths, and which guess a node takes."""
    utils = pytest.importorskip("medusa.model.utils")
    levels = [itertools.product(*map(range, widths[:depth])) for depth in range(1, len(widths) + 1)]
    tree = DraftTree([choice for level in levels for choice in level])
    buffers = utils.generate_medusa_buffers([1, *widths], device="cpu")
    mask = buffers["medusa_attn_mask"][0, 0].bool()
    assert mask[:, 0].all()  # everyone sees the root
    assert mask[1:, 1:].tolist() == tree.ancestors.tolist()
    assert list(buffers["medusa_position_ids"])[1:] == (tree.depths + 1).tolist()
    first_of_head = 1 + np.concatenate([[0], np.cumsum(widths)[:-1]])
    assert list(buffers["tree_indices"])[1:] == (first_of_head[tree.depths] + tree.ranks).tolist()


@pytest.mark.parametrize("choices", [[()], [(0, 0)], [(0,), (0,)], [(-1,)]])
def test_malformed_trees(choices):
    with pytest.raises(ValueError, match="(?i)draft tree"):
        DraftTree(choices)
