"""Heads that draft with the kernels propose what they propose in torch."""

import pytest
import torch

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.heads import DraftHeads, HydraHeads, MedusaHeads
from medusa_apar.runtimes.runtime import RuntimeFacts
from medusa_apar.runtimes.torch_runtime import TorchRuntime
from medusa_apar.triton_kernels.layout import MAX_NODES
from tests.support.models import VOCAB, tiny_model

TREE = DraftTree([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])


def made(kind: str):
    model = tiny_model()
    if kind == "hydra":
        return HydraHeads.random(model)
    heads = MedusaHeads.random(model, layout="v1" if kind == "medusa v1" else "v2", num_layers=2)
    return heads


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("kind", ["medusa v1", "medusa v2", "hydra"])
def test_kernels_propose_what_torch_proposes(kind, truncated, monkeypatch):
    heads = made(kind)
    if truncated and kind != "medusa v1":
        heads.token_map = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))[:40]
        heads.draft_vocab_size = 40
    states, roots = torch.randn(5, heads.input_size), torch.tensor([5, 6, 7, 8, 9])
    expected_ids, expected = heads.drafter().propose(states, roots, TREE)
    monkeypatch.setattr(DraftHeads, "top", None)  # torch's way is not taken
    runtime = TorchRuntime(heads.base, "triton")
    ids, log_probs = runtime.drafter(heads).propose(states, roots, TREE)
    assert ids.dtype == expected_ids.dtype and torch.equal(ids, expected_ids)
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-5)


def test_hydra_heads_without_residual_blocks():
    heads = HydraHeads.random(tiny_model(), num_layers=0)
    states, roots = torch.randn(3, heads.input_size), torch.tensor([5, 6, 7])
    expected, _ = heads.drafter().propose(states, roots, TREE)
    assert torch.equal(heads.drafter(kernels=True).propose(states, roots, TREE)[0], expected)


@pytest.mark.parametrize("graphs", [False, True])
def test_the_facts_of_a_runtime_with_kernels(graphs):
    facts = TorchRuntime(tiny_model(), "triton", graphs).facts
    assert facts == RuntimeFacts("float32", "triton", graphs, MAX_NODES, fused_verify=True)
