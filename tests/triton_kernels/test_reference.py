"""The references against the code they must agree with."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.heads import MedusaHeads
from medusa_apar.threads.fork_rule import ForkRule
from medusa_apar.triton_kernels import reference
from medusa_apar.triton_kernels.reference import Noise, TypicalAcceptance
from tests.support.models import CHILD, CONTROL, FORK, tiny_model
from tests.support.verifying import request_of, segment_of, verified_on_host


@settings(deadline=None)
@given(st.data(), st.none() | st.integers(0, 2**63 - 1))
def test_verify_chooses_what_is_chosen_on_the_host(data, seed):
    """Several threads, greedy beside sampled, and the fork rule; siblings' tokens differ, as a draft tree's do."""
    vocab = max(FORK, CHILD) + 1
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    segments, tokens, parents, first_rows, positions, sampled = [], [], [], [0], [], []
    for _ in range(data.draw(st.integers(1, 3))):
        draft_tree = DraftTree.likeliest(data.draw(st.integers(0, 10)))
        first = first_rows[-1]
        favourites = [FORK, 3, 4, 5, 6, 7, 8]
        prompt = [1, 2, data.draw(st.sampled_from([3, FORK]))]
        sampled.append(seed is not None and data.draw(st.booleans()))
        request = request_of(prompt, rule=ForkRule.of(CONTROL), seed=seed if sampled[-1] else None)
        segment = segment_of(request, None, draft_tree, [favourites[rank] for rank in draft_tree.ranks])
        segments.append(segment)
        tokens += [prompt[-1], *segment.draft_tokens]
        parents += [-1, *(first + 1 + parent for parent in draft_tree.parents.tolist())]
        positions += [3, *(4 + depth for depth in draft_tree.depths.tolist())]
        first_rows.append(first + 1 + len(draft_tree))
    logits = torch.randn(len(tokens), vocab, generator=generator)
    logits[:, [FORK, 3, 4, CHILD]] += 3.0
    noise = None
    if seed is not None:
        keys = torch.from_numpy(np.array([segment.thread.key for segment in segments], dtype=np.uint64).view(np.int64))
        noise = Noise(torch.full_like(keys, seed), keys, torch.tensor(positions), torch.tensor(sampled).int())
    out = reference.verify(
        logits,
        *(torch.tensor(numbers, dtype=torch.int32) for numbers in (tokens, parents, first_rows)),
        depth=4,
        bans=torch.tensor([token in (FORK, CHILD) for token in tokens]).int(),
        control=(FORK, CHILD),
        noise=noise,
    )
    for thread, result in enumerate(verified_on_host(segments, logits)):
        length, first = int(out.lengths[thread]), first_rows[thread]
        assert out.tokens[thread, :length].tolist() == result.tokens
        assert out.rows[thread, : length - 1].tolist() == [first + 1 + node for node in result.nodes]
        assert int(out.last_rows[thread]) == result.row


@st.composite
def draft_trees(draw):
    """First row, stop, parents, tokens and depth; few tokens, so that siblings are often alike."""
    first = draw(st.integers(0, 3))
    stop = first + draw(st.integers(1, 12))
    parents = [-1] * (first + 1) + [draw(st.integers(first, row - 1)) for row in range(first + 1, stop)]
    ids = [draw(st.integers(-1, 3)) for _ in range(stop)]
    return first, stop, parents, ids, draw(st.integers(0, 6))


@given(draft_trees(), st.lists(st.integers(-1, 2), min_size=15, max_size=15))
def test_walk_follows_what_each_row_chooses(tree, chosen):
    first, stop, parents, ids, depth = tree
    asked = []

    def choose(row):
        asked.append(row)
        return chosen[row]

    def path_below(row, depth):
        right = [child for child in range(first + 1, stop) if parents[child] == row and ids[child] == chosen[row] >= 0]
        return [right[0], *path_below(right[0], depth - 1)] if right and depth else []

    accepted = reference.walk(first, stop, choose, ids, parents, depth)
    assert accepted == path_below(first, depth)
    assert asked == [first, *accepted]  # no row that is not reached, none twice; the last one gives the bonus token


@given(draft_trees(), st.integers(0, 999), st.sampled_from([(0.09, 0.3), (0.3, 1.0), (0.0, 0.05)]))
def test_likeliest_path_is_the_likeliest_of_the_longest(tree, seed, typical):
    first, stop, parents, ids, depth = tree
    epsilon, delta = typical
    logits = torch.randint(-2, 3, (stop, 3), generator=torch.Generator().manual_seed(seed)).float()
    log_probs = torch.stack([row.double().log_softmax(-1) for row in logits])
    limits = (delta * (log_probs.exp() * log_probs).sum(-1).exp()).clamp(max=epsilon)
    paths = {first: []}
    for row in range(first + 1, stop):
        parent, token = parents[row], ids[row]
        if parent in paths and 0 <= token < 3 and log_probs[parent, token].exp() > limits[parent]:
            paths[row] = [*paths[parent], row]
    paths = {row: path for row, path in paths.items() if len(path) <= depth}
    likelihoods = {row: sum(float(log_probs[parents[node], ids[node]]) for node in paths[row]) for row in paths}
    best = min(paths, key=lambda row: (-len(paths[row]), -likelihoods[row], row))

    asked = []

    def scores(row):
        asked.append(row)
        return logits[row]

    path = reference.likeliest_path(first, stop, scores, ids, parents, depth, TypicalAcceptance(*typical))
    assert path == paths[best]
    # Once each, the accepted rows that have children within the depth.
    inner = {row for row in paths if len(paths[row]) < depth and row in parents[first + 1 :]}
    assert sorted(asked) == sorted(inner)


class Counting(list):
    """A list that counts how often it is read."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("shape", ["chain", "star"])
@pytest.mark.parametrize("rule", ["walk", "likeliest_path"])
def test_both_rules_take_time_that_is_linear_in_the_nodes(rule, shape):
    nodes = 400
    parents = Counting([-1, *range(nodes)] if shape == "chain" else [-1, *[0] * nodes])
    ids = Counting([0] * nodes + [1])
    if rule == "walk":
        rows = reference.walk(0, nodes + 1, lambda row: int(row == nodes - 1 or shape == "star"), ids, parents, nodes)
    else:
        anything = TypicalAcceptance(0.0, 0.0)
        rows = reference.likeliest_path(0, nodes + 1, lambda row: torch.zeros(2), ids, parents, nodes, anything)
    assert rows == (list(range(1, nodes + 1)) if shape == "chain" else [nodes if rule == "walk" else 1])
    assert parents.reads + ids.reads <= 6 * nodes


@pytest.mark.parametrize("layout", ["v1", "v2"])
@pytest.mark.parametrize("mapped", [False, True])
def test_medusa_draft_proposes_what_the_heads_propose(layout, mapped):
    model = tiny_model()
    heads = MedusaHeads.random(model, num_heads=3, num_layers=2, layout=layout)
    if mapped:
        token_map = torch.randperm(heads.vocab_size, generator=torch.Generator().manual_seed(1))[:40]
        own = layout == "v1"
        mapped_heads = MedusaHeads(3, 2, heads.hidden_size, heads.vocab_size, own, token_map)
        mapped_heads.blocks = heads.blocks
        if own:
            mapped_heads.unembedding = torch.nn.Parameter(heads.unembedding[:, token_map])
        heads = mapped_heads.attach(model)
    weight, bias = heads.plain_unembedding()
    hidden_states = torch.randn(5, heads.hidden_size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        tokens, log_probs = reference.medusa_draft(
            hidden_states,
            [block.weight for block in heads.blocks],
            [block.bias for block in heads.blocks],
            weight if heads.unembedding is None else heads.unembedding,
            bias if heads.unembedding is None else None,
            heads.token_map,
            k=4,
        )
    expected, chances = heads.guess(hidden_states, None, 4)
    assert torch.equal(tokens.long(), expected)
    torch.testing.assert_close(log_probs, chances, rtol=0, atol=1e-5)
