"""The KV pool's slots."""

import numpy as np
import pytest

from medusa_apar.kv.pool import KVPool


def test_a_slot_given_back_twice_is_an_error():
    pool = KVPool(max_slots=3)
    slots = pool.allocate(np.arange(3))
    with pytest.raises(MemoryError, match="0 left"):
        pool.allocate(np.arange(1))
    pool.release(slots.tolist())
    with pytest.raises(KeyError):
        pool.release([0])
    assert pool.peak == 3 and pool.in_use == 0
