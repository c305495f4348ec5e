"""What choosing tokens costs: every way is asked, and its figures are of its own steps."""

import medusa_apar
from medusa_apar.eval import sampling
from tests.support.models import tiny_model
from tests.support.tokenizers import tiny_tokenizer


def test_every_way_of_choosing_is_measured():
    apar = medusa_apar.attach(tiny_model(), tokenizer=tiny_tokenizer())
    found = sampling.measure(apar, 6, 1)
    assert list(found) == list(sampling.WAYS)
    for row in found.values():
        assert 0 < row["verify"] < row["step"] and row["rows"] >= 1 and 1 <= row["steps"] <= 7
