"""Whether a runtime computes what the model itself does: tried on a short text before anything is generated."""

from __future__ import annotations

import time
from typing import cast

import numpy as np
import torch
from transformers import PreTrainedModel

from medusa_apar.drafting.draft_tree import TreeShape
from medusa_apar.forest.forest import Forest, Segment
from medusa_apar.kv.pool import KVPool
from medusa_apar.kv.slot_ledger import SlotLedger
from medusa_apar.models.families import context_length
from medusa_apar.threads.paragraph_tree import ParagraphTree

from .devices import device_of
from .runtime import Runtime

_DRAFTED = 3  # tokens of a text that are drafted, the last ones
_CHECKED = TreeShape(np.array([-1, -1, 0, 2]))  # the second node is a token that is wrong
_LENGTH = 256  # of a text where it is quick
_WORK = 10_000_000_000  # products of a forward pass that a CPU does not feel: a quarter of a second, more or less
_SECONDS = 2.0  # that a pass over the whole length may take on a CPU


@torch.no_grad()
def check_agrees(model: PreTrainedModel, runtime: Runtime, largest: float | None) -> None:
    """ValueError unless a text over a forest, in several steps, has the logits of the model's own forward pass.

    largest: share of the largest logit by which they may differ; None only tries whether they can be had.

    Families differ in more ways than a config tells (what they do to keys behind the cache, other kinds of attention);
    a text of random tokens tells at once what would otherwise fail, or silently differ, in mid-run.
    """
    device = device_of(model)
    interpreted = runtime.facts.fused_verify and device.type == "cpu"  # kernels, a hundred times as slow
    try:
        ids, logits = _some_text(model, 32 if interpreted else _LENGTH)
        with runtime.session():
            rows, ours = _over_a_forest(runtime, ids, device)
        plain = logits[rows].float()
        off = (ours - plain).abs().amax(dim=1) / plain.abs().amax(dim=1).clamp(min=1e-6)
        # Rounded weights may tip a single random token over into other activations, and its logits are then far off:
        # one row of 36 of SmolLM2-135M in int8, the others within 3 %. A model built otherwise is off in most rows.
        difference = float(off.max() if runtime.facts.kind == "float32" else off.sort().values[len(off) // 2])
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{type(model).__name__} cannot decode over a KV pool: {reason}") from error
    if largest is not None and not model.training and not difference < largest:  # dropout differs by itself
        raise ValueError(
            f"{type(model).__name__} cannot be attached: over a KV pool its logits are {difference:.0%} off its own."
        )


def _some_text(model: PreTrainedModel, most: int = _LENGTH) -> tuple[list[int], torch.Tensor]:
    """Random ids of the whole vocabulary, the same ones for the same model, and the model's own logits [ids, vocab].

    On a CPU there are fewer where a first pass over these tells that a pass over all would take its time.
    """
    vocabulary = cast(torch.Tensor, model.get_input_embeddings().weight).shape[0]
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    most = min(most, context_length(model) or most, longest or most)
    ids = np.random.default_rng(0).integers(vocabulary, size=most).tolist()
    device, few = device_of(model), most
    if device.type == "cpu":
        few = min(most, max(16, _WORK // sum(parameter.numel() for parameter in model.parameters())))
    started = time.perf_counter()
    logits = _logits(model, ids[:few], device)
    if few < most and (time.perf_counter() - started) * most / few <= _SECONDS:
        few, logits = most, _logits(model, ids, device)
    return ids[:few], logits


def _logits(model: PreTrainedModel, ids: list[int], device: torch.device) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([ids], dtype=torch.long, device=device)).logits
    return logits[0]


def _over_a_forest(runtime: Runtime, ids: list[int], device: torch.device) -> tuple[list[int], torch.Tensor]:
    """Places in a text and their logits, float32: two pieces of it, then a root with the rest drafted below it."""
    ledger, root = SlotLedger(KVPool()), len(ids) - _DRAFTED
    trunk, right = ParagraphTree(ids[:root]).trunk, ids[root:]
    wrong = right[0] - 1 if right[0] else 1
    steps = [Segment(trunk, stop) for stop in (root // 2, root - 1)]
    steps.append(Segment(trunk, root, draft_tree=_CHECKED, draft_tokens=[right[0], wrong, *right[1:]]))
    logits = []
    for segment in steps:
        found, _ = runtime.forward(Forest([[segment]], ledger, device), ledger.pool)
        logits.append(found.float().clone())
    rows = [segment.stop - 1 for segment in steps]
    return [*rows, *range(root, len(ids))], torch.cat(logits)[[0, 1, 2, 3, 5, 6]]
