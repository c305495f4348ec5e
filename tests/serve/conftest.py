"""The API's tests run over both engines: our own, and the one over vLLM, whose client is a stand-in here."""

import pytest

# What vLLM cannot keep, and why. What holds the native engine's thread, fills its pool or reads its counters has no
# `engine` to choose: `test_service.py`, `test_drain.py`, `test_metrics.py`.
NATIVE_ONLY = {
    "test_events_come_where_they_are_asked_for": "which threads go on in the same step is the scheduler's of vLLM",
}


@pytest.fixture(scope="module", params=["native", "vllm"])
def engine(request):
    return request.param


def pytest_collection_modifyitems(items):
    for item in items:
        its = getattr(item, "callspec", None)
        if its is not None and its.params.get("engine") == "vllm" and item.originalname in NATIVE_ONLY:
            item.add_marker(pytest.mark.skip(reason=f"vLLM: {NATIVE_ONLY[item.originalname]}"))
