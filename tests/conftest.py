import pytest
import torch

from medusa_apar.eval import chat_endpoint
from tests.player import Player


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny models are slower on two threads than on one."""
    torch.set_num_threads(1)


@pytest.fixture
def player(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    player = Player()
    yield player
    player.stop()


@pytest.fixture
def slept(monkeypatch):
    """What would have been waited."""
    waited = []
    monkeypatch.setattr(chat_endpoint, "sleep", waited.append)
    return waited
