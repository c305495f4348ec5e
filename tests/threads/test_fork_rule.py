"""The fork rule: its one statement against the paths that it is there to rule out."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medusa_apar.threads.control_tokens import ControlTokens
from medusa_apar.threads.fork_rule import ForkRule

FORK, CHILD, WORD = 1, 2, 9
RULE = ForkRule(FORK, CHILD, 2)
BOTH, CHILD_ALONE = {FORK, CHILD}, {CHILD}


@pytest.mark.parametrize(
    ("rule", "last", "depth", "banned"),
    [
        (RULE, WORD, 0, CHILD_ALONE),
        (RULE, WORD, 1, CHILD_ALONE),
        (RULE, WORD, 2, BOTH),
        (RULE, WORD, 3, BOTH),
        (RULE, FORK, 0, BOTH),
        (RULE, CHILD, 1, BOTH),
        (replace(RULE, max_depth=0), WORD, 0, BOTH),
        (replace(RULE, fork=False), WORD, 0, BOTH),
    ],
    ids=str,
)
def test_what_is_banned(rule, last, depth, banned):
    assert set(rule.banned(last, depth)) == banned and len(rule.banned(last, depth)) == len(banned)
    assert rule.bans_fork(last, depth) == (FORK in banned)
    assert rule.may_fork(depth) or rule.bans_fork(last, depth)


def test_it_is_the_models():
    control = ControlTokens(FORK, CHILD, max_depth=4)
    assert ForkRule.of(control) == ForkRule(FORK, CHILD, 4, True)
    assert ForkRule.of(control, 0) == ForkRule(FORK, CHILD, 0, True)  # 0 is a depth, and not the model's own
    assert ForkRule.of(control, 1, fork=False) == ForkRule(FORK, CHILD, 1, False)


@given(st.lists(st.sampled_from([FORK, CHILD, WORD]), max_size=40), st.integers(0, 3), st.booleans(), st.data())
def test_no_path_that_obeys_it_goes_too_deep_or_forks_twice(wishes, max_depth, fork, data):
    """A thread writes what it may; behind a `[Fork]` it either goes on or is the child."""
    rule = ForkRule(FORK, CHILD, max_depth, fork)
    path, depth = [WORD], 0
    for wish in wishes:
        if wish not in rule.banned(path[-1], depth):
            path.append(wish)
            if wish == FORK and data.draw(st.booleans()):
                path.append(CHILD)
                depth += 1
    assert path.count(CHILD) == depth <= (max_depth if fork else 0)
    for before, token in zip(path, path[1:], strict=False):
        assert token != CHILD or before == FORK
        assert token != FORK or before == WORD
    assert fork or path == [WORD] * len(path)
