import os
from pathlib import Path

# Before torch is there: threads that spin while they wait take the core that the suite's other process runs on.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import setuptools  # noqa: F401  it replaces distutils, and inductor fails where that was imported before
import torch

import medusa_apar
from medusa_apar.drafting.step_cost import LearnedCost, StepCost
from medusa_apar.eval import chat_endpoint
from tests.support.lengths import LONG, OTHERWHERE, is_slow
from tests.support.player import Player


def _no_skip(report):
    """A skip becomes a failure in CI, or what nobody installed any more would be tested no more."""
    if os.environ.get("MEDUSA_APAR_CI") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not OTHERWHERE.fullmatch(reason):
            report.outcome, report.longrepr = "failed", f"skipped, where CI has to have it: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    return _no_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return _no_skip((yield))


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="without what takes long, unless paths name it")


def pytest_configure(config):
    """xdist would begin with the files of most tests, and end with the longest, which have one or two."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(config, items):
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))
    named = config.args_source is config.ArgsSource.ARGS
    slow = config.option.fast and not named
    left_out = [
        item
        for item in items
        if (item.get_closest_marker("campaign") and "campaign" not in config.option.markexpr)
        or (slow and is_slow(item.path, Path(__file__).parent))
    ]
    config.hook.pytest_deselected(items=left_out)
    left = set(left_out)
    items[:] = [item for item in items if item not in left]


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny models are slower on two threads than on one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2 with the shipped heads, on both cores; for tests that are marked `real`."""
    torch.set_num_threads(2)
    yield medusa_apar.load("smollm2-135m")
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


class FixedCost(LearnedCost):
    """Does not learn: the steps of tiny models would."""

    def observe(self, rows, seconds): ...

    def observe_draft(self, threads, seconds): ...


@pytest.fixture(scope="session", autouse=True)
def _assumed_step_cost():
    """What a step costs is measured in its own tests alone: elsewhere it would decide how many steps are counted."""
    assumed = StepCost(((1, 10.0), (8, 14.0), (64, 70.0)), ((1, 0.5), (8, 1.0)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("medusa_apar.engine.engine.known_cost", lambda *_: assumed)
        patched.setattr("medusa_apar.engine.engine.keep_learned", lambda *_: None)
        patched.setattr("medusa_apar.engine.engine.LearnedCost", FixedCost)
        yield
