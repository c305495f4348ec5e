"""Keys and values into their slots."""

import pytest
import torch

from medusa_apar.triton_kernels.store import store_kv


@pytest.mark.parametrize("kv_heads, dim, value_dim", [(1, 16, 16), (3, 64, 64), (2, 80, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_go_into_their_slots_and_nothing_else_changes(kv_heads, dim, value_dim, dtype):
    torch.manual_seed(0)
    # As transformers gives them: [kv_heads, N, dim], transposed.
    key = torch.randn(kv_heads, 4, dim).to(dtype).transpose(0, 1)
    value = torch.randn(kv_heads, 4, value_dim).to(dtype).transpose(0, 1)
    keys, values = torch.randn(20, kv_heads, dim).to(dtype), torch.randn(20, kv_heads, value_dim).to(dtype)
    expected_keys, expected_values = keys.clone(), values.clone()
    slots = torch.tensor([7, 0, -1, 19])
    for row, slot in ((0, 7), (1, 0), (3, 19)):
        expected_keys[slot], expected_values[slot] = key[row], value[row]
    store_kv(key, value, keys, values, slots)
    assert torch.equal(keys, expected_keys) and torch.equal(values, expected_values)
