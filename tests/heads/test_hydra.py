"""Hydra heads against the per-head, per-path definition; files; aux_layers."""

import json

import pytest
import torch
from torch.nn import functional as F

from medusa_apar import DraftTree
from medusa_apar.heads import HydraHeads, MedusaHeads, load_heads
from medusa_apar.runtimes.capture import Captured
from tests.support.models import CONFIGS, VOCAB, tiny_model

HIDDEN = 32


def naive_state(heads, model, hidden_state, path, head):
    """The module docstring's equation for one head and one path of drafted tokens, t+1 first."""
    x = heads.from_states[head] @ hidden_state + heads.bias[head]
    for token, token_id in enumerate(path[: head + 1] if heads.sequential else []):
        embedding = model.get_input_embeddings().weight[token_id]
        x = x + heads.from_token[token][head - token] @ (embedding / embedding.square().mean().sqrt())
    for block in heads.blocks:
        x = x + F.silu(block.weight[head] @ x + block.bias[head])
    return x


def inputs(rows, size=HIDDEN, heads=3):
    torch.manual_seed(0)
    return torch.randn(rows, size), torch.randint(VOCAB, (rows, heads))


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("num_layers", [0, 1, 2])
def test_logits_equal_the_definition(num_layers, sequential):
    model = tiny_model()
    heads = HydraHeads.random(model, 3, num_layers, sequential=sequential)
    hidden_states, drafted = inputs(4)
    logits = heads.logits(hidden_states, drafted)
    for row in range(4):
        for head in range(3):
            state = naive_state(heads, model, hidden_states[row], drafted[row].tolist(), head)
            torch.testing.assert_close(logits[head, row], model.lm_head(state), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize(
    "tree",
    [
        DraftTree([(0,), (0, 0), (0, 0, 0)]),
        DraftTree([(rank,) for rank in range(5)]),
        DraftTree.likeliest(20, [[0.5, 0.2, 0.1]] * 3),
        DraftTree([(2,), (2, 1), (0,), (2, 1, 3), (0, 0), (2, 1, 0), (0, 2), (0, 2, 1)]),
    ],
    ids=["chain", "star", "likeliest", "ragged"],
)
def test_proposals_follow_each_nodes_own_path(tree, truncated):
    model = tiny_model()
    heads = HydraHeads.random(model, 3)
    if truncated:
        state = heads.state_dict() | {"token_map": torch.randperm(VOCAB)[:23]}
        heads = HydraHeads.from_state(state, {}, model)
    hidden_states, _ = inputs(3)
    roots = torch.tensor([7, 50, 11])
    token_ids, log_probs = heads.drafter().propose(hidden_states, roots, tree)
    assert token_ids.dtype == torch.long and log_probs.dtype == torch.float32
    assert token_ids.shape == log_probs.shape == (3, len(tree))
    ids = torch.arange(VOCAB) if heads.token_map is None else heads.token_map
    for row in range(3):
        for node, choice in enumerate(tree.choices):
            above = [int(token_ids[row, tree.choices.index(choice[:depth])]) for depth in range(1, len(choice))]
            state = naive_state(heads, model, hidden_states[row], [int(roots[row]), *above], len(choice) - 1)
            best = model.lm_head(state)[ids].log_softmax(-1).topk(choice[-1] + 1)
            assert token_ids[row, node] == ids[best.indices[-1]]
            torch.testing.assert_close(log_probs[row, node], best.values[-1], atol=1e-4, rtol=1e-4)


def test_a_trees_first_nodes_are_proposed_alike():
    heads = HydraHeads.random(tiny_model(), 3)
    hidden_states, _ = inputs(2)
    tree, roots = DraftTree.likeliest(15), torch.tensor([3, 9])
    heads4 = HydraHeads.random(tiny_model(), 4)
    for some in (heads4, heads):
        whole = DraftTree.likeliest(15, [[0.5, 0.2, 0.1]] * 3) if some is heads else tree
        all_ids, all_chances = some.drafter().propose(hidden_states, roots, whole)
        for size in range(1, 16):
            token_ids, log_probs = some.drafter().propose(hidden_states, roots, whole.first(size))
            assert torch.equal(token_ids, all_ids[:, :size])
            torch.testing.assert_close(log_probs, all_chances[:, :size])


def test_guesses_are_what_a_chain_proposes():
    heads = HydraHeads.random(tiny_model(), 3)
    hidden_states, _ = inputs(4)
    roots = torch.tensor([7, 50, 11, 5])
    chain, chances = heads.drafter().propose(hidden_states, roots, DraftTree([(0,), (0, 0), (0, 0, 0)]))
    token_ids, log_probs = heads.guess(hidden_states, torch.cat([roots[:, None], chain[:, :2]], dim=1), 4)
    assert token_ids.shape == (4, 3, 4)
    assert torch.equal(token_ids[:, :, 0], chain)
    torch.testing.assert_close(log_probs[:, :, 0], chances)


def test_new_heads_propose_the_bases_next_token():
    model = tiny_model()
    heads = HydraHeads(2, 1, HIDDEN, VOCAB).attach(model)
    hidden_states, drafted = inputs(4, heads=2)
    torch.testing.assert_close(heads.logits(hidden_states, drafted), model.lm_head(hidden_states).expand(2, -1, -1))


def test_the_base_is_not_a_part_of_the_heads():
    heads = HydraHeads.random(tiny_model(), 2)
    assert set(heads.state_dict()) == {
        "from_states", "from_token.0", "from_token.1", "bias", "blocks.0.weight", "blocks.0.bias"
    }  # fmt: skip


@pytest.mark.parametrize("aux_layers", [(), (0, 1)])
@pytest.mark.parametrize("sequential", [True, False])
def test_round_trip(tmp_path, aux_layers, sequential):
    model = tiny_model()
    heads = HydraHeads.random(model, 3, 2, aux_layers=aux_layers, sequential=sequential)
    heads.acceptance = [[0.5, 0.25]] * 3
    heads.save_pretrained(tmp_path, dtype=torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["kind"] == ("hydra" if sequential else "fused")
    again = load_heads(tmp_path, model)
    assert isinstance(again, HydraHeads)
    assert (again.num_heads, again.num_layers, again.aux_layers, again.sequential) == (3, 2, aux_layers, sequential)
    assert again.acceptance == heads.acceptance
    for name, value in heads.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_each_kind_is_told_from_its_file(tmp_path):
    model = tiny_model()
    MedusaHeads.random(model).save_pretrained(tmp_path / "medusa")
    HydraHeads.random(model).save_pretrained(tmp_path / "hydra")
    assert isinstance(load_heads(tmp_path / "medusa", model), MedusaHeads)
    assert isinstance(load_heads(tmp_path / "hydra", model), HydraHeads)
    with pytest.raises(ValueError, match="no Hydra heads"):
        HydraHeads.from_pretrained(tmp_path / "medusa", model)
    assert load_heads(tmp_path / "hydra", model, torch.float64).dtype == torch.float64


def test_heads_that_do_not_fit_are_refused():
    model = tiny_model()
    state = HydraHeads.random(model).state_dict()
    with pytest.raises(ValueError, match="damaged"):
        HydraHeads.from_state({key: value for key, value in state.items() if key != "bias"}, {}, model)
    with pytest.raises(ValueError, match="base layer 2, but LlamaForCausalLM has layers 0 to 1"):
        HydraHeads.random(model, aux_layers=(2,))
    with pytest.raises(ValueError, match="need the tokens"):
        HydraHeads.random(model).logits(torch.zeros(1, HIDDEN))


@pytest.mark.parametrize("family", CONFIGS)
def test_taps_are_the_outputs_of_their_layers(family):
    model = tiny_model(family)
    hidden = model.config.hidden_size
    ids = torch.tensor([[5, 9, 30, 12]])
    rows = torch.tensor([1, 3])
    with torch.no_grad(), Captured(model, (0,)) as captured:
        out = model(ids, output_hidden_states=True)
    states = captured.hidden_states(rows)
    assert states.shape == (2, 2 * hidden)
    expected = out.hidden_states[1][0, rows]
    expected = expected / (expected.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    torch.testing.assert_close(states[:, hidden:], expected)
    final = out.hidden_states[-1][0, rows]
    torch.testing.assert_close(states[:, :hidden], final)


@pytest.mark.parametrize("packing", [None, "float32"])
def test_another_draft_vocabulary_is_the_same_heads_over_other_ids(packing):
    """What was copied for the old one is dropped, and the drafts are the old ones as far as they are left."""
    model = tiny_model()
    heads = HydraHeads.random(model, 2)
    hidden_states, drafted = inputs(5, heads=2)
    roots, tree = drafted[:, 0], DraftTree([(rank,) for rank in range(6)])
    whole = heads.logits(hidden_states, drafted)
    heads.drafter(packing).propose(hidden_states, roots, tree)
    for ids in (torch.arange(3, VOCAB, 4), torch.arange(0, VOCAB, 5), None):
        heads.propose_only(ids)
        kept = torch.arange(VOCAB) if ids is None else ids
        torch.testing.assert_close(heads.logits(hidden_states, drafted), whole[..., kept], atol=1e-5, rtol=1e-5)
        found, _ = heads.drafter(packing).propose(hidden_states, roots, tree)
        path = roots[:, None].expand(-1, 2)  # a head's first guesses hang on the root alone
        best = heads.logits(hidden_states, path)[0].topk(6).indices
        assert torch.equal(found, kept[best])
    with pytest.raises(ValueError, match="repeats 1 of its 2 ids"):
        heads.propose_only(torch.tensor([4, 4]))
    owning = MedusaHeads.random(model, 2, layout="v1")
    with pytest.raises(ValueError, match="these medusa heads own their unembedding"):
        owning.propose_only(torch.arange(4))
