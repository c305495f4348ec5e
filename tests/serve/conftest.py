"""The API's tests run over both engines: our own, and the one over vLLM, whose client is a stand-in here."""

import pytest

# What vLLM cannot keep, and why.
NATIVE_ONLY: dict[str, str] = {}


@pytest.fixture(scope="module", params=["native", "vllm"])
def engine(request):
    return request.param


def pytest_collection_modifyitems(items):
    for item in items:
        its = getattr(item, "callspec", None)
        if its is not None and its.params.get("engine") == "vllm" and item.originalname in NATIVE_ONLY:
            item.add_marker(pytest.mark.skip(reason=f"vLLM: {NATIVE_ONLY[item.originalname]}"))
