"""What a prefix cache holds is dropped where other weights, other code or other settings would make other keys."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from medusa_apar.engine.engine import Engine
from medusa_apar.engine.options import EngineOptions
from medusa_apar.runtimes.capture import Captured
from medusa_apar.runtimes.model_state import ModelState
from medusa_apar.runtimes.pick import pick_runtime
from tests.support.models import forking_model
from tests.support.warm_engines import prompt, request, run


def negated(model):
    model.lm_head.weight.data.neg_()  # which torch does not count


def swapped(model):
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


@pytest.mark.parametrize("name", ["cpu", "torch"])
@pytest.mark.parametrize("change", [negated, swapped])
def test_what_other_weights_have_made_is_dropped(name, change):
    model = forking_model(9, "wide_llama")
    runtime = pick_runtime(model, name, None, "auto")
    with Engine(model, runtime, options=EngineOptions(prefix_cache=True)) as engine:
        run(engine, request("first", prompt(0), fork=False, limit=8))
        assert run(engine, request("again", prompt(0), fork=False, limit=8)).stats.cached_tokens == 39
        change(model)
        after = run(engine, request("after", prompt(0), fork=False, limit=8))
        assert after.stats.cached_tokens == 0
        assert run(engine, request("again", prompt(0), fork=False, limit=8)).stats.cached_tokens == 39
    with Engine(model, runtime) as engine:
        assert after.text_ids == run(engine, request("cold", prompt(0), fork=False, limit=8)).text_ids


def test_an_adapter_that_is_switched_off_makes_other_keys():
    model = forking_model(9, "wide_llama")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["k_proj", "v_proj"], init_lora_weights=False))
    runtime = pick_runtime(model, "torch", None, "auto")
    texts = []
    with Engine(model, runtime, options=EngineOptions(prefix_cache=True)) as engine:
        for switch in (adapted.base_model.enable_adapter_layers, adapted.base_model.disable_adapter_layers) * 2:
            switch()
            one = run(engine, request("a", prompt(0), fork=False, limit=8))
            assert one.stats.cached_tokens == 0
            texts.append(one.text_ids)
    assert texts[0] == texts[2] != texts[1] == texts[3]


def scaled(factor):
    return lambda module, args, output: output * factor


def forward_replaced(model):
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: -forward(x)


def class_changed(model):
    """As a patch of a library does."""
    kind = type(model.model.layers[0].mlp)
    forward = kind.forward
    kind.forward = lambda self, x: -forward(self, x)
    return lambda: setattr(kind, "forward", forward)


def hook_swapped(model):
    """One for another at the same place, so that as many are there as were."""
    model.hook.remove()
    model.hook = model.model.layers[0].mlp.register_forward_hook(scaled(-3.0))


def hook_replaced(model):
    hooks = model.model.layers[0].mlp._forward_hooks
    hooks[model.hook.id] = scaled(-3.0)


def hook_on_all(model):
    def turned(module, args, output):
        return -output if isinstance(module, type(model.model.layers[0].mlp)) else None

    return torch.nn.modules.module.register_module_forward_hook(turned).remove


def window_narrowed(model):
    """What masks are made by, in every pass anew."""
    model.config.sliding_window = 2


CODE = [forward_replaced, class_changed, hook_swapped, hook_replaced, hook_on_all, window_narrowed]


@pytest.mark.parametrize("change", CODE)
def test_what_other_code_and_other_settings_have_made_is_dropped(change):
    model = forking_model(9, "mistral")
    object.__setattr__(model, "hook", model.model.layers[0].mlp.register_forward_hook(scaled(1.5)))
    runtime = pick_runtime(model, "torch", None, "auto")
    undo = None

    def asked(engine):
        return run(engine, request("a", prompt(0), fork=False, limit=8))

    try:
        with Engine(model, runtime, options=EngineOptions(prefix_cache=True)) as engine:
            first = asked(engine)
            assert asked(engine).stats.cached_tokens == 39
            undo = change(model)
            after = asked(engine)
            assert after.stats.cached_tokens == 0 and asked(engine).stats.cached_tokens == 39
        with Engine(model, runtime) as engine:
            assert first.text_ids != after.text_ids == asked(engine).text_ids
    finally:
        if undo is not None:
            undo()


def test_passes_beside_it_change_nothing():
    """Another engine's passes leave hooks of ours in the model, which only look on."""
    model = forking_model(9, "wide_llama")
    runtime = pick_runtime(model, "torch", None, "auto")
    before = ModelState(model)
    with runtime.session(), Captured(model, (0,)):
        assert before.is_of(model)
        handle = model.lm_head.register_forward_pre_hook(lambda *_: None)
        assert not before.is_of(model)
        handle.remove()
    assert before.is_of(model)
