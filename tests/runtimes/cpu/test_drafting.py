"""Drafts of compiled Hydra heads are those of the heads in torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import medusa_apar
from medusa_apar import DraftTree
from medusa_apar.heads import HydraHeads
from medusa_apar.heads.drafters import PackedDrafter, TorchDrafter
from medusa_apar.runtimes.cpu.drafting import CompiledHydra
from tests.support.models import VOCAB, tiny_model
from tests.support.prompts import prompts

SHAPES = {
    "hydra": {},
    "two blocks": {"num_layers": 2},
    "aux layers": {"aux_layers": (0, 1)},
    "independent": {"sequential": False, "aux_layers": (1,)},
}
CHOICES = [(0,), (0, 0), (1,), (0, 1), (0, 0, 0), (2,), (1, 0), (0, 0, 1), (0, 0, 0, 0), (1, 0, 2), (1, 0, 2, 0)]


def heads_of(shape, dtype=torch.float32, mapped=False):
    model = tiny_model("wide_llama", seed=2).to(dtype)
    heads = HydraHeads.random(model, 4, seed=3, **SHAPES[shape])
    if mapped:
        state = heads.state_dict()
        state["token_map"] = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))[:40]
        if heads.aux_layers:
            state["aux_layers"] = torch.tensor(heads.aux_layers)
        heads = HydraHeads.from_state(state, {}, model)
    return heads


def both(heads, roots, tree, packing="float32", seed=0):
    hidden = torch.randn(len(roots), heads.input_size, generator=torch.Generator().manual_seed(seed)).to(heads.dtype)
    drafters = heads.drafter(), heads.drafter(packing)
    assert list(map(type, drafters)) == [TorchDrafter, CompiledHydra]
    return [drafter.propose(hidden, torch.tensor(roots), tree) for drafter in drafters]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(SHAPES)),
    st.booleans(),
    st.integers(1, len(CHOICES)),
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5),
    st.sampled_from([1, 2, 3]),
    st.integers(0, 99),
)
def test_compiled_drafts_are_those_of_torch(shape, mapped, nodes, roots, threads, seed):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tree = DraftTree(CHOICES[:nodes])
        (ids, log_probs), (compiled_ids, compiled) = both(heads_of(shape, mapped=mapped), roots, tree, seed=seed)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(compiled_ids, ids)
    torch.testing.assert_close(compiled, log_probs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_in_low_precision_they_are_close(kind):
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    (_, log_probs), (_, compiled) = both(heads_of("hydra", dtype), [5, 9, 30], DraftTree(CHOICES[:3]), kind)
    torch.testing.assert_close(compiled, log_probs.float(), rtol=0.1, atol=0.1)


def test_heads_that_change_are_packed_anew():
    heads = heads_of("hydra")
    tree = DraftTree(CHOICES[:4])
    both(heads, [5], tree)
    with torch.no_grad():
        before = heads.drafter("float32")
        assert heads.drafter("float32") is before
        heads.from_states.neg_()
        assert heads.drafter("float32") is not before
    (ids, _), (compiled_ids, _) = both(heads, [5], tree)
    assert torch.equal(compiled_ids, ids)


def test_heads_of_a_padded_unembedding_draft_in_torch():
    """What pads it has no embedding, which compiled code would look up."""
    model = tiny_model("wide_llama", seed=2)
    weight = model.lm_head.weight
    model.lm_head = torch.nn.Linear(model.config.hidden_size, VOCAB + 9)
    with torch.no_grad():
        model.lm_head.weight[:VOCAB] = weight
        model.lm_head.bias[:VOCAB], model.lm_head.bias[VOCAB:] = 0, -1e4
    hook = medusa_apar.attach(model, HydraHeads.random(model, 3, seed=3), runtime="cpu")
    assert type(hook.runtime.drafter(hook.heads)) is PackedDrafter
    call = prompts(1, 9) | {"do_sample": False, "max_new_tokens": 12}
    expected = model.generate(**call)
    assert torch.equal(hook.generate(**call), expected)


def test_tied_weights_are_looked_at_once():
    heads = heads_of("hydra")
    heads.base.lm_head.weight = heads.base.model.embed_tokens.weight
    seen = [weight.data_ptr() for weight in heads._weights_read()]
    assert len(seen) == len(set(seen)) and heads.base.lm_head.weight.data_ptr() in seen


@settings(max_examples=40, deadline=None)
@given(
    st.booleans(),
    st.integers(1, len(CHOICES)),
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5),
    st.floats(0.0005, 0.9),
    st.sampled_from([1, 2]),
)
def test_below_what_is_too_unlikely_nothing_is_looked_for(mapped, nodes, roots, least, threads):
    heads, tree = heads_of("hydra", mapped=mapped), DraftTree(CHOICES[:nodes])
    hidden = torch.randn(len(roots), heads.input_size, generator=torch.Generator().manual_seed(nodes))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        drafter = heads.drafter("float32")
        ids, log_probs = drafter.propose(hidden, torch.tensor(roots), tree)
        pruned_ids, pruned = drafter.propose(hidden, torch.tensor(roots), tree, least)
    finally:
        torch.set_num_threads(before)
    reach = torch.zeros(len(roots), len(tree))
    for node, parent in enumerate(tree.parents.tolist()):
        above = reach[:, parent] if parent >= 0 else torch.zeros(len(roots))
        reach[:, node] = above + log_probs[:, node]
        looked_for = above.exp() >= least if parent >= 0 else torch.ones(len(roots), dtype=torch.bool)
        assert torch.equal(pruned_ids[looked_for, node], ids[looked_for, node])
        assert torch.equal(pruned[looked_for, node], log_probs[looked_for, node])
        assert (pruned_ids[~looked_for, node] == -1).all() and (pruned[~looked_for, node] == -torch.inf).all()
