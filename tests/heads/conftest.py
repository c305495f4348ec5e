"""Tiny base models for heads, as folders."""

import pytest
import torch

from tests.support.head_layouts import make_base


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {
        False: make_base(root / "untied", max_shard_size="5KB"),
        True: make_base(root / "tied", torch.bfloat16, tied=True),
    }


@pytest.fixture
def base(bases):
    return bases[False]
