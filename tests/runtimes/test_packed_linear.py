"""Packed weights give the layer's own results, follow it when it changes, and leave no trace."""

import weakref

import pytest
import torch
from torch import nn

from medusa_apar.runtimes.packed_linear import PackedLinears, can_pack, pack

pytestmark = pytest.mark.skipif(not can_pack(torch.zeros(1, 1)), reason="torch without oneDNN")


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 8, bias=False)).requires_grad_(False)


@pytest.mark.parametrize("rows", [1, 3, 16, 64, 65, 200])
def test_results_are_the_layers_own(layers, rows):
    x = torch.randn(1, rows, 24)
    expected = layers(x)
    with PackedLinears(layers).in_use():
        assert "forward" in vars(layers[0])
        torch.testing.assert_close(layers(x), expected, atol=1e-5, rtol=1e-5)
    assert "forward" not in vars(layers[0])
    assert torch.equal(layers(x), expected)


def test_a_changed_weight_is_packed_anew(layers):
    packed = PackedLinears(layers)
    x = torch.randn(4, 24)
    with packed.in_use():
        before = layers(x)
    layers[0].weight.mul_(2)
    layers[1].weight.data = layers[1].weight.data.clone() + 1
    with packed.in_use():
        torch.testing.assert_close(layers(x), layers[1](nn.functional.linear(x, layers[0].weight, layers[0].bias)))
        assert not torch.allclose(layers(x), before)
        torch.testing.assert_close(layers[1](torch.ones(1, 40)), layers[1].weight.sum(1)[None], atol=1e-4, rtol=1e-4)


def test_the_old_copy_goes_before_the_new_one_comes(layers, monkeypatch):
    packed, kept = PackedLinears(layers), []
    with packed.in_use():
        kept += map(weakref.ref, packed._packed.values())
    layers[0].weight.mul_(2)

    def pack_alone(weight):
        assert not any(old() is not None for old in kept)
        return pack(weight)

    monkeypatch.setattr("medusa_apar.runtimes.packed_linear.pack", pack_alone)
    with packed.in_use():
        assert len(packed._packed) == len(kept) == 2


def test_blocks_may_overlap(layers):
    packed = PackedLinears(layers)
    with packed.in_use():
        with packed.in_use():
            pass
        assert "forward" in vars(layers[0])
    assert "forward" not in vars(layers[0])


def test_hooked_layers_and_other_classes_are_left_alone():
    class Own(nn.Linear):
        pass

    layers = nn.Sequential(Own(4, 4), nn.Linear(4, 4))
    hooked = layers[1].forward = lambda x: x
    with PackedLinears(layers).in_use():
        assert "forward" not in vars(layers[0]) and layers[1].forward is hooked
    assert layers[1].forward is hooked
