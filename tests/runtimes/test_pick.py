"""Which runtime a model gets, however its weights are kept, and what becomes of that when it changes."""

from functools import partial

import numpy as np
import pytest
import torch
from accelerate import disk_offload, dispatch_model
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import medusa_apar
from medusa_apar.heads import HydraHeads, MedusaHeads
from medusa_apar.heads.drafters import TorchDrafter
from medusa_apar.runtimes import agreement
from medusa_apar.runtimes.agreement import _some_text
from medusa_apar.runtimes.cpu.drafting import CompiledHydra
from medusa_apar.runtimes.cpu.runtime import CpuRuntime
from medusa_apar.runtimes.packed_linear import PackedLinears, can_pack
from medusa_apar.runtimes.torch_runtime import TorchRuntime
from medusa_apar.said import say_once
from tests.support.models import VOCAB, model_of, tiny_model
from tests.support.prompts import prompts

INPUTS = prompts(2, 9)
GREEDY = {"do_sample": False, "max_new_tokens": 20}
HEADS = {
    "no heads": lambda model: None,
    "hydra": lambda model: HydraHeads.random(model, 3),
    "medusa": lambda model: MedusaHeads.random(model, 3),
}


class Rounded(torch.Tensor):
    """A weight as quantisers keep it: a subclass that becomes an ordinary tensor in whatever is done with it."""

    @staticmethod
    def __new__(cls, steps, scale):
        return torch.Tensor._make_wrapper_subclass(cls, steps.shape, dtype=scale.dtype, device=steps.device)

    def __init__(self, steps, scale):
        self.steps, self.scale = steps, scale

    def __tensor_flatten__(self):
        return ["steps", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].steps, args[0].scale)
        whole = lambda x: x.steps * x.scale if isinstance(x, cls) else x  # noqa: E731
        return function(*tree_map(whole, args), **tree_map(whole, kwargs or {}))


def quantised(model):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.detach().abs().amax(1, keepdim=True) / 127
            steps = (module.weight.detach() / scale).round().to(torch.int8)
            module.weight = nn.Parameter(Rounded(steps, scale), requires_grad=False)
    return model


@pytest.mark.parametrize("heads", HEADS)
def test_quantised_models_run_in_torch(heads):
    model = quantised(model_of(seed=1))
    hook = medusa_apar.attach(model, HEADS[heads](model))
    assert isinstance(hook.runtime, TorchRuntime)
    expected = model.generate(**INPUTS, **GREEDY)
    assert torch.equal(model.generate(**INPUTS, **GREEDY, custom_generate=hook), expected)
    with pytest.raises(ValueError, match="needs the CPU runtime, which cannot run this model: its weights are quant"):
        medusa_apar.attach(model, quantize="int8")


def wholly_offloaded(model, folder):
    disk_offload(model, folder, execution_device=torch.device("cpu"))
    return model


def partly_offloaded(model, folder):
    on_disk = {"model.layers.1": "disk", "model.layers.2": "disk", "lm_head": "disk"}
    kept = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb"), "cpu")
    return dispatch_model(model, kept | on_disk, main_device="cpu", offload_dir=folder)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("offloaded", [wholly_offloaded, partly_offloaded])
def test_offloaded_models_run_in_torch(offloaded, heads, tmp_path):
    model = model_of(seed=1)
    expected = model.generate(**INPUTS, **GREEDY)
    model = offloaded(model, tmp_path)
    hook = medusa_apar.attach(model, HEADS[heads](model))
    assert isinstance(hook.runtime, TorchRuntime)
    assert "torch on cpu in float32" in repr(hook)
    assert torch.equal(hook.generate(**INPUTS, **GREEDY), expected)
    with pytest.raises(ValueError, match="needs the CPU runtime, which cannot run this model: a .* has hooks"):
        medusa_apar.attach(model, runtime="cpu")


@pytest.mark.parametrize("make", [lambda w: w.to("meta"), lambda w: Rounded(w.to(torch.int8), torch.ones(len(w), 1))])
def test_what_cannot_be_read_is_not_packed(make):
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    layers[0].weight = nn.Parameter(make(layers[0].weight.data), requires_grad=False)
    assert not can_pack(layers[0].weight)
    with PackedLinears(layers).in_use():
        assert "forward" not in vars(layers[0]) and "forward" in vars(layers[1])


def test_a_model_on_several_gpus_is_refused():
    model = tiny_model()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for place, layer in enumerate(model.model.layers):
            norm = layer.input_layernorm
            norm.weight = nn.Parameter(torch.empty(norm.weight.shape, device=f"cuda:{place}"))
    with pytest.raises(ValueError, match="LlamaForCausalLM lies on 2 GPUs, and must lie on one here .* vLLM"):
        medusa_apar.attach(model)


def test_a_hook_follows_its_model():
    model = model_of(seed=1)
    hook = medusa_apar.attach(model, HydraHeads.random(model, 3))

    def check(kind, runtime):
        torch.manual_seed(0)
        expected = model.generate(**INPUTS, **GREEDY)
        assert torch.equal(model.generate(**INPUTS, **GREEDY, custom_generate=hook), expected)
        assert (hook.runtime.facts.kind, type(hook.runtime)) == (kind, runtime)
        drafts = CompiledHydra if runtime is CpuRuntime else TorchDrafter
        assert type(hook.runtime.drafter(hook.heads)) is drafts

    check("float32", CpuRuntime)
    model.to(torch.bfloat16)
    check("bfloat16", CpuRuntime)
    model.half()
    check("float16", TorchRuntime)
    model.float()
    check("float32", CpuRuntime)
    model.train()
    check("float32", TorchRuntime)
    model.eval()
    check("float32", CpuRuntime)


def test_a_hook_comes_back_when_its_model_does(caplog):
    """As where somebody looked at a layer for one call."""
    say_once.cache_clear()
    model = model_of(seed=1)
    hook = medusa_apar.attach(model, HydraHeads.random(model, 3))
    expected = model.generate(**INPUTS, **GREEDY)
    for generate in (hook.generate, partial(model.generate, custom_generate=hook)):
        for _ in range(2):
            handle = model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: None)
            for _ in range(2):
                assert torch.equal(generate(**INPUTS, **GREEDY), expected)
                assert isinstance(hook.runtime, TorchRuntime)
            handle.remove()
            assert torch.equal(generate(**INPUTS, **GREEDY), expected)
            assert isinstance(hook.runtime, CpuRuntime)
    said = [record.message for record in caplog.records if "from now on" in record.message]
    assert said == ["LlamaForCausalLM runs in torch from now on, since a LlamaMLP of the model has hooks."]


def test_other_threads_compile_between_a_calls_steps():
    """What runs our forests eagerly holds for a process, and so for no longer than it must."""
    model = model_of(seed=1)
    model.compile(backend="eager")
    hook = medusa_apar.attach(model, runtime="torch")
    model.generate(**INPUTS, **GREEDY, custom_generate=hook)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    double = torch.compile(lambda x: x * 2, backend=backend)
    with hook.runtime.session():
        assert double(torch.ones(2)).tolist() == [2, 2]
    assert len(compiled) == 1
    torch._dynamo.reset()


def in_place(model):
    model.compile(backend="eager")


def by_layer(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")


def by_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("compiled", [in_place, by_layer, by_forward])
def test_compiled_models_are_run_as_they_are(compiled, heads):
    model = model_of(seed=1)
    expected = model.generate(**INPUTS, **GREEDY)
    compiled(model)
    hook = medusa_apar.attach(model, HEADS[heads](model), runtime="torch")
    frames = torch._dynamo.utils.counters["frames"]["total"]
    assert torch.equal(hook.generate(**INPUTS, **GREEDY), expected)
    assert torch._dynamo.utils.counters["frames"]["total"] == frames  # nothing was compiled for it
    torch._dynamo.reset()


def halved(module, query, key, value, *args, **kwargs):
    return sdpa_attention_forward(module, query / 2, key, value, *args, **kwargs)


def test_attention_of_the_users_own_is_refused():
    AttentionInterface.register("halved", halved)
    for family in ("llama", "wide_llama"):
        model = tiny_model(family, scale=6.0)
        model.set_attn_implementation("halved")
        with pytest.raises(ValueError, match="over a KV pool its logits are .* off its own"):
            medusa_apar.attach(model)
    with pytest.raises(ValueError, match="over a KV pool its logits are .* off its own"):
        medusa_apar.attach(model, quantize="int8")


@pytest.mark.parametrize(("kind", "rows"), [(None, 1), ("int8", 3)])
def test_rounded_weights_may_tip_single_tokens_over_but_not_most(kind, rows, monkeypatch):
    over_a_forest, spoilt = agreement._over_a_forest, rows - 1

    def spoiling(*args):
        places, logits = over_a_forest(*args)
        logits[:spoilt] = -logits[:spoilt]
        return places, logits

    monkeypatch.setattr(agreement, "_over_a_forest", spoiling)
    model = tiny_model("wide_llama")
    medusa_apar.attach(model, runtime="cpu", quantize=kind)
    spoilt = rows
    with pytest.raises(ValueError, match="off its own"):
        medusa_apar.attach(model, runtime="cpu", quantize=kind)


def test_the_text_that_runtimes_are_held_against_is_of_all_tokens_and_long():
    for model in (tiny_model(), tiny_model("gpt2"), model_of()):
        ids, logits = _some_text(model)
        assert len(ids) == len(logits) == 256 and len(set(ids)) > 0.9 * VOCAB
        assert ids == _some_text(model)[0]


@pytest.mark.parametrize(("seconds", "length"), [(60.0, 256), (0.0, 16)])
def test_that_text_is_long_where_a_pass_is_quick(seconds, length, monkeypatch):
    """Which a model's size does not tell."""
    monkeypatch.setattr("medusa_apar.runtimes.agreement._WORK", 0)
    monkeypatch.setattr("medusa_apar.runtimes.agreement._SECONDS", seconds)
    model = model_of()
    ids, logits = _some_text(model)
    assert len(ids) == length and ids == np.random.default_rng(0).integers(VOCAB, size=256).tolist()[:length]
    torch.testing.assert_close(logits, model(torch.tensor([ids])).logits[0])
    medusa_apar.attach(model)


def test_a_model_whose_context_is_short_is_held_against_a_shorter_one():
    model = tiny_model()
    model.config.max_position_embeddings = 20
    assert len(_some_text(model)[0]) == 20
    medusa_apar.attach(model)
