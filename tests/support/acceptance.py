"""Random tables of how often a head's guesses are right."""

import numpy as np
from hypothesis import strategies as st

ACCEPTANCE = st.lists(
    st.lists(st.floats(0.01, 0.3), min_size=1, max_size=4).map(lambda ranks: sorted(ranks, reverse=True)),
    min_size=1,
    max_size=4,
)


def chance(choice, acceptance):
    return np.prod([acceptance[head][rank] for head, rank in enumerate(choice)])
