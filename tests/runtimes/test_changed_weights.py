"""However weights are changed between two calls, the next one writes what the model writes, with no new `attach`."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

import medusa_apar
from medusa_apar import DraftTree
from medusa_apar.heads import HydraHeads, MedusaHeads
from medusa_apar.heads.weight_copies import WeightCopies
from medusa_apar.runtimes.cpu import weight_fingerprint
from medusa_apar.runtimes.cpu.runtime import CpuRuntime
from tests.support.mapped_heads import MAP, mapped
from tests.support.models import VOCAB, model_of
from tests.support.prompts import prompts

INPUTS = prompts(2, 9, seed=4)
GREEDY = {"do_sample": False, "max_new_tokens": 24}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)


def merge_and_unload(model):
    assert get_peft_model(model, LORA).merge_and_unload() is model


def merge_adapter(model):
    get_peft_model(model, LORA).merge_adapter()


def unmerge_adapter(model):
    adapted = get_peft_model(model, LORA)
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    adapted.set_adapter("default")


def average(model):
    other = model_of(seed=8)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data.lerp_(theirs.data, 0.5)


def load(model):
    model.load_state_dict(model_of(seed=8).state_dict())


def train(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
    with torch.enable_grad():
        model(INPUTS["input_ids"], labels=INPUTS["input_ids"]).loss.backward()
    optimizer.step()


def flip(name):
    def change(model):
        dict([*model.named_parameters(), *model.named_buffers()])[name].data.neg_()

    return change


def poke(name):
    """One value."""

    def change(model):
        weight = model.get_parameter(name)
        weight.data.view(-1)[weight.numel() // 2] += 40

    return change


def replace(model):
    layer = model.model.layers[1].mlp.up_proj
    layer.weight.data = layer.weight.data * -2


def two_layers_swapped(model):
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def resize(model):
    model.resize_token_embeddings(VOCAB + 9, mean_resizing=False)
    model.lm_head.weight.data[VOCAB:] = model.lm_head.weight.data[5:14] * 1.5


LEAVE_LAYERS_IN = {"an adapter merged in place", "an adapter merged and taken out"}
CHANGES = {
    "an adapter merged": merge_and_unload,
    "an adapter merged in place": merge_adapter,
    "an adapter merged and taken out": unmerge_adapter,
    "weights averaged": average,
    "a state dict": load,
    "a training step": train,
    "a norm": flip("model.layers.1.input_layernorm.weight"),
    "the final norm": flip("model.norm.weight"),
    "the rotary frequencies": flip("model.rotary_emb.inv_freq"),
    "the embedding": flip("model.embed_tokens.weight"),
    "the unembedding": flip("lm_head.weight"),
    "a value of the unembedding": poke("lm_head.weight"),
    "a value of a layer": poke("model.layers.0.mlp.down_proj.weight"),
    "a tensor in place of another": replace,
    "two layers swapped": two_layers_swapped,
    "tokens added": resize,
}


@pytest.mark.parametrize("runtime", ["auto", "torch"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_next_call_is_the_models(change, runtime):
    model = model_of(seed=1)
    hook = medusa_apar.attach(model, HydraHeads.random(model, 3, seed=1), runtime=runtime)
    before = model.generate(**INPUTS, **GREEDY, custom_generate=hook)
    assert isinstance(hook.runtime, CpuRuntime) == (runtime == "auto")
    CHANGES[change](model)
    with torch.no_grad():
        expected = model.generate(**INPUTS, **GREEDY)
    assert torch.equal(model.generate(**INPUTS, **GREEDY, custom_generate=hook), expected)
    assert not torch.equal(expected, before)
    assert isinstance(hook.runtime, CpuRuntime) == (runtime == "auto" and change not in LEAVE_LAYERS_IN)


def test_biases_too():
    model = model_of("qwen2", seed=1)
    hook = medusa_apar.attach(model, runtime="cpu")
    model.generate(**INPUTS, **GREEDY, custom_generate=hook)
    model.model.layers[0].self_attn.k_proj.bias.data.add_(3)
    expected = model.generate(**INPUTS, **GREEDY)
    assert torch.equal(model.generate(**INPUTS, **GREEDY, custom_generate=hook), expected)


@pytest.mark.parametrize("change", ["weights averaged", "a value of the unembedding", "two layers swapped"])
def test_rounded_weights_follow(change):
    model = model_of(seed=1)
    hook = medusa_apar.attach(model, quantize="int8")
    before = model.generate(**INPUTS, **GREEDY, custom_generate=hook)
    CHANGES[change](model)
    fresh = copy.deepcopy(model)
    expected = fresh.generate(**INPUTS, **GREEDY, custom_generate=medusa_apar.attach(fresh, quantize="int8"))
    assert torch.equal(model.generate(**INPUTS, **GREEDY, custom_generate=hook), expected)
    assert not torch.equal(expected, before)


def test_a_new_attach_looks_at_every_weight(monkeypatch):
    """However small the change and large the model."""
    monkeypatch.setattr(weight_fingerprint, "_ALWAYS", 0)
    monkeypatch.setattr(weight_fingerprint, "_SHARE", 0.0)
    model = model_of(seed=1)
    medusa_apar.attach(model, runtime="cpu")
    for name in ("lm_head.weight", "model.layers.0.mlp.down_proj.weight"):
        poke(name)(model)
        hook = medusa_apar.attach(model, runtime="cpu")  # raises where its logits are not the model's
        expected = model.generate(**INPUTS, **GREEDY)
        assert torch.equal(model.generate(**INPUTS, **GREEDY, custom_generate=hook), expected)


@pytest.mark.parametrize("runtime", ["cpu", "torch"])
def test_refresh_reads_all_anew(runtime, monkeypatch):
    model = model_of(seed=1)
    heads = HydraHeads.random(model, 3, seed=1)
    hook = medusa_apar.attach(model, heads, runtime=runtime)
    # Nothing is ever noticed.
    monkeypatch.setattr(weight_fingerprint, "places", lambda tensors: [])
    monkeypatch.setattr(weight_fingerprint, "sums", lambda tensors, turn=None: torch.zeros(len(tensors), 16))
    hook.refresh()
    model.generate(**INPUTS, **GREEDY, custom_generate=hook)
    average(model)
    expected = model.generate(**INPUTS, **GREEDY)
    assert not torch.equal(model.generate(**INPUTS, **GREEDY, custom_generate=hook), expected)
    hook.refresh()
    assert torch.equal(model.generate(**INPUTS, **GREEDY, custom_generate=hook), expected)


HEADS = {
    "hydra": lambda model: HydraHeads.random(model, 3, seed=1),
    "hydra, a draft vocabulary": lambda model: mapped(HydraHeads.random(model, 3, seed=1)),
    "medusa, a draft vocabulary": lambda model: mapped(MedusaHeads.random(model, 3, seed=1)),
}
OF_HEADS = {
    "the unembedding": lambda model, heads: model.lm_head.weight.data.neg_(),
    "a value of the unembedding": lambda model, heads: model.lm_head.weight.data[MAP[3], 5].add_(30),
    "the embedding": lambda model, heads: model.model.embed_tokens.weight.data.neg_(),
    "a block": lambda model, heads: heads.blocks[0].weight.data.neg_(),
    "a bias": lambda model, heads: heads.blocks[0].bias.data.add_(2),
}


@pytest.mark.parametrize("packing", [None, "float32"])
@pytest.mark.parametrize("change", OF_HEADS)
@pytest.mark.parametrize("kind", HEADS)
def test_drafts_follow(kind, change, packing):
    model = model_of(seed=2)
    heads = HEADS[kind](model)
    tree = DraftTree([(0,), (0, 0), (1,), (0, 0, 0)])
    hidden = torch.randn(3, heads.input_size, generator=torch.Generator().manual_seed(0))

    def drafts():
        with torch.no_grad():
            return heads.drafter(packing).propose(hidden, torch.tensor([5, 6, 7]), tree)

    drafts()
    OF_HEADS[change](model, heads)
    found = drafts()
    heads.refresh()
    for ours, anew in zip(found, drafts(), strict=True):
        torch.testing.assert_close(ours, anew, rtol=0, atol=0)


class Interrupted(WeightCopies):
    """Another call refreshes them whenever it has been looked what there is."""

    @property
    def _copies(self):
        found = self.__dict__["known"]
        self.clear()
        return found

    @_copies.setter
    def _copies(self, copies):
        self.__dict__["known"] = copies


def test_heads_may_be_refreshed_while_a_call_begins():
    heads = mapped(MedusaHeads.random(model_of(seed=2), 3, seed=1))
    heads._copies = Interrupted()
    for _ in range(2):
        assert heads.drafter().rows.weight.shape == (len(MAP), heads.hidden_size)
