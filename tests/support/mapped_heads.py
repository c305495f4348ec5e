"""Heads with a draft vocabulary of their own."""

import torch

from tests.support.models import VOCAB

MAP = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))[:40]


def mapped(heads):
    """The heads, which from now on propose the ids of `MAP` alone."""
    heads.register_buffer("token_map", MAP)
    heads.draft_vocab_size = len(MAP)
    return heads
