"""A team shrinks while its threads wait for cores that others hold, tries again, and is whole when they are free."""

import ctypes
import os
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medusa_apar.runtimes.cpu import library


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    made = tmp_path_factory.mktemp("crowd") / "crowd.so"
    source = os.path.join(os.path.dirname(__file__), "crowd.cpp")
    options = ["-O1", "-std=c++17", "-fPIC", "-shared", "-pthread", f"-I{library.FOLDER}"]
    subprocess.run([*library.compilers()[0], *options, source, "-o", str(made)], check=True)
    opened = ctypes.CDLL(str(made))
    opened.crowd_new.restype = ctypes.c_void_p
    opened.waited.restype = ctypes.c_uint64
    return opened


class Crowd:
    """Steps of 10 ms of as large a team as may be, `waiting` of whose threads wait, a number that a step may change."""

    def __init__(self, code, threads):
        self.code, self.threads, self.now = code, threads, 1000
        self.crowd = ctypes.c_void_p(code.crowd_new())

    @property
    def team(self):
        return self.code.crowd_team_of(self.crowd, self.threads)

    def step(self, waiting):
        team, self.now = self.team, self.now + 10
        self.code.crowd_saw(self.crowd, team, self.threads, min(waiting, team), self.now)
        return team


def test_busy_moments_change_nothing_and_three_steps_in_a_row_do(code):
    crowd = Crowd(code, 4)
    for waiting in (0, 1, 0, 3, 2, 0, 1, 1):
        assert crowd.step(waiting) == 4
    assert crowd.team == 4
    crowd.step(1)
    assert crowd.team == 3


def test_someone_is_always_left(code):
    crowd = Crowd(code, 2)
    for _ in range(50):
        crowd.step(2)
        assert crowd.team in (1, 2)
    assert crowd.team == 1


def test_tries_become_rarer_while_others_stay_and_end_when_they_leave(code):
    crowd, tries = Crowd(code, 2), []
    for _ in range(2000):
        if crowd.step(1) == 2 and (not tries or crowd.now - tries[-1] > 30):
            tries.append(crowd.now)  # the first step of each
    gaps = [after - before for before, after in zip(tries[1:], tries[2:], strict=False)]
    assert gaps == sorted(gaps) and 200 <= gaps[0] < 450 and 3200 <= gaps[-1] < 3300
    assert len(tries) < 20
    left = crowd.now
    while crowd.step(0) == 1:
        assert crowd.now - left < 3300
    for _ in range(1000):
        assert crowd.step(0) == 2
    # And whoever comes back is met as at first.
    assert [crowd.step(1) for _ in range(3)] == [2, 2, 2] and crowd.team == 1
    back = crowd.now
    while crowd.step(0) == 1:
        assert crowd.now - back < 300


@given(st.integers(1, 8), st.lists(st.integers(0, 8), max_size=60))
def test_a_team_is_never_empty_or_larger_than_it_may_be(code, threads, steps):
    crowd = Crowd(code, threads)
    for waiting in steps:
        assert 1 <= crowd.step(waiting) <= threads
    code.crowd_delete(crowd.crowd)


def test_a_team_shrinks_only_where_fewer_would_be_sooner_done(code):
    def too_many(team, waiting, ran, took):
        return code.crowd_too_many(team, waiting, ctypes.c_double(ran), ctypes.c_double(took))

    assert too_many(2, 1, 18e6, 36e6) == 1  # beside a busy process: one thread would take the 18 ms
    assert too_many(2, 1, 18e6, 12e6) == 0  # beside threads that hold a core for a moment
    assert too_many(4, 1, 40e6, 20e6) == 1 and too_many(4, 1, 40e6, 13e6) == 0
    assert too_many(2, 2, 18e6, 36e6) == 2 and too_many(2, 0, 1e6, 36e6) == 0


@pytest.mark.skipif(not os.path.exists("/proc/thread-self/schedstat"), reason="nobody tells how long a thread waits")
def test_waiting_for_a_core_is_told_and_sleeping_is_not(code):
    code.waited()
    time.sleep(0.2)
    assert code.waited() < 0.1e9
    cores = os.sched_getaffinity(0)
    program = "import time\nend = time.time() + 20\nwhile time.time() < end: pass"
    core = min(cores)
    os.sched_setaffinity(0, {core})
    neighbour = subprocess.Popen([sys.executable, "-c", program])  # on the same core, as it inherits
    try:
        time.sleep(0.2)
        code.waited()
        end = time.perf_counter() + 1
        while time.perf_counter() < end:
            pass
        assert code.waited() > 0.1e9
    finally:
        os.sched_setaffinity(0, cores)
        neighbour.kill()
        neighbour.wait()
