"""What would be live, had no thread's slots gone back before its request's end."""

import pytest

import medusa_apar
from tests.support.models import CONTROL, forking_model
from tests.support.tokenizers import tiny_tokenizer


def looks(fork):
    """(live, unfreed) after every step, for three requests."""
    apar = medusa_apar.attach(forking_model(24), None, CONTROL, tokenizer=tiny_tokenizer())
    found = []
    with apar.engine() as engine:
        for number in range(3):
            engine.add(apar.request(str(number), [7, 8, 9 + number], max_new_tokens=24, fork=fork))
        while engine.unfinished:
            engine.step()
            stats = engine.snapshot()
            found.append((stats.live_slots, stats.unfreed_slots))
    return found


def test_one_thread_frees_nothing_early():
    found = looks("off")
    assert len(found) > 5 and all(live == unfreed for live, unfreed in found)


def test_what_threads_free_before_the_end_is_the_difference():
    found = looks("auto")
    assert all(live <= unfreed for live, unfreed in found) and found[-1] == (0, 0)
    assert max(unfreed - live for live, unfreed in found) > 3


@pytest.mark.parametrize("fork", ["off", "auto"])
def test_nothing_is_left_of_what_was_aborted(fork):
    apar = medusa_apar.attach(forking_model(24), None, CONTROL, tokenizer=tiny_tokenizer())
    with apar.engine() as engine:
        engine.add(apar.request("a", [7, 8, 9], max_new_tokens=24, fork=fork))
        for _ in range(4):
            engine.step()
        assert engine.snapshot().unfreed_slots
        engine.abort("a")
        assert engine.snapshot().unfreed_slots == engine.snapshot().live_slots == 0
