"""What the training code needs."""

import pytest
from transformers import LlamaForCausalLM

from medusa_apar.finetune.packing import Tokens
from tests.support.byte_chat import byte_model, byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tokens() -> Tokens:
    return Tokens(fork=3, child=4, eos=2)


@pytest.fixture
def model() -> LlamaForCausalLM:
    """For tests that change it."""
    return byte_model()


@pytest.fixture(scope="session")
def fixed_model() -> LlamaForCausalLM:
    """The same weights, never changed."""
    return byte_model()
