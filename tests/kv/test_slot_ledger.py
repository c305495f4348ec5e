"""Random histories of a slot ledger: eviction takes what no other path needs."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.random_requests import Script


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_eviction_frees_only_what_no_other_path_needs(data):
    script = Script(data, steps=4)
    trees = script.run()
    live = [thread for tree in trees for thread in tree.threads if thread.live]
    for victim in data.draw(st.permutations(live)):
        claiming = [thread for thread in live if script.ledger.claims(thread) and thread is not victim]
        needed = {slot for thread in claiming for slot in script.cached_path(thread)}
        before = script.ledger.pool.in_use
        freed = script.ledger.evict(victim)
        assert script.ledger.pool.in_use == before - freed
        assert needed <= set(script.ledger.pool.used.tolist())
        script.ledger.check()
    assert script.ledger.pool.in_use == 0
    for thread in live:
        script.ledger.resume(thread)
        assert sum(stop - script.ledger.cached(member) for member, stop in script.ledger.missing(thread)) == thread.end
