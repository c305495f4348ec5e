"""Rules that make paragraph trees: what forks, what does not, and that no character is lost."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_apar.finetune.corpus import MIN_FORKS, Thread, paragraph_tree, read_examples, show, splice

DETAIL = "this part explains the idea in some more words."
SENTENCE = "The first sentence names a topic."
REST = "The second one says at some length what is to be said about it."

fragments = st.one_of(
    st.sampled_from(
        ["1. ", "2) ", "- ", "* ", "  - ", "\t", "Head: ", "**Bold**: ", "**Bold:** ", "Name - ", "\n", "\n\n", "\n \n"]
    ),
    st.sampled_from([DETAIL, SENTENCE, REST, "Dr. Smith", "e.g. ", '"', "“", ":", "```", "#"]),
    st.text(max_size=8),
)
answers = st.one_of(
    st.lists(fragments, max_size=40).map("".join),
    st.lists(st.sampled_from([f"1. Head: {DETAIL}", f"{SENTENCE} {REST}", "", "- x"]), max_size=12).map("\n".join),
)


def children(tree: Thread) -> list[str]:
    return [splice(piece) for piece in tree.pieces if isinstance(piece, Thread)]


@settings(max_examples=300, deadline=None)
@given(answers, st.booleans())
def test_splicing_gives_back_the_answer(text, narrative):
    tree, kind = paragraph_tree(text, narrative)
    assert splice(tree) == text
    assert tree.forks == 0 if kind == "plain" else tree.forks >= MIN_FORKS


@settings(max_examples=200, deadline=None)
@given(answers)
def test_forks_are_apart_and_details_are_whole(text):
    tree, _ = paragraph_tree(text)
    for before, piece in zip([""] + tree.pieces, tree.pieces, strict=False):
        if isinstance(piece, Thread):
            assert isinstance(before, str) and before.strip()  # never [Fork] right after [Fork]
            detail = splice(piece)
            assert detail == detail.rstrip() and len(detail.split()) >= 6


@pytest.mark.parametrize(
    "head",
    ["1. Head:", "1) Head:", "- Head:", "* **Head**:", "• **Head:**", "1. **Head** -", "1. **Head**:", "2. Two words –",
     "  - Indented head:", '1. "A title" -', "1. `code` -", "1. At 10:30 sharp:"],
)  # fmt: skip
def test_a_head_stays_in_the_trunk(head):
    tree, kind = paragraph_tree("Intro:\n\n" + "\n".join(f"{head} {DETAIL}" for _ in range(3)) + "\n\nThe end.")
    assert kind == "titled"
    assert children(tree) == [f" {DETAIL}"] * 3
    assert tree.pieces[0] == f"Intro:\n\n{head}" and tree.pieces[-1] == "\n\nThe end."


def test_a_detail_includes_its_continuation_lines():
    item = f"1. Head:\n   {DETAIL}\n   - nested: one\n   - nested: two\n\n   Indented paragraph.\n"
    tree, _ = paragraph_tree(item * 3 + "\nAfterwards.")
    assert children(tree) == [item.removeprefix("1. Head:").rstrip("\n")] * 3
    assert tree.pieces[-1] == "\n\nAfterwards."


def test_paragraphs_fork_after_their_first_sentence():
    tree, kind = paragraph_tree("\n\n".join([f"{SENTENCE} {REST}"] * 2 + [SENTENCE] + [f"{SENTENCE} {REST}"]))
    assert kind == "paragraphs" and children(tree) == [f" {REST}"] * 3


def test_items_without_heads_fork_after_their_first_sentence():
    tree, kind = paragraph_tree("\n".join(f"{n}. {SENTENCE} {REST}" for n in range(1, 4)))
    assert kind == "items" and children(tree) == [f" {REST}"] * 3


@pytest.mark.parametrize("name", ["Dr. Smith", "the U.S. Congress", "J. S. Bach", "e.g. Rome", "Apple Inc. Here"])
def test_abbreviations_end_no_sentence(name):
    first = f"People say that {name} came first."
    tree, _ = paragraph_tree("\n\n".join([f"{first} {REST}"] * 3))
    assert tree.pieces[0] == first


@pytest.mark.parametrize(
    "extra",
    ["```\ncode\n```", "$$x$$", "\\(x\\)", "| a | b |", "<b>bold</b>", "中文", "import os;", "a = b and c = d",
     "Dear Ann,"],
)  # fmt: skip
def test_code_maths_tables_html_and_letters_stay_whole(extra):
    text = "\n".join(f"{n}. Head: {DETAIL}" for n in range(1, 5))
    assert paragraph_tree(text)[1] == "titled"
    tree, kind = paragraph_tree(f"{text}\n\n{extra}")
    assert kind == "plain" and tree.forks == 0


def test_fewer_than_three_forks_leave_the_answer_whole():
    assert paragraph_tree(f"1. Head: {DETAIL}\n2. Head: {DETAIL}\n3. Head: short")[0].forks == 0
    assert paragraph_tree(f"{SENTENCE} {REST}\n\n{SENTENCE} {REST}")[0].forks == 0


def test_speech_and_narratives_do_not_fork_by_sentence():
    speech = "\n\n".join(['"I came here first. You came a good deal later than I did."'] * 3)
    assert paragraph_tree(speech)[1] == "plain"
    assert paragraph_tree("\n\n".join([f"{SENTENCE} {REST}"] * 3), narrative=True)[1] == "plain"


def test_trees_nest():
    tree = Thread(["a", Thread([" b", Thread([" c"]), " d"]), " e"])
    assert splice(tree) == "a b c d e" and tree.forks == 2
    assert show(tree) == "a[Fork]⟨[Child] b[Fork]⟨[Child] c⟩ d⟩ e"


def test_reading_files(tmp_path):
    text = "\n".join(f"{n}. Head: {DETAIL}" for n in range(1, 4))
    messages = [{"role": "user", "content": "Tips?"}, {"role": "assistant", "content": text}]
    plain, packed = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    plain.write_text(json.dumps({"messages": messages}) + "\n")
    with gzip.open(packed, "wt") as file:
        file.write(json.dumps({"id": "x", "messages": messages}) + "\n")
    first, second = read_examples([plain, packed])
    assert (first.id, second.id) == ("a.jsonl/0", "x")
    assert first.kind == "titled" and splice(second.tree) == text and second.messages == messages[:1]
    plain.write_text(json.dumps({"messages": messages[:1]}) + "\n")
    with pytest.raises(ValueError, match="last message is by 'user'"):
        list(read_examples([plain]))
