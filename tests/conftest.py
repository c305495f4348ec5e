import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny models are slower on two threads than on one."""
    torch.set_num_threads(1)
