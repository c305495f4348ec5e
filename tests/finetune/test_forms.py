"""An answer's details forked, in line, or some of each; and the answers that loop, which are trained against."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medusa_apar.finetune.adapter import _unlikelihood
from medusa_apar.finetune.corpus import Example
from medusa_apar.finetune.forms import Forms, pack
from medusa_apar.finetune.packing import IGNORED, PackedRow, Tokens, pack_example, tokenize_example
from medusa_apar.finetune.repeats import MOST_AVOIDED, NGRAM, pack_loop, repeated_places
from medusa_apar.finetune.rules import Thread, splice

TEXT = st.text(st.characters(codec="ascii", categories=("L", "N", "P")), min_size=1, max_size=5)


@st.composite
def trees(draw, depth=2):
    pieces: list = [draw(TEXT)]
    for _ in range(draw(st.integers(0, 3))):
        if depth:
            pieces.append(draw(trees(depth - 1)))
        pieces.append(draw(TEXT))
    return Thread(pieces)


def example(tree: Thread, loops: bool = False) -> Example:
    return Example("x", [{"role": "user", "content": "Tips?"}], tree, "titled", loops=loops)


def reading_order(row: PackedRow, tokens: Tokens) -> list[int]:
    """The tokens of a row with each child in the place of its [Fork], without control tokens and ends."""
    children = {}
    for place in (row.input_ids == tokens.child).nonzero()[:, 0].tolist():
        children[int(row.parents[place])] = int(row.thread_ids[place])

    def of(thread: int) -> list[int]:
        out: list[int] = []
        for place in (row.thread_ids == thread).nonzero()[:, 0].tolist():
            token = int(row.input_ids[place])
            if token == tokens.fork:
                out += of(children[place])
            elif token not in (tokens.child, tokens.eos):
                out.append(token)
        return out

    return of(0)


@given(trees(), st.randoms(use_true_random=False))
def test_every_form_reads_the_same(tokenizer, tokens, tree, rng):
    """With byte tokens a text has one tokenization, so each form must give the plain answer's tokens."""
    sample = example(tree)
    plain = pack_example(example(Thread([splice(tree)])), tokenizer, tokens)
    row = pack_example(sample, tokenizer, tokens, lambda detail: rng.random() < 0.5)
    assert reading_order(row, tokens) == reading_order(plain, tokens)


@given(trees())
def test_only_the_wish_to_fork_is_left_out_of_a_text_in_line(tokenizer, tokens, tree):
    """In line an answer trains what the plain one does, but for the one token where it could have forked."""
    sample = example(tree)
    plain = pack_example(example(Thread([splice(tree)])), tokenizer, tokens)
    row = pack_example(sample, tokenizer, tokens, lambda detail: False)
    assert row.input_ids.tolist() == plain.input_ids.tolist()
    different = (row.trained != plain.trained).nonzero()[:, 0].tolist()
    firsts = {index for thread, index in tokenize_example(sample, tokenizer, tokens, lambda detail: False).in_line}
    assert set(different) == {index - 1 for index in firsts} and len(firsts) == len(set(map(id, _details(tree))))
    assert not row.trained[different].any()


def _details(tree: Thread) -> list[Thread]:
    return [detail for child in tree.children for detail in (child, *_details(child))]


def test_a_list_goes_on_behind_a_detail_in_line_and_a_thread_ends_behind_its_own(tokenizer, tokens):
    tree = Thread(["1. A:", Thread([" ~"]), "\n2. B:", Thread([" ^"]), "\n"])
    forks = iter([False, True])
    row = pack_example(example(tree), tokenizer, tokens, lambda detail: next(forks))
    ids, labels = row.input_ids.tolist(), row.labels().tolist()
    (a,), (b,) = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in "~^")
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    assert labels[ids.index(a)] == newline and labels[ids.index(b)] == tokens.eos
    assert labels[ids.index(a) - 2] == IGNORED  # ":" may be followed by [Fork]
    assert labels[ids.index(tokens.fork) - 1] == tokens.fork


def test_forms_have_their_shares():
    forms, rng = Forms(in_line=0.2, mixed=0.3), random.Random(0)
    counts: Counter[str] = Counter()
    for _ in range(2000):
        forks = forms.draw(rng)
        drawn = [forks(Thread()) for _ in range(12)]
        counts["forked" if all(drawn) else "mixed" if any(drawn) else "in line"] += 1
    assert counts["in line"] == pytest.approx(400, abs=60) and counts["mixed"] == pytest.approx(600, abs=70)


@pytest.mark.parametrize("shares", [(-0.1, 0.0), (0.6, 0.5)])
def test_shares_of_forms_that_cannot_be_are_refused(shares):
    with pytest.raises(ValueError, match="shares of answers in line and mixed"):
        Forms(*shares)


@given(st.lists(st.integers(0, 3), max_size=60), st.one_of(st.none(), st.integers(0, 3)))
def test_repeats_are_those_of_the_definition(ids, skip):
    expected = []
    for last in range(NGRAM - 1, len(ids)):
        gram = ids[last - NGRAM + 1 : last + 1]
        before = any(ids[start : start + NGRAM] == gram for start in range(last - NGRAM + 1))
        if before and (skip is None or skip not in gram[-2:]):
            expected.append(last)
    assert repeated_places(ids, skip) == expected


def test_a_loop_trains_nothing_but_what_it_repeats(tokenizer, tokens):
    says = " again and"
    tree = Thread(["Heads:\n1. One:", Thread([" it is" + says * 3]), "\n2. Two:", Thread([" no"]), "\n"])
    row = pack_loop(example(tree, loops=True), tokenizer, tokens)
    assert not row.trained.any() and not row.avoided[row.in_trunk].any()
    labels = [label for label in row.labels(of=row.avoided).tolist() if label != IGNORED]
    # The first time it is new, and again it takes NGRAM tokens to be a repeat.
    assert labels == tokenizer(says * 3, add_special_tokens=False)["input_ids"][len(says) + NGRAM - 1 :]


def test_a_long_loop_is_cut_and_what_forks_behind_the_cut_goes_with_it(tokenizer, tokens):
    tree = Thread(["x:", Thread([" first"]), "repeat " * 60, Thread([" gone", Thread([" too"])]), "end"])
    row = pack_loop(example(tree, loops=True), tokenizer, tokens)
    assert int(row.avoided.sum()) == MOST_AVOIDED
    assert int((row.input_ids == tokens.child).sum()) == int((row.input_ids == tokens.fork).sum()) == 1


def test_examples_that_loop_are_packed_as_such(tokenizer, tokens):
    samples = [example(Thread(["fine " * 3]), loops=False), example(Thread(["again " * 9]), loops=True)]
    good, bad = pack(samples, tokenizer, tokens, Forms(), random.Random(0))
    assert good.trained.any() and not good.avoided.any() and bad.avoided.any() and not bad.trained.any()


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=6))
def test_unlikelihood_is_the_logarithm_of_all_others(values):
    logits = torch.tensor([values], dtype=torch.float64)
    for token in range(len(values)):
        others = torch.cat([logits[:, :token], logits[:, token + 1 :]], dim=1).exp().sum() / logits.exp().sum()
        ours = _unlikelihood(logits, torch.tensor([token]))
        torch.testing.assert_close(ours, -others.log()[None], atol=1e-6, rtol=1e-6)


def test_unlikelihood_of_a_sure_token_is_finite_with_a_gradient():
    logits = torch.tensor([[60.0, -60.0]], requires_grad=True)
    loss = _unlikelihood(logits, torch.tensor([0])).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(loss) and gradient[0, 0] > 0.9 and gradient[0, 1] < -0.9
