"""Heads against the per-head definition, and against the base they sit on."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import CohereConfig, CohereForCausalLM, LlamaConfig, LlamaForCausalLM

from medusa_apar import DraftTree
from medusa_apar.heads import MedusaHeads

HIDDEN, VOCABULARY = 24, 61


def tiny_model(seed=0, hidden=HIDDEN, vocabulary=VOCABULARY, dtype=torch.float32):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def naive_logits(heads, hidden_states, unembedding):
    """The paper's equation, head by head."""
    tensors, out = heads.tensors(), []
    for head in range(heads.num_heads):
        x = hidden_states
        for layer in range(heads.num_layers):
            x = x + F.silu(F.linear(x, tensors.weight[layer, head], tensors.bias[layer, head]))
        own = unembedding if tensors.unembedding is None else tensors.unembedding[head]
        out.append(x @ own.mT)
    return torch.stack(out)


@pytest.mark.parametrize("layout", ["v1", "v2"])
@pytest.mark.parametrize(("num_heads", "num_layers", "rows"), [(1, 1, 1), (3, 1, 5), (4, 2, 7), (2, 3, 1)])
def test_logits_equal_the_definition(layout, num_heads, num_layers, rows):
    model = tiny_model()
    heads = MedusaHeads.random(model, num_heads, num_layers, layout=layout)
    hidden_states = torch.randn(rows, HIDDEN)
    expected = naive_logits(heads, hidden_states, model.lm_head.weight)
    torch.testing.assert_close(heads.logits(hidden_states), expected)
    assert heads.logits(hidden_states).shape == (num_heads, rows, VOCABULARY)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_hidden_takes_any_leading_shape(num_layers):
    heads = MedusaHeads.random(tiny_model(), 3, num_layers)
    hidden_states = torch.randn(2, 5, HIDDEN)
    out = heads.hidden(hidden_states)
    assert out.shape == (3, 2, 5, HIDDEN)
    torch.testing.assert_close(out[:, 1], heads.hidden(hidden_states[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("truncated", [False, True])
def test_guesses_are_the_sorted_top_of_each_head(dtype, truncated):
    model = tiny_model(dtype=dtype)
    token_map = torch.randperm(VOCABULARY)[:17] if truncated else None
    heads = MedusaHeads(3, 1, HIDDEN, VOCABULARY, token_map=token_map, dtype=dtype).attach(model)
    hidden_states = torch.randn(6, HIDDEN, dtype=dtype)
    token_ids, log_probs = heads.guess(hidden_states, None, 5)
    assert token_ids.shape == log_probs.shape == (6, 3, 5)
    assert token_ids.dtype == torch.long
    assert log_probs.dtype == torch.float32
    expected = heads.logits(hidden_states).float().log_softmax(-1)
    ids = torch.arange(VOCABULARY) if token_map is None else token_map
    for row in range(6):
        for head in range(3):
            best = expected[head, row].topk(5)
            torch.testing.assert_close(log_probs[row, head], best.values)
            assert token_ids[row, head].tolist() == ids[best.indices].tolist()
            assert len(set(token_ids[row, head].tolist())) == 5


@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_proposals_are_the_guesses_of_the_trees_nodes(layout):
    heads = MedusaHeads.random(tiny_model(), 3, layout=layout)
    hidden_states, tree = torch.randn(4, HIDDEN), DraftTree([(2,), (2, 1), (0,), (0, 0)])
    token_ids, log_probs = heads.drafter().propose(hidden_states, torch.zeros(4, dtype=torch.long), tree)
    ids, chances = heads.guess(hidden_states, None, 3)
    for node, (depth, rank) in enumerate([(0, 2), (1, 1), (0, 0), (1, 0)]):
        assert torch.equal(token_ids[:, node], ids[:, depth, rank])
        torch.testing.assert_close(log_probs[:, node], chances[:, depth, rank])


def test_zero_heads_propose_the_bases_next_token():
    model = tiny_model()
    heads = MedusaHeads(2, 2, HIDDEN, VOCABULARY).attach(model)
    hidden_states = torch.randn(4, HIDDEN)
    expected = model.lm_head(hidden_states)
    torch.testing.assert_close(heads.logits(hidden_states), expected.expand(2, -1, -1))


def test_token_map_rows_follow_the_base():
    model = tiny_model()
    token_map = torch.tensor([60, 3, 17])
    heads = MedusaHeads(2, 1, HIDDEN, VOCABULARY, token_map=token_map).attach(model)
    hidden_states = torch.randn(4, HIDDEN)
    assert heads.guess(hidden_states, None, 3)[0].unique().tolist() == [3, 17, 60]
    first = heads.draft_rows().weight
    assert heads.draft_rows().weight is first  # copied once
    assert not first.is_inference()  # though `guess`, under inference mode, made it
    with torch.no_grad():
        model.lm_head.weight.mul_(-2)
    torch.testing.assert_close(heads.draft_rows().weight, model.lm_head.weight[token_map])
    model.double()
    assert heads.draft_rows().weight.dtype == torch.float64


def test_token_map_takes_the_bases_bias_too():
    model = tiny_model()
    model.lm_head = torch.nn.Linear(HIDDEN, VOCABULARY)
    heads = MedusaHeads(1, 1, HIDDEN, VOCABULARY, token_map=torch.tensor([5, 1])).attach(model)
    hidden_states = torch.randn(4, HIDDEN)
    torch.testing.assert_close(heads.logits(hidden_states)[0], model.lm_head(hidden_states)[:, [5, 1]])


@pytest.mark.parametrize(
    ("token_map", "words"),
    [([1, 1, 2], "repeats 1"), ([0, VOCABULARY], f"holds id {VOCABULARY}"), ([-1, 2], "holds id -1"), ([], "shape")],
)
def test_bad_token_maps_are_refused(token_map, words):
    with pytest.raises(ValueError, match=words):
        MedusaHeads(1, 1, HIDDEN, VOCABULARY, token_map=torch.tensor(token_map))


def test_scaled_logits_are_scaled_for_the_heads_too():
    torch.manual_seed(0)
    config = CohereConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, logit_scale=0.25,
    )  # fmt: skip
    model = CohereForCausalLM(config).eval()
    heads = MedusaHeads(1, 1, HIDDEN, VOCABULARY).attach(model)
    out = model(torch.tensor([[1, 2, 3]]), output_hidden_states=True)
    torch.testing.assert_close(heads.logits(out.hidden_states[-1][0])[0], out.logits[0])


def test_the_base_is_not_a_part_of_the_heads():
    model = tiny_model()
    heads = MedusaHeads.random(model, num_heads=2)
    assert sum(p.numel() for p in heads.parameters()) == 2 * (HIDDEN * HIDDEN + HIDDEN)
    assert not any("lm_head" in key or "embed" in key for key in heads.state_dict())
    heads.double()
    assert model.dtype == torch.float32


def test_random_is_deterministic_and_leaves_the_global_state_alone():
    model = tiny_model(dtype=torch.bfloat16)
    before = torch.get_rng_state()
    first, again, other = (MedusaHeads.random(model, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(before, torch.get_rng_state())
    assert first.dtype == torch.bfloat16
    assert torch.equal(first.blocks[0].weight, again.blocks[0].weight)
    assert not torch.equal(first.blocks[0].weight, other.blocks[0].weight)


def test_drafts_follow_the_parameters():
    heads = MedusaHeads.random(tiny_model())
    hidden_states = torch.randn(3, HIDDEN)
    before = heads.guess(hidden_states, None, 4)[1]
    with torch.no_grad():
        heads.blocks[0].weight.mul_(30)
    assert not torch.equal(before, heads.guess(hidden_states, None, 4)[1])


def test_heads_of_another_model_are_refused():
    heads = MedusaHeads.random(tiny_model())
    with pytest.raises(ValueError, match="hidden size is 24, the model's 32"):
        heads.check_matches(tiny_model(hidden=32))
    with pytest.raises(ValueError, match="vocabulary is 61, the model's 60"):
        heads.attach(tiny_model(vocabulary=60))


def test_heads_without_a_base_say_so():
    with pytest.raises(RuntimeError, match="attach"):
        MedusaHeads(1, 1, HIDDEN, VOCABULARY).guess(torch.zeros(1, HIDDEN), None, 1)


def test_heads_can_be_copied():
    heads = MedusaHeads.random(tiny_model())
    hidden_states = torch.randn(3, HIDDEN)
    torch.testing.assert_close(copy.deepcopy(heads).logits(hidden_states), heads.logits(hidden_states))
