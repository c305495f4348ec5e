"""The compiled runtime takes what transformers defines, module by module; all else runs in torch as it is there."""

import functools
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.mistral.modeling_mistral import MistralMLP

import medusa_apar
from medusa_apar.runtimes.cpu.runtime import CpuRuntime, unsupported_reason
from medusa_apar.runtimes.torch_runtime import TorchRuntime
from tests.support.models import VOCAB, model_of
from tests.support.prompts import prompts

INPUTS = prompts(1, 9)
GREEDY = {"do_sample": False, "max_new_tokens": 24}


def runs_in_torch(model):
    hook = medusa_apar.attach(model)
    assert isinstance(hook.runtime, TorchRuntime)
    expected = model.generate(**INPUTS, **GREEDY)
    assert torch.equal(model.generate(**INPUTS, **GREEDY, custom_generate=hook), expected)


class Louder(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 1.5


class LlamaMLP(modeling_llama.LlamaMLP):
    """A module with the very name of a known one."""

    def forward(self, x):
        return super().forward(x) * 1.5


class Wider(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.5


class LlamaForCausalLM(modeling_llama.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = -out.logits
        return out


def other_embedding(model):
    other = Louder(VOCAB, 96)
    other.weight = model.model.embed_tokens.weight
    model.model.embed_tokens = other


def other_module(name, kind):
    def change(model):
        model.model.get_submodule(name).__class__ = kind

    return change


def other_top(model):
    model.__class__ = LlamaForCausalLM


def swapped(name, make):
    def change(model):
        where, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(where), leaf, make())

    return change


def hooked(name, pre=False):
    def change(model):
        module = model.get_submodule(name)
        if pre:
            module.register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))
        else:
            module.register_forward_hook(lambda module, args, out: _scaled(out))

    return change


def _scaled(out):
    return tuple(part * 1.2 for part in out) if isinstance(out, tuple) else out * 1.2


def own_forward(name):
    def change(model):
        module = model.get_submodule(name)
        before = module.forward
        module.forward = lambda *args, **kwargs: _scaled(before(*args, **kwargs))

    return change


def normalised(model):
    model.model.embed_tokens.max_norm = 1.0


def layers_that_scale_otherwise(model):
    model.model.layers[1].self_attn.scaling *= 3
    model.model.layers[2].input_layernorm.variance_epsilon = 0.1


CHANGES = {
    "a subclass of the embedding": other_embedding,
    "an MLP of the name": other_module("layers.0.mlp", LlamaMLP),
    "another family's MLP": other_module("layers.0.mlp", MistralMLP),
    "a subclass of a linear layer": other_module("layers.1.self_attn.k_proj", Wider),
    "a subclass of the model": other_top,
    "another activation": swapped("model.layers.2.mlp.act_fn", nn.GELU),
    "no norm": swapped("model.layers.0.input_layernorm", nn.Identity),
    "a hook on the final norm": hooked("model.norm"),
    "a hook on a layer's norm": hooked("model.layers.0.post_attention_layernorm", pre=True),
    "a hook on the rotary embeddings": hooked("model.rotary_emb"),
    "a hook on the embedding": hooked("model.embed_tokens"),
    "a hook on the unembedding": hooked("lm_head", pre=True),
    "a hook on an activation": hooked("model.layers.1.mlp.act_fn"),
    "a forward of a norm's own": own_forward("model.norm"),
    "a forward of the rotary embeddings' own": own_forward("model.rotary_emb"),
    "a forward of a layer's own": own_forward("model.layers.1.mlp"),
    "embeddings that are normalised": normalised,
    "layers that scale otherwise": layers_that_scale_otherwise,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_with(change):
    model = model_of(seed=2)
    assert unsupported_reason(model) is None
    CHANGES[change](model)
    assert unsupported_reason(model)
    runs_in_torch(model)


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_becomes_one_with(change):
    """Behind the hook's back, between two calls."""
    model = model_of(seed=2)
    hook = medusa_apar.attach(model)
    model.generate(**INPUTS, **GREEDY, custom_generate=hook)
    CHANGES[change](model)
    expected = model.generate(**INPUTS, **GREEDY)
    assert torch.equal(model.generate(**INPUTS, **GREEDY, custom_generate=hook), expected)
    assert isinstance(hook.runtime, TorchRuntime)


@pytest.mark.parametrize("decorated", [False, True])
@pytest.mark.parametrize("name", ["LlamaMLP", "LlamaRMSNorm", "LlamaAttention", "LlamaDecoderLayer", "LlamaModel"])
def test_a_forward_that_was_replaced_in_the_class(name, decorated, monkeypatch):
    """By one that looks like it, too: `functools.wraps` takes over name, module and what it wraps."""
    kind = getattr(modeling_llama, name)
    before = kind.forward

    def forward(self, *args, **kwargs):
        out = before(self, *args, **kwargs)
        if name == "LlamaModel":
            out.last_hidden_state = out.last_hidden_state * 1.2
            return out
        return _scaled(out) if name != "LlamaAttention" else (out[0] * 1.2, *out[1:])

    model = model_of(seed=2)
    hook = medusa_apar.attach(model)
    monkeypatch.setattr(kind, "forward", functools.wraps(before)(forward) if decorated else forward)
    assert "forward pass" in unsupported_reason(model)
    runs_in_torch(model)
    expected = model.generate(**INPUTS, **GREEDY)
    assert torch.equal(model.generate(**INPUTS, **GREEDY, custom_generate=hook), expected)
    monkeypatch.undo()
    assert unsupported_reason(model) is None


@pytest.mark.parametrize("package", ["torchao", "torchtune", "transformers_too"])
def test_a_forward_of_a_package_whose_name_begins_like_torchs(package, monkeypatch):
    """It lies beside torch, and wraps what transformers defines."""
    before = modeling_llama.LlamaMLP.forward
    source = "def forward(self, x):\n    return before(self, x) * 1.2"
    made = {"before": before}
    exec(compile(source, str(Path(torch.__file__).parents[1] / package / "mlp.py"), "exec"), made)
    model = model_of(seed=2)
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", functools.wraps(before)(made["forward"]))
    assert "forward pass" in unsupported_reason(model)
    runs_in_torch(model)


def test_a_helper_that_was_replaced_in_transformers(monkeypatch):
    model = model_of(seed=2)
    before = modeling_llama.rotate_half
    monkeypatch.setattr(modeling_llama, "rotate_half", lambda x: before(x) * 0.9)
    assert "rotary" in unsupported_reason(model)
    runs_in_torch(model)


def test_a_model_that_was_asked_for_its_hidden_states_runs_compiled():
    """transformers leaves hooks in it, which pass everything on."""
    model = model_of()
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]), output_hidden_states=True, output_attentions=True)
    assert unsupported_reason(model) is None


def test_hooks_on_all_modules():
    model = model_of(seed=2)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out * 1.2 if type(module) is nn.Linear else None
    )
    try:
        assert "hooks" in unsupported_reason(model)
        runs_in_torch(model)
    finally:
        handle.remove()
    assert unsupported_reason(model) is None


def test_layers_of_other_sizes_than_the_config_says():
    """As pruning leaves them: compiled code would read beyond them."""
    model = model_of(seed=2)
    mlp = model.model.layers[1].mlp
    for name in ("gate_proj", "up_proj"):
        linear = nn.Linear(96, 48, bias=False)
        linear.weight.data = getattr(mlp, name).weight.data[:48].clone()
        setattr(mlp, name, linear)
    down = nn.Linear(48, 96, bias=False)
    down.weight.data = mlp.down_proj.weight.data[:, :48].clone()
    mlp.down_proj = down
    assert "another size" in unsupported_reason(model)
    runs_in_torch(model)


def test_fewer_layers_are_run_where_the_config_says_so():
    model = model_of(seed=2)
    hook = medusa_apar.attach(model)
    before = model.generate(**INPUTS, **GREEDY, custom_generate=hook)
    model.config.num_hidden_layers = 2
    expected = model.generate(**INPUTS, **GREEDY)
    assert not torch.equal(expected, before)
    assert torch.equal(model.generate(**INPUTS, **GREEDY, custom_generate=hook), expected)
    assert isinstance(hook.runtime, CpuRuntime)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_what_transformers_defines_is_taken(name):
    assert isinstance(medusa_apar.attach(model_of(name, seed=2)).runtime, CpuRuntime)
