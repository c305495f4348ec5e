"""Our LoRA layers give peft's results and gradients, and leave peft's layers as they were."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from medusa_apar.finetune.adapter import attach_lora, label_losses
from medusa_apar.finetune.lora_linear import _LoraProduct, lean_lora
from medusa_apar.finetune.packing import join, pack_threads

ROWS = [[([5, 6, 7, 8, 9, 10], -1, 0), ([4, 11, 12], 0, 2)], [([5, 9, 30, 31], -1, 0)]]


@pytest.fixture
def tuned(model, tokenizer, tokens):
    tuned = attach_lora(model, tokenizer, tokens, rank=2)
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:  # which begins at nothing
            torch.nn.init.normal_(parameter, std=0.1)
    return tuned


def gradients(tuned, tokens):
    row = join([pack_threads(tree) for tree in ROWS])
    parameters = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    losses = label_losses(tuned, row, tokens).values
    return losses, torch.autograd.grad(losses.sum(), parameters)


def test_losses_and_gradients_are_those_of_peft(tuned, tokens):
    expected, theirs = gradients(tuned, tokens)
    with lean_lora(tuned):
        losses, ours = gradients(tuned, tokens)
        assert _uses_ours(losses)
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    assert len(ours) == len(theirs) and any(gradient.abs().max() > 0 for gradient in ours)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    again, _ = gradients(tuned, tokens)
    assert not _uses_ours(again)


def test_in_bfloat16_gradients_are_float32_and_nearly_those_of_float32(tuned, tokens):
    _, theirs = gradients(tuned, tokens)
    half = copy.deepcopy(tuned)
    for parameter in half.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    with lean_lora(half):
        _, ours = gradients(half, tokens)
    assert {gradient.dtype for gradient in ours} == {torch.float32}
    ours, theirs = (torch.cat([gradient.flatten() for gradient in each]) for each in (ours, theirs))
    assert float((ours - theirs).norm() / theirs.norm()) < 0.05


def test_a_disabled_adapter_is_the_plain_model(tuned):
    ids = torch.tensor([[5, 6, 7, 8]])
    with lean_lora(tuned), tuned.disable_adapter(), torch.no_grad():
        ours = tuned(input_ids=ids).logits
    with tuned.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(ours, tuned(input_ids=ids).logits)


@pytest.mark.parametrize("changes", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}])
def test_layers_that_do_more_stay_with_peft(model, changes):
    for module in model.modules():  # lora_bias asks for one below
        if changes.get("lora_bias") and isinstance(module, torch.nn.Linear):
            module.bias = torch.nn.Parameter(torch.zeros(module.out_features))
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **changes))
    with lean_lora(tuned):
        assert not _uses_ours(tuned(input_ids=torch.tensor([[5, 6, 7]])).logits.sum())


def _uses_ours(result: torch.Tensor) -> bool:
    """Whether one of our products is among what a tensor was computed from."""
    name, seen, todo = _LoraProduct.__name__ + "Backward", set(), [result.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if name in node.name():
            return True
        seen.add(node)
        todo += [function for function, _ in node.next_functions]
    return False
