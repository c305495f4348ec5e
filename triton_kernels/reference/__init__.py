"""Plain-torch twins of the kernels: their specification, the CPU path, and the oracle of their tests.

attention.py     queries over their paths and their ancestors in the draft tree
packing.py       a step's forest, from what is sent to what the kernels read
noise.py         counter-based noise, and what a row chooses
verification.py  from logits to accepted tokens
drafting.py      residual blocks, and the likeliest tokens
"""

from .attention import dense_attention, seen_slots, tree_attention
from .drafting import medusa_draft, residual_blocks, top_logits
from .noise import gumbel_noise, likeliest, noisy, philox, sample
from .packing import Descriptor, Packed, pack
from .verification import (
    Noise,
    TypicalAcceptance,
    Verified,
    deepest_path,
    likeliest_path,
    verify,
    walk,
)

__all__ = [
    "Descriptor",
    "Noise",
    "Packed",
    "TypicalAcceptance",
    "Verified",
    "deepest_path",
    "dense_attention",
    "gumbel_noise",
    "likeliest",
    "likeliest_path",
    "medusa_draft",
    "noisy",
    "pack",
    "philox",
    "residual_blocks",
    "sample",
    "seen_slots",
    "top_logits",
    "tree_attention",
    "verify",
    "walk",
]
