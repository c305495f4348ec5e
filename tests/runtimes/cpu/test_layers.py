"""Every family's layers are transformers' own: norms, caps, windows, rotary tables, fused projections, rounded ones."""

import pytest
import torch
from torch import nn

from medusa_apar.runtimes.cpu.runtime import CpuRuntime, unsupported_reason
from medusa_apar.runtimes.cpu.weights import PackedMatrix, rounded
from tests.support.models import COMPILED, model_of, random_model
from tests.support.path_logits import path_logits
from tests.support.prompts import prompts


@pytest.mark.parametrize("name", COMPILED)
def test_logits_are_those_of_transformers_whatever_the_norms(name):
    """Norms of a fresh model are all alike: one in another's place would not be seen."""
    model = random_model(COMPILED[name](), 1, 2.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    ids = prompts(1, 30, 2)["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits[0]
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(
        path_logits(CpuRuntime(model, "float32"), ids[0].tolist()), expected, rtol=1e-3, atol=1e-3
    )


def padded(x):
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % 64))


@pytest.mark.parametrize("name", ["qwen2", "olmo2", "phi3", "gemma3"])
def test_int8_is_transformers_on_rounded_weights_and_activations(name):
    """One layer, since a step that rounds the other way, for the pool's sake, changes all that comes behind."""
    off = effect = 0.0
    for seed in range(4):
        model = random_model(COMPILED[name](), seed, 1.0)
        model.config.num_hidden_layers, model.model.layers = 1, model.model.layers[:1]
        ids = prompts(1, 40, seed)["input_ids"]
        ours = path_logits(CpuRuntime(model, "int8"), ids[0].tolist())
        linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        with torch.no_grad():
            for linear in linears:
                linear.weight = torch.nn.Parameter(PackedMatrix(linear.weight, "int8").dense())
            found = []
            for prepared in (padded, rounded):
                hooks = [each.register_forward_pre_hook(lambda _, x, f=prepared: (f(*x),)) for each in linears]
                found.append(model(ids).logits[0])
                for hook in hooks:
                    hook.remove()
            weights_alone, expected = found
        off += float((ours - expected).abs().mean())
        effect += float((weights_alone - expected).abs().mean())
    print(off, effect)
    assert off < 0.7 * effect


class Nothing(nn.Module):
    def forward(self, x):
        return x * 0


def windows_of_2(model):
    model.config.sliding_window = 2


def other_kinds(model):
    model.config.layer_types = model.config.layer_types[::-1]


def one_cap(model):
    model.model.layers[1].self_attn.attn_logit_softcapping = 0.5


def no_mlp(model):
    model.model.layers[1].resid_mlp_dropout = Nothing()


def drops(model):
    model.model.layers[1].resid_attn_dropout.p = 0.5
    model.model.layers[1].resid_attn_dropout.train()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *[(name, windows_of_2) for name in ("gemma2", "gemma3", "qwen2, windows", "mistral", "phi3")],
        *[("gemma3, two kinds", other_kinds), ("gemma2", one_cap), ("phi3", no_mlp)],
    ],
)
@torch.no_grad()
def test_what_a_forward_pass_reads_beside_weights_is_followed_or_left_to_torch(name, change):
    """The mask is made from the config, whatever an attention module was built with."""
    model, ids = random_model(COMPILED[name](), 2, 4.0), prompts(1, 20)["input_ids"]
    runtime = CpuRuntime(model, "float32")
    before = model(ids).logits[0]
    torch.testing.assert_close(path_logits(runtime, ids[0].tolist()), before, rtol=1e-3, atol=1e-3)
    change(model)
    expected = model(ids).logits[0]
    assert float((expected - before).abs().max()) > 0.02
    if runtime.unsupported_reason() is None:
        torch.testing.assert_close(path_logits(runtime, ids[0].tolist()), expected, rtol=1e-3, atol=1e-3)


def test_a_dropout_that_drops_is_refused():
    model = model_of("phi3", seed=2)
    assert unsupported_reason(model) is None
    drops(model)
    assert "training mode" in unsupported_reason(model)
