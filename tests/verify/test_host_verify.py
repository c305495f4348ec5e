"""Verification on the host against medusa-llm's own acceptance rule, and the fork rule against its plain-path twin."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.threads.fork_rule import ForkRule
from medusa_apar.verify.control_processor import ControlTokensLogitsProcessor
from tests.support.models import CONTROL, FORK
from tests.support.verifying import request_of, segment_of, verified_on_host


@settings(deadline=None)
@given(st.data())
def test_accepts_what_medusa_llm_accepts(data):
    evaluate_posterior = pytest.importorskip("medusa.model.utils").evaluate_posterior
    tree = DraftTree.likeliest(data.draw(st.integers(1, 12)))
    vocab = 4  # few ids, so that guesses are often right
    logits = torch.randn(len(tree) + 1, vocab, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999))))
    tokens: list[int] = []
    for node in range(len(tree)):
        taken = {tokens[n] for n in range(node) if tree.parents[n] == tree.parents[node]}
        free = [token for token in range(max(vocab, len(tree) + 1)) if token not in taken]
        tokens.append(data.draw(st.sampled_from(free)))
    (result,) = verified_on_host([segment_of(request_of([1, 2, 3]), None, tree, tokens)], logits)

    # Medusa's form: one padded candidate per node, root to node.
    paths = [[0]] + [[0] + [n + 1 for n in range(len(tree)) if tree.ancestors[node][n]] for node in range(len(tree))]
    longest = max(map(len, paths))
    ids = [3, *tokens]
    candidates = torch.tensor([[ids[n] for n in path] + [-1] * (longest - len(path)) for path in paths])
    padded = torch.stack([torch.stack([logits[n] for n in path + path[-1:] * (longest - len(path))]) for path in paths])
    best, length = evaluate_posterior(padded, candidates, 0, 0, 0)
    path = paths[int(best)]
    assert len(result.nodes) == int(length)
    assert [3, *result.tokens[:-1]] == [ids[n] for n in path[: int(length) + 1]]
    assert result.tokens[-1] == int(logits[path[int(length)]].argmax())


@settings(deadline=None)
@given(st.lists(st.sampled_from([5, 6, FORK]), max_size=6), st.integers(0, 2), st.booleans())
def test_the_fork_rule_is_the_plain_processors_rule(written, depth, fork):
    request = request_of([7, 8], rule=ForkRule.of(CONTROL, 2, fork), scores=True)
    thread = request.tree.trunk
    for _ in range(depth):
        thread.tokens += [5, FORK]
        thread = request.tree.fork(thread, len(thread.tokens) - 1, 0)
    thread.tokens += written
    logits = torch.zeros(1, 61)
    (result,) = verified_on_host([segment_of(request, thread)], logits)
    path = torch.tensor([thread.ancestor_ids() + thread.tokens])
    rule = ControlTokensLogitsProcessor(CONTROL, 2, fork, max_depth=2)
    assert torch.equal(result.scores[0], rule(path, logits)[0])
