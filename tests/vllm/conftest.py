"""Real vLLM, in the environment that `make vllm` makes; elsewhere these tests say that they are skipped."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from medusa_apar.eval.vllm_answers import native
from medusa_apar.models.merge import plain_folder
from medusa_apar.models.sources import locate

QUESTIONS = (
    "How can I sleep better at night?",
    "What should I consider before adopting a dog?",
    "Why do leaves change their colour in autumn?",
    "Give me five ideas for a cheap birthday party.",
)
LISTED = "List three fruits and say what each tastes like."
LIMIT = 96


def pytest_collection_modifyitems(items):
    if find_spec("vllm") is None:
        skipped = pytest.mark.skip(reason="vLLM is not installed: make vllm makes an environment that has it")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(skipped)


@pytest.fixture(scope="session")
def merged():
    """The folder that `serve --engine vllm` makes too."""
    return plain_folder(locate("smollm2-135m"), torch.float32)


@pytest.fixture(scope="session")
def all_answers(merged):
    found = native(merged, [*((question, "auto") for question in QUESTIONS), (LISTED, "lists")], LIMIT)
    assert all(answer.forks >= 1 for answer in found)
    return found


@pytest.fixture(scope="session")
def answers(all_answers):
    """Our own engine's, of a tuned model that forks by itself."""
    return all_answers[:-1]


@pytest.fixture(scope="session")
def listed(all_answers):
    """One that forks by rule."""
    return all_answers[-1]
