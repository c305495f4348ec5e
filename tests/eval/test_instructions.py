"""Instructions that are checked: each check by texts that follow it and texts that do not, and our thirty prompts."""

import os
import re

import pytest

from medusa_apar.eval import instructions, prompts
from medusa_apar.eval.instructions import CHECKS, followed, validate
from medusa_apar.eval.prompts import Prompt
from tests.support.benchmarks import lines

CASES = [
    ("items", 2, ["1. a\n2. b", "- a\n- b", "So:\n\n- a\n- b\n\nDone."], ["1. a", "a, b", "- a\n- b\n- c"]),
    ("numbered", 2, ["1. a\n2. b", "1) a\n2) b\n\n- c"], ["- a\n- b", "1. a"]),
    ("bullets", 1, ["- a", "1. a\n\nMore:\n\n- c"], ["1. a", "- a\n- b"]),
    ("titled_items", 2, ["1. A: x\n2. B: y", "- **A**: x\n- **B:** y"], ["1. a\n2. b", "1. A: x\n2. b"]),
    ("item_max_words", 2, ["1. one two\n2. three", "- one-two three"], ["1. one two three", "no items", "- b c d"]),
    ("item_has", "oak", ["- an Oak\n- oak trees"], ["- an oak\n- a beech", "oak", "- oaks"]),
    ("items_in_order", True, ["- Ash\n- Beech\n- oak"], ["- oak\n- Ash", "- Ash", "Ash"]),
    ("headings", 2, ["# A\nx\n## B\ny"], ["# A", "#A\n#B", "A\nB"]),
    ("paragraphs", 2, ["a\nb\n\nc", "a\n \n\nb\n"], ["a\nb", "a\n\nb\n\nc"]),
    ("min_words", 3, ["one two three", "1. one two-fold three, four"], ["one two", "1. one\n2. two", "- one * two"]),
    ("max_words", 2, ["one two", "1. one\n2. two"], ["one two three"]),
    ("with", ["oak", "ash"], ["Oak and ASH."], ["oaks and ash", "oak"]),
    ("without", ["oak", "ash"], ["oaks and ashes"], ["An Oak.", "so: ash"]),
    ("without", "oak", ["ash"], ["oak"]),
    ("without_characters", ",;", ["a b"], ["a, b", "a;"]),
    ("starts_with", "Dear Ann", ["Dear Ann, hello", "\nDear Ann"], ["dear Ann", "Hello. Dear Ann"]),
    ("ends_with", "The end.", ["So it was. The end.\n"], ["The end. Or not", "the end."]),
    ("lower_case", True, ["so 1 it is."], ["So it is"]),
    ("upper_case", True, ["SO 1 IT IS."], ["So IT IS"]),
    ("json_keys", ["a", "b"], ['{"b": 1, "a": [2]}', '```json\n{"a": 1, "b": 2}\n```'],
     ['{"a": 1}', '{"a": 1, "b": 2, "c": 3}', 'Here: {"a": 1, "b": 2}', '["a", "b"]', '{"a": 1, "b": 2']),
    ("title_line", True, ["# Title\n\ntext", "**Title**\ntext"], ["Title\n\n# text", "**Bold** words", "#"]),
    ("times", {"oak": 2}, ["Oak, oak and oaks", "oak oak oak"], ["oak oaks"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "told", "good", "bad"), CASES)
def test_a_check_tells_answers_apart(name, told, good, bad):
    for text in good:
        assert followed(text, {name: told}) == {name: True}, text
    for text in [*bad, "", " \n", "..."]:
        assert followed(text, {name: told}) == {name: False}, text


def test_every_check_is_tried_here():
    assert {name for name, *_ in CASES} == set(CHECKS)


@pytest.mark.parametrize(
    ("checks", "says"),
    [
        ({"item": 3}, "prompt x has a check 'item', which is none of items, "),
        ({"items": "3"}, "prompt x tells its check 'items' '3'"),
        ({"items": True}, "prompt x tells its check 'items' True"),
        ({"without": [3]}, "prompt x tells its check 'without'"),
        ({"times": {"a": "b"}}, "prompt x tells its check 'times'"),
        ({"json_keys": []}, "prompt x tells its check 'json_keys'"),
    ],
)
def test_what_is_no_check_is_said(checks, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        validate([Prompt("x", "", "?", checks=checks)])


def test_checks_and_references_are_read_with_their_prompts(tmp_path):
    path = lines(
        tmp_path / "p.jsonl",
        {"id": "a", "prompt": "?", "checks": {"items": 3}},
        {"id": "b", "turns": ["?", "?"], "reference": ["first", "second"]},
        {"id": "c", "question": "?", "answer": "7"},
        {"id": "d", "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]},
    )
    found = prompts.read(path)
    assert [p.checks for p in found] == [{"items": 3}, {}, {}, {}]
    assert [p.reference for p in found] == ["", "first", "7", "!"]
    with pytest.raises(ValueError, match=r"q\.jsonl:1 is no prompt"):
        prompts.read(lines(tmp_path / "q.jsonl", {"prompt": "?", "checks": ["items"]}))


def test_our_own_instructions():
    asked = prompts.read(prompts.INSTRUCTIONS)
    validate(asked)
    assert len(asked) == 30 and all(prompt.checks for prompt in asked)
    assert sum(prompt.category == "list" for prompt in asked) == 15


def _grams(text, n):
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[place : place + n]) for place in range(len(words) - n + 1)}


def _share(one, other):
    return len(one & other) / len(one | other) if one | other else 0.0


@pytest.mark.skipif(not os.environ.get("MEDUSA_APAR_DATA"), reason="needs the benchmarks' files")
@pytest.mark.parametrize("name", ["vicuna", "mt", "default"])
def test_our_own_instructions_are_no_benchmarks(name):
    for prompt in prompts.read(prompts.INSTRUCTIONS):
        for other in prompts.read(name):
            assert _share(_grams(prompt.text, 3), _grams(other.text, 3)) < 0.2
            assert _share(_grams(prompt.text, 1), _grams(other.text, 1)) < 0.5


def test_words_are_counted_without_list_marks():
    found = instructions.words_of("1. Don't stop.\n- **re-read** it, 3 times")
    assert found == ["don't", "stop", "re-read", "it", "3", "times"]
