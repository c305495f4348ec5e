"""A model that forks wherever it may, as those of Multiverse and NPR run away: what bounds depth, threads and slots
holds, and others are served as if it were alone."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.bytes_writer import bytes_writer
from tests.support.models import CHILD, FORK
from tests.support.openai_answers import COMPLETION, Server, put_together, whole
from tests.support.serving import running

SLOTS, THREADS, DEPTH, LIMIT = 400, 4, 2, 40
WILD = {"prompt": "aé", "max_tokens": LIMIT, "apar": {"max_threads": THREADS, "max_depth": DEPTH, "events": True}}
TAME = {"prompt": "你", "max_tokens": LIMIT, "temperature": 0, "return_token_ids": True, "apar": {"fork": False}}


@pytest.fixture(scope="module", params=[-1e4, 2.5], ids=["never ends", "ends"])
def server(request):
    with running(lambda: bytes_writer(3, fork=1e4, eos=request.param), pool_slots=SLOTS) as its, its.client() as client:
        yield Server(its, client)


def depths(events):
    """Each thread's depth, by its number."""
    found = {}
    for event in events:
        if event["event"] == "ThreadStarted":
            found[event["thread"]] = 0 if event["parent"] is None else found[event["parent"]] + 1
    return found


@pytest.mark.parametrize("temperature", [0, 1])
def test_depth_threads_and_slots_stay_within_bounds(server, temperature, monkeypatch):
    """Alone, so that what the engine has at most is this answer's, and with a row for every thread."""
    monkeypatch.setattr("medusa_apar.engine.scheduler.worth", lambda likely, *_: len(likely))
    answer = server.ask(COMPLETION, **WILD, temperature=temperature, seed=1)
    events, stats = answer["apar"]["events"], server.its.service.engine.stats()
    written = [token for event in events if event["event"] == "TokensAccepted" for token in event["token_ids"]]
    assert written.count(FORK) > 5 and CHILD not in written  # or nothing here would be wild
    assert max(depths(events).values()) == DEPTH
    assert 1 < stats.peak_threads <= THREADS and stats.peak_slots <= SLOTS
    assert answer["usage"]["completion_tokens"] <= LIMIT
    server.its.wait_until_idle()


def test_others_are_served_and_nothing_is_left(server):
    alone = whole(server.ask(COMPLETION, **TAME))
    first = whole(server.ask(COMPLETION, **WILD, temperature=0))

    def ask(n):
        """Every third has one thread."""
        return server.ask(COMPLETION, **(WILD | {"temperature": 0} if n % 3 else TAME))

    for _ in range(2):
        with ThreadPoolExecutor(9) as pool:
            answers = [whole(answer) for answer in pool.map(ask, range(9))]
        assert answers == [first if n % 3 else alone for n in range(9)]
        server.its.wait_until_idle()
        stats = server.its.service.engine.stats()
        assert stats.live_slots == 0 and stats.cached_slots + stats.free_slots == SLOTS >= stats.peak_slots
    assert put_together(server.chunks(COMPLETION, **TAME)) == alone
