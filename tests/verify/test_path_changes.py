"""What a device does to scores of a draft tree's rows, against transformers' processors, row by row and to the bit."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from medusa_apar.verify.min_tokens import MinTokensLogitsProcessor
from medusa_apar.verify.path_changes import MaskChange, PathChange
from medusa_apar.verify.penalties import PresenceFrequencyLogitsProcessor
from medusa_apar.verify.recipe import path_operation
from tests.support.models import CONTROL

VOCAB = 9  # of the scores; 9 to 11 can stand on a path all the same
ids = st.integers(0, 11)


@st.composite
def processors(draw):
    length, penalty = draw(st.integers(0, 12)), draw(st.sampled_from([0.7, 1.3]))
    padding = torch.tensor([0, length])
    return draw(
        st.sampled_from(
            [
                RepetitionPenaltyLogitsProcessor(penalty),
                RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=length),
                RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=padding),
                PresenceFrequencyLogitsProcessor(length, penalty, -0.3, (1, 4)),
                PresenceFrequencyLogitsProcessor(length, 0.0, penalty),
                MinLengthLogitsProcessor(length, torch.tensor([-1, 3, 10]), device="cpu"),
                MinNewTokensLengthLogitsProcessor(length, 2, torch.tensor([0, 8]), device="cpu"),
                MinTokensLogitsProcessor(length, 4, (0, 8, 10), CONTROL),
                MinTokensLogitsProcessor(length, 4, (3,), CONTROL, in_children=True),
            ]
        )
    )


@settings(deadline=None, max_examples=300)
@given(processors(), st.lists(ids, min_size=1, max_size=10), st.lists(st.tuples(ids, st.integers(0, 9)), max_size=8))
def test_rows_are_changed_as_their_processor_changes_them(processor, path, nodes):
    tokens, parents = [token for token, _ in nodes], [min(above, place) - 1 for place, (_, above) in enumerate(nodes)]
    scores = torch.randn(1 + len(nodes), VOCAB, generator=torch.Generator().manual_seed(len(path)))
    scores[0, 2] = -torch.inf
    before = scores.clone()
    operation = path_operation(processor, 1)
    if isinstance(processor, MinTokensLogitsProcessor):
        change = PathChange.bans(operation, processor.held(path, tokens, parents))
    else:
        change = PathChange.of(operation, path, tokens, parents)
    changed = change(scores, torch.from_numpy(change.words))
    assert torch.equal(scores, before)
    paths = [path]
    for token, parent in zip(tokens, parents, strict=True):
        paths.append([*paths[1 + parent], token])
    for row, behind in enumerate(paths):
        shown = torch.tensor([behind, behind]), scores[row].repeat(2, 1)  # a batch's second row
        assert torch.equal(changed[row], processor(*shown)[1]), (row, behind)


@given(st.integers(1, 3), st.integers(1, 200), st.integers(0, 999))
def test_masks_leave_what_their_bits_say(rows, vocab, seed):
    allowed = np.random.default_rng(seed).random((rows, -(-vocab // 32) * 32)) < 0.5
    change = MaskChange(np.packbits(allowed, axis=1, bitorder="little").view(np.int32))
    words, scores = change.words, torch.randn(rows, vocab)
    assert words.dtype == np.int64 and len(words) == change.num_words
    changed = change(scores, torch.from_numpy(words))
    assert torch.equal(changed, scores.masked_fill(torch.from_numpy(~allowed[:, :vocab]), -torch.inf))
