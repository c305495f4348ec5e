"""The rule that forks lists, on text alone: which titles fork, and what may follow an item."""

import pytest

from medusa_apar.threads.list_items import ListItem, forking_item


@pytest.mark.parametrize(
    ("written", "marker", "line_breaks"),
    [
        ("1. **One**: detail.\n2. **Two**:", "3.", 1),
        ("1. **One**: detail.\n\n2. **Two**:", "3.", 2),
        ("1. **One**: detail.\n\n\n2. **Two:**", "3.", 2),
        ("Skills:\n\n1) One: detail\n2) Two things:", "3)", 1),
        ("- **One** - detail\n- **Two** -", "-", 1),
        ("* One: detail\n* Two:", "*", 1),
        ("1. no title\n2. **Two**:", "3.", 1),
        ("1. One:\n   - nested: a\n   - nested: b\n2. Two:", "3.", 1),
        ("1. One:\n- not indented\n\n2. Two:\n", "3.", 2),
        ("9. One: a\n10. Two:", "11.", 1),
        (" 1. One: a\n 2. Two:", " 3.", 1),
        # Not here.
        ("1. **One**:", None, 0),  # the first shows how the others are to be written
        ("1. One: a\n3. Three:", None, 0),
        ("1. One: a\n- Two:", None, 0),
        ("1. **One**: a\n2. **Two", None, 0),
        ("1. **One**: a\n2. **Two:", None, 0),  # its bold is open
        ("1. **One**: a\n2. **Two**", None, 0),
        ("1. One: a\n2. Two: b", None, 0),
        ("1. Wake up: early\n2. Leave at 7:", None, 0),  # 7:30
        ("- One: a\n- https:", None, 0),
        ("```\n- a: 1\n- b:", None, 0),
        ("1. One: a\n2. " + "word " * 13 + "end:", None, 0),
        ("1. One: a\n2. This is a sentence. Another:", None, 0),
        ("One: a\nTwo:", None, 0),
        ("1. One: a\n\nA paragraph.\n\n2. Two:", None, 0),
        ("", None, 0),
    ],
)
def test_titles_that_fork(written, marker, line_breaks):
    found = forking_item(written)
    assert (found and (found.item.next_marker, found.line_breaks)) == (marker and (marker, line_breaks))
    if found:
        assert written[found.begin :].rstrip() == written.rstrip().split("\n")[-1]
        assert written[found.second - 1] == "\n" and ListItem.of(written[found.second :]) is not None
        assert not found.repeated


def test_a_list_that_repeats_itself_has_run_dry():
    found = forking_item("Skills:\n1. One: a\n   b\n2. Two: c\n3. **ONE**:")
    assert found.repeated and found.second == len("Skills:\n1. One: a\n   b\n")
    assert forking_item("1. One: a\n2. One:").repeated


@pytest.mark.parametrize(
    ("item", "begun", "verdict"),
    [
        ("2. Two:", "3", "next"),
        ("2. Two:", "3. Three", "next"),
        ("2. Two:", "1", "other"),
        ("9. Nine:", "1", "next"),  # of 10.
        ("5. Five:", "7", "next"),  # its thread has seen items 1 and 5
        ("2. Two:", "- bullet", "held"),
        ("2. Two:", "**Bold", "other"),
        ("2. Two:", "In", "other"),
        ("- Two:", "-", "next"),
        ("- Two:", "---", "other"),
        ("- Two:", "*", "other"),
        ("* Two:", "**", "other"),
        ("- Two:", "1", "other"),
    ],
)
def test_what_follows_an_item(item, begun, verdict):
    item = ListItem.of(item)
    assert verdict == ("held" if item.holds(begun) else "next" if item.is_followed_by(begun) else "other")
