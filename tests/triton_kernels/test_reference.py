"""The references against the code they must agree with."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.forest.forest import Stem
from medusa_apar.heads import MedusaHeads
from medusa_apar.threads.paragraph_tree import ParagraphTree
from medusa_apar.threads.request import Request
from medusa_apar.triton_kernels import reference
from medusa_apar.triton_kernels.reference import Noise
from medusa_apar.verify.verifier import Verifier
from tests.support.models import CHILD, CONTROL, FORK, tiny_model


@settings(deadline=None)
@given(st.data(), st.none() | st.integers(0, 2**63 - 1))
def test_verify_chooses_what_the_verifier_chooses(data, seed):
    """Several threads, the fork rule, greedy and sampling; siblings' guesses differ, as a draft tree's do."""
    vocab = max(FORK, CHILD) + 1
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    stems, requests, tokens, parents, first_rows, positions = [], {}, [], [], [0], []
    for _ in range(data.draw(st.integers(1, 3))):
        draft_tree = DraftTree.likeliest(data.draw(st.integers(0, 10)))
        tree = ParagraphTree([1, 2, data.draw(st.sampled_from([3, FORK]))])
        stem = Stem(tree.trunk, 3, draft_tree=draft_tree, pending=tree.trunk.tokens[-1:])
        first = first_rows[-1]
        favourites = [FORK, 3, 4, 5, 6, 7, 8]
        stem.draft_tokens = [favourites[rank] for rank in draft_tree.ranks]
        stems.append(stem)
        requests[stem] = Request(0, 1, tree.trunk.tokens[:], tree.trunk.tokens, tree, 100)
        tokens += [stem.pending[-1], *stem.draft_tokens]
        parents += [-1, *(first + 1 + parent for parent in draft_tree.parents.tolist())]
        positions += [tree.trunk.end, *(tree.trunk.end + 1 + depth for depth in draft_tree.depths.tolist())]
        first_rows.append(first + 1 + len(draft_tree))
    logits = torch.randn(len(tokens), vocab, generator=generator)
    logits[:, [FORK, 3, 4, CHILD]] += 3.0
    verifier = Verifier(CONTROL, True, 3, LogitsProcessorList(), seed)
    verdicts = verifier(SimpleNamespace(verified=stems), logits.clone(), requests)

    noise = None
    if seed is not None:
        keys = torch.tensor([stem.thread.key for stem in stems])
        noise = Noise(torch.full_like(keys, seed), keys, torch.tensor(positions))
    out = reference.verify(
        logits,
        *(torch.tensor(numbers, dtype=torch.int32) for numbers in (tokens, parents, first_rows)),
        depth=4,
        bans=torch.tensor([token in (FORK, CHILD) for token in tokens]).int(),
        control=(FORK, CHILD),
        noise=noise,
    )
    for thread, verdict in enumerate(verdicts):
        length, first = int(out.lengths[thread]), first_rows[thread]
        assert out.tokens[thread, :length].tolist() == verdict.tokens
        assert out.rows[thread, : length - 1].tolist() == [first + 1 + node for node in verdict.nodes]
        assert int(out.last_rows[thread]) == verdict.row
        assert int(out.flags[thread]) == (FORK in verdict.tokens)


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
