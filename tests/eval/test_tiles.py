"""Tiles of any size, in code for another instruction set, multiply alike; and the library is put back."""

import pytest
import torch

from medusa_apar.eval import tiles
from medusa_apar.runtimes.cpu import library
from medusa_apar.runtimes.cpu.weights import PackedMatrix

pytestmark = pytest.mark.skipif(not tiles.available(), reason="no x86 processor with AVX2")


def test_a_tile_of_another_size_has_the_same_bits():
    matrix, x = PackedMatrix(torch.randn(48, 128), "int8"), torch.randn(7, 128)
    expected, before = matrix(x), library.library
    with tiles.compiled_for(tiles.available()[0], 3):
        assert library.library is not before
        assert torch.equal(matrix(x), expected)
    assert library.library is before
