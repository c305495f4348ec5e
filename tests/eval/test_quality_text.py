"""What a text tells by itself: which lists it has, whether it stops after the first item, how much it repeats."""

import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_apar.eval.quality_text import details, lists_of, stopped_after_one, text_figures

LINES = st.lists(
    st.sampled_from(
        [
            "1. **Walk**: far",
            "2. Run: fast",
            "1. walk",
            "3) x",
            "- a",
            "- **b**",
            "  - c",
            "* d:",
            "## Head",
            "**Bold**",
            "```",
            "plain words.",
            "   deeper words",
            "",
            "",
        ]  # fmt: skip
    ),
    max_size=14,
)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("no list at all\nbut two lines", []),
        ("1. a\n2. b\n3. c", [3]),
        ("Two:\n\n- a\n- b\n\nAnd one more.\n\n- c", [2, 1]),
        ("1. A:\n\n   its detail\n\n2. B:\nits detail", [2]),
        ("1. **A**\n\nDetail below.\n\n2. **B**\n\nDetail.", [2]),
        ("1. A\n\nA paragraph.\n\n2. B", [2]),  # a number goes on
        ("1. A\n\nA paragraph.\n\n- x\n- y\n\nMore.\n\n2. B", [2, 2]),
        ("1. A\n   - x\n   - y\n2. B", [2]),
        ("1. A\n- x\n- y\n2. B", [2]),  # bullets of a numbered item
        ("1. a\n1. b\n1. c", [3]),  # as Markdown counts
        ("# H\n1. a\n2. b\n\n# G\n1. c", [2, 1]),
        ("1. a\n2) b", [1, 1]),
        ("```\n- a\n- b\n```", []),
        ("1. Run this:\n```\n2. no item\n```\n2. b", [2]),
    ],
)
def test_lists(text, sizes):
    assert [len(its) for its in lists_of(text)] == sizes


def test_heads_are_titles_or_lines():
    heads = [item.head for its in lists_of("1. **Eat Well**: fruit\n2. Sleep:\n3. *Walk a lot.*\n") for item in its]
    assert heads == ["eat well", "sleep", "walk a lot"]


@given(LINES)
@settings(deadline=None)
def test_items_lie_in_the_text_one_behind_the_other(lines):
    text = "\n".join(lines)
    items = sorted((item for its in lists_of(text) for item in its), key=lambda item: item.begin)
    for item in items:
        assert (
            text[item.begin : item.end] == text[item.begin : item.end].rstrip() != "" and item.head == item.head.lower()
        )
    assert all(one.end < other.begin for one, other in zip(items, items[1:], strict=False))


@pytest.mark.parametrize(
    "text",
    [
        "Here are some ways:\n\n1. Read widely: it is good. It makes you think.",
        "Tips:\n- one",
        "1. A:\n   - x\n   - y\n",
        "Tips:\n\n1. **A**:\n\nIts detail in a paragraph.",
        "An introduction.\n\n## First\nIts text.\n\nMore of it.",
        "An introduction.\n\n**First:**\n\nIts text.",
        "An introduction.\n\n## The only head",
    ],
)
def test_a_text_stops_after_one(text):
    assert stopped_after_one(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain words",
        "1. a\n2. b",
        "Here:\n\n1. a\n\nSo that is it.",
        "2. the end of a list",
        "# A title\n\nIts text.",
        "An introduction.\n\n## A\nx\n\n## B\ny",
        "An introduction.\n\n## A\n- x\n- y",
        "Look:\n```\n# a comment\n```",
        "It has **bold** words:\n\nand a paragraph.",
    ],
)
def test_a_text_does_not_stop_after_one(text):
    assert not stopped_after_one(text)


def test_figures_by_hand():
    found = text_figures("1. Walk: far.\n2. walk: far.", [1, 2, 3, 4, 1, 2, 3, 4], ended=True)
    assert found["ended"] == 1 and found["stopped_after_one"] == 0 and found["has_list"] == 1
    assert found["items_per_list"] == 2 and found["duplicate_heads"] == 0.5
    assert found["repeated_4grams"] == pytest.approx(1 / 5)  # 1234 2341 3412 4123 1234
    assert found["distinct_1"] == pytest.approx(4 / 6) and found["distinct_2"] == pytest.approx(4 / 5)
    assert found["distinct_3"] == 1 and found["looping"] == 0


def test_loops_are_told_and_what_is_not_there_is_none():
    assert text_figures("a b a b a b", [1, 2, 1, 2, 1, 2], ended=False)["looping"] == 1
    nothing = text_figures("", [], ended=True)
    for name in ("items_per_list", "duplicate_heads", "repeated_4grams", "distinct_1", "distinct_3", "compression"):
        assert nothing[name] is None
    assert nothing["ended"] == 1 and nothing["stopped_after_one"] == nothing["has_list"] == nothing["looping"] == 0
    assert text_figures("Tips:\n- one", [1], ended=False)["stopped_after_one"] == 0  # the limit stopped it


def test_what_says_the_same_again_compresses_better():
    once, often = ("".join(f"{n} says {n * n}. " for n in range(40)), "it says it again. " * 40)
    found = [text_figures(text, [], ended=True)["compression"] for text in (once, often)]
    assert found[0] == pytest.approx(len(once) / len(zlib.compress(once.encode(), 9))) and found[1] > 3 * found[0]


def test_details_are_what_the_rule_cuts_off():
    detail = " one two three four five six seven."
    text = "Three:\n\n" + "\n".join(f"{n}. {name}:{detail}" for n, name in enumerate(("Apple", "Pear", "Plum"), 1))
    found = details(text, "What is good?")
    assert [its.head for its in found] == ["1. Apple:", "2. Pear:", "3. Plum:"]
    assert [text[its.begin : its.end] for its in found] == [detail] * 3
    assert details("plain words", "What?") == []


def test_a_storys_paragraphs_are_no_details():
    paragraphs = "\n\n".join(f"{who} went out. The night was dark and long and cold." for who in ("Ann", "Bob", "Cid"))
    assert len(details(paragraphs, "Who went out?")) == 3 and details(paragraphs, "Write a story.") == []
