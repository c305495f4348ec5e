"""The fork manager, on threads alone: no slots, no model."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_apar.threads.fork_manager import ForkManager
from medusa_apar.threads.fork_policy import ControlTokenForks, NoForks, Turn
from medusa_apar.threads.fork_rule import ForkRule
from medusa_apar.threads.paragraph_tree import Fork, thread_key
from medusa_apar.threads.request import Request, RequestOptions
from tests.support.random_requests import CHILD, EOS, FORK

WORD = 9
RULE = ForkRule(FORK, CHILD, 2)


def request_of(prompt=(WORD, WORD), policy=None, **options) -> Request:
    policy = ControlTokenForks() if policy is None else policy
    return Request("0", list(prompt), RequestOptions(eos_ids=frozenset({EOS}), policy=policy, rule=RULE, **options))


def told(request):
    names = ("index", "fork_index", "tokens", "num_forced", "start", "depth", "key", "finish_reason", "seen")
    names += ("line_break", "ends_line", "continues_parent", "inserted")
    return [{name: getattr(thread, name) for name in names} for thread in request.tree.threads]


def test_a_fork_spawns_a_child_and_the_parent_goes_on():
    request = request_of()
    trunk = request.tree.trunk
    outcome = ForkManager(None).advance(request, trunk, [5, FORK, 6, 7, FORK])
    assert outcome.gained == 5 and outcome.ended == [] and trunk.token_ids == [5, FORK, 6, 7, FORK]
    assert [(place, child.fork_index) for place, child in outcome.children] == [(1, 3), (4, 6)]
    for _, child in outcome.children:
        assert child.live and child.tokens == [CHILD] and child.parent is trunk and child.depth == 1
        assert child.path_ids == [*trunk.tokens[: child.fork_index + 1], CHILD]
        assert child.key == thread_key(trunk.key, child.fork_index)  # of its content, never of when it ran


@pytest.mark.parametrize("tokens", [[EOS], [5, EOS], [5, EOS, 6, FORK, EOS]], ids=str)
def test_nothing_is_appended_behind_an_end_token(tokens):
    request, manager = request_of(), ForkManager(None)
    trunk = request.tree.trunk
    outcome = manager.advance(request, trunk, tokens)
    assert trunk.token_ids == tokens[: tokens.index(EOS) + 1] and outcome.gained == len(trunk.token_ids)
    assert outcome.ended == [trunk] and trunk.finish_reason == "stop" and outcome.children == []
    again = manager.advance(request, trunk, [5, FORK])
    assert (again.gained, again.children, again.ended) == (0, [], []) and trunk.token_ids[-1] == EOS


def test_a_path_ends_where_the_models_context_does():
    for room in range(1, 6):
        request, manager = request_of(), ForkManager(2 + room)
        outcome = manager.advance(request, request.tree.trunk, [5, 6, FORK, 7, 8, 9])
        trunk = request.tree.trunk
        assert trunk.end == 2 + room and outcome.gained == room
        assert trunk.finish_reason == "length" and outcome.ended == [trunk]
        for _, child in outcome.children:  # which begins behind [Fork] with [Child]
            assert child.live == (child.end < 2 + room) and child.finish_reason in (None, "length")
        assert len(outcome.children) == (room >= 3)


class ByToken(NoForks):
    """Forks, inserts, ends and takes over where single tokens say so: 1 a fork with an insertion, 2 a child that takes
    over at once, 3 a child's way back, 4 its taking over."""

    def fork(self, tree, thread):
        if thread.parent is not None or thread.tokens[-1] not in (1, 2):
            return None
        continues_parent = thread.tokens[-1] == 2
        return Fork((8, 8), len(thread.tokens) - 1, () if continues_parent else (7, 6), 1, continues_parent)

    def turn(self, tree, thread):
        return {3: Turn.RETURN, 4: Turn.CONTINUE_PARENT}.get(thread.tokens[-1])

    def ends_line(self, thread):
        return len(thread.tokens) % 2 == 0


def test_an_insertion_ends_what_is_appended():
    """What was chosen behind it was chosen on another path."""
    request = request_of(policy=ByToken())
    trunk = request.tree.trunk
    outcome = ForkManager(None).advance(request, trunk, [5, 1, 5, 5])
    assert outcome.gained == 2 and trunk.token_ids == [5, 1, 7, 6] and trunk.inserted == {4, 5}
    assert trunk.live and trunk.ends_with_forced and len(outcome.children) == 1


@pytest.mark.parametrize("room", range(2, 6))
def test_an_insertion_ends_where_the_models_context_does(room):
    request = request_of(policy=ByToken())
    ForkManager(2 + room).advance(request, request.tree.trunk, [5, 1, 5, 5])
    assert request.tree.trunk.token_ids == [5, 1, 7, 6][:room]
    assert request.tree.trunk.live == (room > 4) and request.tree.trunk.end <= 2 + room


@pytest.mark.parametrize("at_once", [True, False])
def test_a_child_that_takes_over_ends_its_parent_and_later_children(at_once):
    request, manager = request_of(policy=ByToken()), ForkManager(None)
    trunk = request.tree.trunk
    manager.advance(request, trunk, [5, 1])
    manager.advance(request, trunk, [1])
    first, second = trunk.children
    if at_once:
        outcome = manager.advance(request, trunk, [5, 2, 5])
        over = trunk.children[-1]
        assert set(outcome.ended) == {trunk} and first.live and second.live
    else:
        outcome = manager.advance(request, first, [5, 4, 6])
        over = first
        assert set(outcome.ended) == {trunk, second} and second.finish_reason == "cancelled"
        assert outcome.gained == 3  # it writes on
    assert over.continues_parent and over.live and trunk.finish_reason == "cancelled"


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_runs_of_tokens_are_token_by_token_the_same(data):
    """What a step accepts at once, and all that comes of it."""
    policy = data.draw(st.sampled_from([ControlTokenForks(), ByToken(), NoForks()]))
    manager = ForkManager(data.draw(st.sampled_from([None, 9, 14])))
    at_once, one_by_one = (request_of(policy=policy) for _ in range(2))
    for _ in range(6):
        place = data.draw(st.integers(0, len(at_once.tree.threads) - 1))
        tokens = data.draw(st.lists(st.sampled_from([EOS, 1, 2, 3, 4, 5, 5, 5]), min_size=1, max_size=5))
        thread, twin = at_once.tree.threads[place], one_by_one.tree.threads[place]
        outcome = manager.advance(at_once, thread, tokens)
        single = [manager.advance(one_by_one, twin, [token]) for token in tokens[: outcome.gained]]
        assert told(at_once) == told(one_by_one)
        assert outcome.gained == sum(other.gained for other in single)
        assert outcome.gained == len(tokens) or thread.ended or thread.ends_with_forced
        assert {thread.index for thread in outcome.ended} == {t.index for other in single for t in other.ended}
        assert [(place, child.index) for place, child in outcome.children] == [
            (place, child.index) for place, other in enumerate(single) for _, child in other.children
        ]


def chosen(path: list[int], depth: int) -> int:
    """A model that writes words, forks and ends, and goes by nothing but the path."""
    token = [5, 6, 7, 8, FORK, FORK, EOS][thread_key(*path) % 7]
    return 5 if token == FORK and RULE.bans_fork(path[-1], depth) else token


def write(request: Request, manager: ForkManager, schedule: random.Random) -> list[int]:
    """Has the model write it, a few tokens of some live thread at a time."""
    trimmed = []
    while not request.done:
        thread = schedule.choice([thread for thread in request.tree.threads if thread.live])
        path, tokens = thread.ancestor_ids() + thread.tokens, []
        for _ in range(schedule.randint(1, 3)):
            tokens.append(chosen(path + tokens, thread.depth))
        ended = manager.advance(request, thread, tokens).ended
        assert all(not thread.live for thread in ended)
        request.publish()
        gone = manager.trim(request)
        assert all(thread.finish_reason in ("cancelled", "length") for thread in gone)
        assert not set(gone) & set(trimmed)  # told once, so that their slots are given back once
        trimmed += gone
        assert {thread for thread, _ in request.live} == {thread for thread in request.tree.threads if thread.live}
    assert not request.tree.live and request.live == []
    return request.text_ids


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(0, 99), st.none() | st.integers(8, 20))
def test_a_limit_cuts_the_text_short_whatever_the_schedule(prompt, limit, seed, context):
    manager, schedule = ForkManager(context), random.Random(seed)
    unlimited = request_of([prompt, 5], max_new_tokens=60)
    whole = write(unlimited, manager, schedule)
    for most in (limit, limit + 1):
        request = request_of([prompt, 5], max_new_tokens=most)
        assert write(request, manager, schedule) == whole[:most]
        # An end token at the limit still is the end.
        assert request.finish_reason == ("length" if len(whole) > most else unlimited.finish_reason)
        written = [thread for thread in request.tree.threads if thread.token_ids]
        assert all(context is None or thread.end <= context for thread in written)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 30), st.integers(0, 99))
def test_what_is_resumed_reads_as_if_the_limit_had_been_higher(prompt, limit, more, seed):
    manager, schedule = ForkManager(None), random.Random(seed)
    expected = write(request_of([prompt, 5], max_new_tokens=limit + more), manager, schedule)
    request = request_of([prompt, 5], max_new_tokens=limit)
    first = write(request, manager, schedule)
    if request.finish_reason == "length":
        manager.resume(request, limit + more)
        first = write(request, manager, schedule) if not request.done else request.text_ids
    assert first == expected


def test_threads_beyond_the_limit_are_cancelled_before_it_is_reached():
    request, manager = request_of(max_new_tokens=6), ForkManager(None)
    trunk = request.tree.trunk
    (_, child), *_ = manager.advance(request, trunk, [5, FORK, 6, 7, 8]).children
    request.publish()
    assert manager.trim(request) == [] and [before for _, before in request.live] == [1, 4]
    manager.advance(request, child, [5, 6, 7])  # 5, three of the child's, and two more of the trunk's fit
    request.publish()
    assert manager.trim(request) == [trunk] and trunk.finish_reason == "cancelled"
    assert child.live and not request.done and [thread for thread, _ in request.live] == [child]


@pytest.mark.parametrize("reason", ["the limit", "a criterion"])
def test_all_threads_of_a_request_that_is_done_are_cancelled(reason):
    request, manager = request_of(max_new_tokens=4 if reason == "the limit" else 9), ForkManager(None)
    manager.advance(request, request.tree.trunk, [5, 6, 7, 8, FORK])
    request.publish()
    request.done = True
    gone = manager.trim(request)
    assert set(gone) == set(request.tree.threads) and request.live == []
    assert {thread.finish_reason for thread in gone} == {"length" if reason == "the limit" else "cancelled"}


def test_an_ignored_end_token_ends_children_alone():
    request, manager = request_of(ignore_eos=True), ForkManager(None)
    trunk = request.tree.trunk
    ((_, child),) = manager.advance(request, trunk, [5, EOS, FORK, 6, EOS]).children
    assert trunk.live and trunk.token_ids == [5, EOS, FORK, 6, EOS]
    outcome = manager.advance(request, child, [7, EOS, 8])
    assert outcome.ended == [child] and child.token_ids == [7, EOS] and child.finish_reason == "stop"
    request.publish()
    assert request.text_ids == [5, EOS, 7, 6, EOS] and not request.done


class EndsTheList(ByToken):
    def turn(self, tree, thread):
        return Turn.CONTINUE_PARENT if thread.tokens[-1] == EOS else super().turn(tree, thread)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_child_without_control_tokens_writes_its_parents_end(ignore_eos):
    """Which ends the answer, or is ignored as the parent's would be."""
    request, manager = request_of(policy=EndsTheList(), ignore_eos=ignore_eos), ForkManager(None)
    trunk = request.tree.trunk
    ((_, child),) = manager.advance(request, trunk, [5, 1]).children
    manager.advance(request, child, [9, EOS, 9])
    assert child.continues_parent and trunk.finish_reason == "cancelled" and child.live == ignore_eos
    assert child.token_ids == ([9, EOS, 9] if ignore_eos else [9, EOS])
    request.publish()
    assert request.text_ids == [5, *child.token_ids] and request.done == (not ignore_eos)


def test_a_stop_token_ends_the_text_once_it_can_be_read():
    """A child's end token is read by nobody."""
    request, manager = request_of(stop_ids=frozenset({7, EOS}), max_new_tokens=9), ForkManager(None)
    trunk = request.tree.trunk
    children = [child for _, child in manager.advance(request, trunk, [5, FORK, 6, FORK, 5, EOS]).children]
    manager.advance(request, children[1], [8, 7, 8])
    request.publish()
    assert request.text_ids == [5] and not request.done
    manager.advance(request, children[0], [9, EOS])
    request.publish()
    assert request.text_ids == [5, 9, 6, 8] and request.done and request.finish_reason == "stop"
    assert set(manager.trim(request)) == {children[1]} and not request.tree.live
