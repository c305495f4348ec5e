"""End tokens held back: what counts is what a path holds behind the prompt, control tokens apart."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MinNewTokensLengthLogitsProcessor

from medusa_apar.verify.min_tokens import MinTokensLogitsProcessor
from tests.support.models import CHILD, CONTROL, FORK

ids = st.integers(0, 9)


@given(st.lists(ids, max_size=9), st.lists(ids, max_size=9), st.integers(0, 9), st.booleans())
def test_what_is_counted_is_read_before(prompt, written, least, in_children):
    process = MinTokensLogitsProcessor(len(prompt), least, (2, 7, 99), CONTROL, in_children)
    scores = torch.zeros(1, 9)
    after = process(torch.tensor([prompt + written], dtype=torch.long), scores)
    short = sum(token not in (FORK, CHILD) for token in written) < least
    held = short and (in_children or CHILD not in written)
    assert (after[0] == -torch.inf).nonzero()[:, 0].tolist() == ([2, 7] if held else []) and not scores.any()


@given(st.lists(ids, min_size=3, max_size=9), st.integers(0, 9))
def test_without_control_tokens_it_is_transformers_own(path, least):
    scores = torch.randn(2, 9)
    theirs = MinNewTokensLengthLogitsProcessor(3, least, [2, 7], device="cpu")
    both = torch.tensor([path, path])
    assert torch.equal(MinTokensLogitsProcessor(3, least, [2, 7])(both, scores), theirs(both, scores.clone()))


def test_what_is_negative_is_refused():
    with pytest.raises(ValueError, match=re.escape("min_tokens=-1 and end_ids=[2] must be 0 or more")):
        MinTokensLogitsProcessor(3, -1, [2])
