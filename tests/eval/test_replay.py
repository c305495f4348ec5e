"""Replayed steps are the decoder's own, for every kind of heads, with threads and without."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medusa_apar import attach
from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.eval import weights
from medusa_apar.eval.answering import answer
from medusa_apar.eval.replay import Drafting, path_log_probs, replay
from medusa_apar.heads import HydraHeads, MedusaHeads
from medusa_apar.heads.ask import as_record
from tests.support.models import CONTROL, EOS, forking_model

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16], [20, 21, 22]]
TREE = DraftTree.likeliest(12, [[0.5, 0.3, 0.2]] * 3)


def some_heads(model, kind):
    if kind == "medusa":
        return MedusaHeads.random(model, num_heads=3)
    return HydraHeads.random(model, num_heads=3, aux_layers=(0,) if kind == "aux_layers" else ())


def records(model, prompts, limit, fork):
    """Answers decoded without heads, in the format of `heads.ask`."""
    apar = attach(model, None, CONTROL, speculation="off")
    found = []
    for prompt in prompts:
        output = apar.generate(
            torch.tensor([prompt]), max_new_tokens=limit, do_sample=False, fork=fork, return_dict_in_generate=True
        )
        found.append(as_record("", output.paragraph_tree[0]))
    return found


@pytest.mark.parametrize("kind", ["medusa", "hydra", "aux_layers"])
@pytest.mark.parametrize("fork", [False, True])
@pytest.mark.parametrize("seed", [0, 3])
def test_replayed_steps_are_the_decoders(kind, fork, seed):
    model = forking_model(seed)
    heads = some_heads(model, kind)
    limit = 40
    apar = attach(model, heads, CONTROL, draft_tree=TREE, budget=13 * weights.MAX_THREADS)
    control = frozenset({CONTROL.fork_id, CONTROL.child_id})
    answers = records(model, PROMPTS, limit, fork)
    replayed = replay(heads, answers, Drafting(TREE), [EOS], [limit] * len(answers), control)
    speculated = 0
    for prompt, found in zip(PROMPTS, replayed, strict=True):
        [real] = answer(apar, [prompt], limit, fork=fork)
        assert found.steps == real["steps"]
        speculated += real["gained"] - real["thread_steps"]
        if not fork:  # with threads, what lies behind the limit depends on when the answer is done
            assert found.thread_steps == real["thread_steps"]
            assert 0 <= real["gained"] - found.gained <= TREE.num_heads
    assert speculated > 0  # or nothing was compared


@pytest.mark.parametrize("limit", [1, 5, 17])
def test_a_lower_limit_is_reached_as_early_as_the_decoder_does(limit):
    """The same record serves every limit below its own."""
    model = forking_model(3)
    heads = some_heads(model, "hydra")
    apar = attach(model, heads, CONTROL, draft_tree=TREE, budget=13 * weights.MAX_THREADS)
    control = frozenset({CONTROL.fork_id, CONTROL.child_id})
    answers = records(model, PROMPTS, 40, True)
    replayed = replay(heads, answers, Drafting(TREE), [EOS], [limit] * len(answers), control)
    for prompt, found in zip(PROMPTS, replayed, strict=True):
        assert found.steps == answer(apar, [prompt], limit, fork=True)[0]["steps"]


def test_the_likeliest_nodes_of_a_larger_tree_are_kept():
    """Whatever the order of the tree, its few nodes with the greatest chance are what is drafted."""

    class Guesses:
        def propose(self, hidden, roots, tree):
            chances = torch.tensor([[0.1, 0.6, 0.5, 0.9, 0.05], [0.7, 0.2, 0.9, 0.1, 0.9]])
            return torch.zeros(2, 5, dtype=torch.long), chances.log()

    tree = DraftTree([(0,), (1,), (0, 0), (1, 0), (1, 1)])
    _, kept = Drafting(tree, 2).propose(Guesses(), torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))
    assert kept.tolist() == [[False, True, False, True, False], [True, False, True, False, False]]


def test_fewer_nodes_take_no_fewer_steps():
    model = forking_model(0)
    heads = some_heads(model, "hydra")
    answers = records(model, PROMPTS, 40, False)
    few, many = (
        [found.steps for found in replay(heads, answers, drafting, [EOS], [40] * len(answers))]
        for drafting in (Drafting(TREE, 3), Drafting(TREE))
    )
    assert all(one >= other for one, other in zip(few, many, strict=True)) and few != many


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.lists(st.floats(0.01, 0.9), min_size=1, max_size=4), min_size=1, max_size=4), st.data())
def test_kept_nodes_are_a_tree(table, data):
    """Whatever the chances, ties among them, a kept node's parent is kept."""

    class Guesses:
        def propose(self, hidden, roots, tree):
            levels = st.sampled_from([0.0, -0.1, -0.1, -1.0, -3.0])
            rows = data.draw(st.lists(st.lists(levels, min_size=len(tree), max_size=len(tree)), min_size=2, max_size=2))
            return torch.zeros(2, len(tree), dtype=torch.long), torch.tensor(rows)

    tree = DraftTree.likeliest(20, table)
    nodes = data.draw(st.integers(1, len(tree)))
    _, kept = Drafting(tree, nodes).propose(Guesses(), torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))
    assert (kept.sum(1) == nodes).all()
    for node, parent in enumerate(tree.parents):
        assert parent < 0 or not (kept[:, node] & ~kept[:, parent]).any()


def test_path_log_probs_multiply_down_the_tree():
    tree = DraftTree([(0,), (0, 0), (1,), (0, 0, 0)])
    chances = path_log_probs(tree, torch.tensor([[-1.0, -2.0, -3.0, -4.0]]))
    assert chances.tolist() == [[-1.0, -3.0, -3.0, -7.0]]
