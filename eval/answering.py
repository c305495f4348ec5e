"""Answers with what they took: steps counted request by request, and the loss of given ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from medusa_apar.generate import MedusaApar
from medusa_apar.output import Stats
from medusa_apar.paragraph_tree import ParagraphTree, Thread


@dataclass(slots=True)
class StepCounter:
    """An observer of `generate` that counts steps row by row.

    A batch's `Stats` count until its last row is done; a row's own steps end when its tree has no live thread left.
    """

    steps: list[int] = field(default_factory=list)  # [rows] steps in which the row was not yet done
    thread_steps: list[int] = field(default_factory=list)  # [rows] times a thread of the row gained tokens in a step
    gained: list[int] = field(default_factory=list)  # [rows] tokens gained so, those behind the limit included
    _live: list[bool] = field(default_factory=list)
    _lengths: dict[Thread, int] = field(default_factory=dict)

    def __call__(self, trees: list[ParagraphTree], stats: Stats) -> None:
        if not self._live:
            self._live = [True] * len(trees)
            self.steps, self.thread_steps, self.gained = ([0] * len(trees) for _ in range(3))
        for row, tree in enumerate(trees):
            if not self._live[row]:
                continue
            self.steps[row] += 1
            self._live[row] = tree.live
            for thread in tree.threads:
                gained = len(thread.token_ids) - self._lengths.get(thread, 0)
                if gained:
                    self._lengths[thread] = len(thread.token_ids)
                    self.thread_steps[row] += 1
                    self.gained[row] += gained


def answer(apar: MedusaApar, prompts: list[list[int]], max_new_tokens: int, fork: bool) -> list[dict[str, Any]]:
    """One batch, greedily answered.

    Per prompt: `steps`, `thread_steps` and `gained` of `StepCounter`, `ids` (the answer in reading order) and `threads`
    (parent, index of its `[Fork]` among the parent's own tokens, own tokens, finish_reason).
    """
    longest = max(map(len, prompts))
    device = apar.model.device
    pads = [longest - len(prompt) for prompt in prompts]
    counter = StepCounter()
    output = apar.generate(
        input_ids=torch.tensor([[0] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)], device=device),
        attention_mask=torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        fork=fork,
        observer=counter,
        return_dict_in_generate=True,
    )
    records = []
    for row, tree in enumerate(output.paragraph_tree):
        ids = [thread.tokens[index] for thread, index in tree.reading_order()][:max_new_tokens]
        counts = {name: getattr(counter, name)[row] for name in ("steps", "thread_steps", "gained")}
        records.append({**counts, "ids": ids, "threads": [_thread_record(thread) for thread in tree.threads]})
    return records


def _thread_record(thread: Thread) -> dict[str, Any]:
    parent = thread.parent
    return {
        "parent": -1 if parent is None else parent.index,
        "fork_index": -1 if parent is None else thread.fork_index - parent.num_forced,
        "token_ids": thread.token_ids,
        "finish_reason": thread.finish_reason,
    }


@torch.no_grad()
def answer_loss(model: Any, ids: list[int], prompt_length: int, banned: list[int]) -> tuple[float, float]:
    """Summed cross-entropy of ids[prompt_length:], and the same with `banned` ids out of the distribution."""
    row = torch.tensor([ids], device=model.device)
    logits = model(input_ids=row, use_cache=False).logits[0, prompt_length - 1 : -1].float()
    raw = F.cross_entropy(logits, row[0, prompt_length:], reduction="sum")
    logits[:, banned] = -torch.inf
    return float(raw), float(F.cross_entropy(logits, row[0, prompt_length:], reduction="sum"))
