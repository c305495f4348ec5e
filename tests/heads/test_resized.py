"""Heads of a model serve it after it has gained tokens, which they never draft."""

import copy
import pickle

import pytest
import torch

import medusa_apar
from medusa_apar import DraftTree
from medusa_apar.heads import HydraHeads, MedusaHeads, load_heads
from tests.support.models import VOCAB, model_of
from tests.support.prompts import prompts

INPUTS = prompts(2, 9)
GREEDY = {"do_sample": False, "max_new_tokens": 24}
HEADS = {
    "hydra": lambda model: HydraHeads.random(model, 3),
    "fused": lambda model: HydraHeads.random(model, 3, aux_layers=(1,), sequential=False),
    "medusa": lambda model: MedusaHeads.random(model, 3),
    "medusa of its own unembedding": lambda model: MedusaHeads.random(model, 3, layout="v1"),
}


def grow(model, added=9):
    """The new tokens are what every head would draft, if it could. No two are equally likely: which of two the larger
    is would be a matter of rounding."""
    model.resize_token_embeddings(VOCAB + added, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] = torch.linspace(50, 30, added)[:, None] * model.lm_head.weight[5]
        model.lm_head.weight[VOCAB + 1 :] *= -1


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("runtime", ["cpu", "torch"])
@pytest.mark.parametrize("kind", HEADS)
def test_heads_survive_added_tokens(kind, runtime, saved, tmp_path):
    model = model_of(seed=1)
    heads = HEADS[kind](model)
    hook = medusa_apar.attach(model, heads, runtime=runtime)
    hook.generate(**INPUTS, **GREEDY)
    if saved:
        heads.save_pretrained(tmp_path)
    grow(model)
    if saved:
        heads = load_heads(tmp_path, model)
        hook = medusa_apar.attach(model, heads, runtime=runtime)
    expected = model.generate(**INPUTS, **GREEDY)
    assert torch.equal(model.generate(**INPUTS, **GREEDY, custom_generate=hook), expected)
    hidden = torch.randn(4, heads.input_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        drafted, _ = heads.drafter().propose(
            hidden, torch.tensor([5, 6, 7, VOCAB + 2]), DraftTree([(0,), (1,), (0, 0)])
        )
    assert 0 <= int(drafted.min()) <= int(drafted.max()) < VOCAB


@pytest.mark.parametrize("kind", HEADS)
def test_lost_tokens_are_refused(kind):
    model = model_of(seed=1)
    hook = medusa_apar.attach(model, HEADS[kind](model))
    hook.generate(**INPUTS, **GREEDY)
    model.resize_token_embeddings(VOCAB - 1)
    with pytest.raises(ValueError, match=f"their vocabulary is {VOCAB}, the model's {VOCAB - 1}"):
        model.generate(**INPUTS, **GREEDY, custom_generate=hook)


def test_a_vocabulary_that_is_another_is_refused():
    heads = MedusaHeads.random(model_of(seed=1), 3)
    model = model_of(seed=1)
    model.resize_token_embeddings(VOCAB + 2000, mean_resizing=False)
    with pytest.raises(ValueError, match="heads of another model: their vocabulary"):
        heads.attach(model)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda heads: pickle.loads(pickle.dumps(heads))])
def test_heads_that_have_drafted_can_be_copied(copied, kind):
    model = model_of(seed=1)
    heads = HEADS[kind](model)
    hook = medusa_apar.attach(model, heads, runtime="cpu")
    expected = hook.generate(**INPUTS, **GREEDY)
    other = copied(heads)
    size = sum(tensor.nbytes for tensor in heads.state_dict().values())
    assert len(pickle.dumps(heads)) < size + 20_000  # neither the base nor what was copied of it
    hook = medusa_apar.attach(model, other.attach(model), runtime="cpu")
    assert torch.equal(hook.generate(**INPUTS, **GREEDY), expected)


@pytest.mark.parametrize("kind", HEADS)
def test_copied_heads_sit_on_the_same_base_or_on_its_copy(kind):
    model = model_of(seed=1)
    heads = HEADS[kind](model)
    assert copy.copy(heads).base is copy.deepcopy(heads).base is model
    other, theirs = copy.deepcopy((model, heads))
    assert theirs.base is other and theirs.state_dict().keys() == heads.state_dict().keys()
    with pytest.raises(RuntimeError, match="call attach"):
        assert pickle.loads(pickle.dumps(heads)).base


def test_that_added_tokens_are_never_drafted_is_said_once(caplog):
    model = model_of(seed=1)
    heads = MedusaHeads.random(model, 3)
    assert not caplog.records
    grow(model, added=13)  # of which no other test has heard
    hook = medusa_apar.attach(model, heads)
    for _ in range(2):
        hook.generate(**INPUTS, **GREEDY)
    said = [record.message for record in caplog.records if "never draft" in record.message]
    assert said == [
        f"these heads never draft 13 of the {VOCAB + 13} tokens of LlamaForCausalLM, which are new to them."
    ]
