"""What generation configs and models of other families are read as."""

import pytest
from transformers import GenerationConfig

from medusa_apar.models.families import end_tokens


@pytest.mark.parametrize(("named", "ids"), [(None, []), (0, [0]), (7, [7]), ([7], [7]), ([7, 0], [7, 0])])
def test_every_end_that_a_config_names_is_one(named, ids):
    assert end_tokens(GenerationConfig(eos_token_id=named)) == ids


def test_a_model_without_a_generation_config_names_none():
    assert end_tokens(None) == []
