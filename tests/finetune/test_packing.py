"""One packed row must be, for every thread, the plain row of its path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_apar.finetune.corpus import Example, Thread
from medusa_apar.finetune.packing import (
    IGNORED,
    PackedRow,
    attention_mask,
    join,
    pack_example,
    pack_threads,
    path_mask,
    tokenize_example,
)


@st.composite
def thread_lists(draw):
    """Token threads that nest at random: a trunk, then children under any token of an earlier thread."""
    ids = st.lists(st.integers(5, 200), min_size=1, max_size=9)
    threads = [(draw(ids), -1, 0)]
    for _ in range(draw(st.integers(0, 5))):
        parent = draw(st.integers(0, len(threads) - 1))
        threads.append((draw(ids), parent, draw(st.integers(0, len(threads[parent][0]) - 1))))
    return threads


def path_of(threads, index: int) -> list[int]:
    """The tokens a thread's last token sees, by the definition."""
    tokens, parent, fork = threads[index]
    if not index:
        return tokens
    above = path_of(threads, parent)
    return above[: len(above) - len(threads[parent][0]) + fork + 1] + tokens


def rows_on_path(row: PackedRow, last: int) -> list[int]:
    places = []
    while last >= 0:
        places.append(last)
        last = int(row.parents[last])
    return places[::-1]


def example(*pieces) -> Example:
    return Example("x", [{"role": "user", "content": "Tips?"}], Thread(list(pieces)), "titled")


NESTED = Thread([" one detail", Thread([" nested"]), " more"])
FORKING = ("Here:\n1. Head:", NESTED, "\n2. Two:", Thread([" another"]), "\nEnd.")


@settings(max_examples=40, deadline=None)
@given(st.lists(thread_lists(), min_size=1, max_size=3))
def test_packed_logits_equal_those_of_the_linear_path(fixed_model, trees):
    row = join([pack_threads(threads) for threads in trees])
    with torch.no_grad():
        packed = fixed_model(
            input_ids=row.input_ids[None],
            attention_mask=attention_mask(row.parents),
            position_ids=row.position_ids[None],
        ).logits[0]
        thread_id = 0
        for threads in trees:
            for index in range(len(threads)):
                places = rows_on_path(row, int((row.thread_ids == thread_id).nonzero()[-1]))
                path = path_of(threads, index)
                assert row.input_ids[places].tolist() == path
                linear = fixed_model(input_ids=torch.tensor([path])).logits[0]
                torch.testing.assert_close(packed[places], linear, atol=1e-4, rtol=0)
                thread_id += 1


@given(thread_lists())
def test_the_mask_holds_ancestors_and_positions_count_them(threads):
    row = pack_threads(threads)
    mask = path_mask(row.parents)
    for place in range(len(row)):
        assert mask[place].nonzero()[:, 0].tolist() == sorted(rows_on_path(row, place))
    assert torch.equal(mask.sum(1) - 1, row.position_ids)


def test_siblings_share_positions_and_do_not_see_each_other(tokenizer, tokens):
    row = pack_example(example(*FORKING), tokenizer, tokens)
    mask = path_mask(row.parents)
    children = (row.input_ids == tokens.child).nonzero()[:, 0]
    assert len(children) == 3
    for child in children.tolist():
        fork = int(row.parents[child])
        after = fork + 1  # threads are contiguous: the parent thread goes on here
        assert row.input_ids[fork] == tokens.fork and row.parents[after] == fork
        assert row.position_ids[child] == row.position_ids[after]
        assert not mask[after, child] and not mask[child, after]


def test_labels_stay_in_their_thread_and_never_are_child(tokenizer, tokens):
    row = pack_example(example(*FORKING), tokenizer, tokens)
    labels = row.labels()
    assert not (labels == tokens.child).any()
    for place, label in enumerate(labels.tolist()):
        if label == IGNORED:
            assert not row.trained[place] or row.input_ids[place] == tokens.eos
        else:
            assert row.thread_ids[place] == row.thread_ids[place + 1] and label == row.input_ids[place + 1]
    forks = (row.input_ids == tokens.fork).nonzero()[:, 0]
    after_fork = tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    assert labels[forks[0]] == after_fork  # [Fork] predicts the trunk, not [Child]
    children = (row.input_ids == tokens.child).nonzero()[:, 0]
    detail = tokenizer(" ", add_special_tokens=False)["input_ids"][0]
    assert labels[children].tolist() == [detail] * 3
    assert (labels == tokens.eos).sum() == 4  # every thread ends, the trunk too
    assert (labels == tokens.fork).sum() == 3


def test_the_prompt_is_not_trained_but_predicts_the_answer(tokenizer, tokens):
    sample = example("Yes.")
    prompt_length = tokenize_example(sample, tokenizer, tokens).prompt_length
    row = pack_example(sample, tokenizer, tokens)
    answer = tokenizer("Yes.", add_special_tokens=False)["input_ids"]
    assert row.labels()[prompt_length - 1 :].tolist() == [*answer, tokens.eos, IGNORED]
    assert (row.labels()[: prompt_length - 1] == IGNORED).all()


def test_labels_further_ahead_serve_medusa_heads():
    row = pack_threads([([5, 6, 7, 8], -1, 0), ([9, 10, 11], 0, 1)])
    assert row.labels(2).tolist() == [7, 8, IGNORED, IGNORED, 11, IGNORED, IGNORED]
    assert (row.labels(9) == IGNORED).all()


def test_joined_rows_keep_their_paths_and_labels(tokenizer, tokens):
    rows = [pack_example(example(*FORKING), tokenizer, tokens), pack_example(example("No."), tokenizer, tokens)]
    joined = join(rows)
    first = len(rows[0])
    assert torch.equal(joined.labels(), torch.cat([row.labels() for row in rows]))
    mask = path_mask(joined.parents)
    assert not mask[first:, :first].any() and not mask[:first, first:].any()
    assert torch.equal(mask[first:, first:], path_mask(rows[1].parents))


@pytest.mark.parametrize(
    ("threads", "message"),
    [
        ([([5], -1, 0), ([6], 1, 0)], "parents come first"),
        ([([5], -1, 0), ([6], -1, 0)], "only thread 0 has none"),
        ([([5], -1, 0), ([6], 0, 1)], "forks at 1 of a thread of 1 tokens"),
    ],
)
def test_threads_that_hang_nowhere_are_refused(threads, message):
    with pytest.raises(ValueError, match=message):
        pack_threads(threads)
