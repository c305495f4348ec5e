"""A client of vLLM's as a server meets it: the stand-in, and what vLLM says of its model."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from medusa_apar import MedusaApar
from medusa_apar.engine.vllm import compat
from medusa_apar.serve import vllm_backend, vllm_plugin
from tests.support.stand_in_vllm import Model, SpokenPlainly, StandIn


class Config:
    """Any of vLLM's configs."""

    def __init__(self, **known: Any) -> None:
        vars(self).update(known)


def client_of(apar: MedusaApar, folder: str) -> StandIn:
    """One that answers with a model which lies in a folder."""
    client: Any = StandIn(Model(apar.model, apar.tokenizer), naps=False)
    facts = apar.facts
    client.model_config = Config(
        model=folder,
        revision=None,
        max_model_len=facts.context,
        get_vocab_size=lambda: facts.vocabulary,
        try_get_generation_config=facts.generation_config.to_diff_dict,
        generation_config="auto",
        override_generation_config={"max_new_tokens": 9},
    )
    parallel = Config(data_parallel_size=1, data_parallel_external_lb=False, data_parallel_hybrid_lb=False)
    device = Config(device_type="cpu")
    scheduler, cache = Config(policy="priority"), Config(enable_prefix_caching=True)
    client.vllm_config = Config(
        parallel_config=parallel,
        speculative_config=None,
        device_config=device,
        scheduler_config=scheduler,
        cache_config=cache,
    )
    client.renderer = Config(get_tokenizer=lambda: apar.tokenizer)
    return client


def speak_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has engines talk to clients as the stand-in understands it."""
    spoken = partial(vllm_backend.engine_over, dialect=SpokenPlainly())
    for module in (vllm_backend, vllm_plugin):
        monkeypatch.setattr(module, "engine_over", spoken)
    monkeypatch.setattr(compat, "check_version", lambda: "none is needed")
