"""Answers with what they took: steps counted request by request, and the loss of given ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from medusa_apar.events import (
    Event,
    RequestStarted,
    StepStarted,
    ThreadFinished,
    ThreadStarted,
    TokensAccepted,
    TokensInserted,
)
from medusa_apar.generate import MedusaApar
from medusa_apar.threads.paragraph_tree import Thread


@dataclass(slots=True)
class StepCounter:
    """A consumer of `generate`'s events that counts steps row by row.

    A batch's `Stats` count until its last row is done; a row's own steps end when none of its threads is left.
    """

    rows: dict[str, int] = field(default_factory=dict)  # by request id
    steps: list[int] = field(default_factory=list)  # [rows] steps in which the row was not yet done
    thread_steps: list[int] = field(default_factory=list)  # [rows] times a thread of the row gained tokens in a step
    gained: list[int] = field(default_factory=list)  # [rows] tokens gained so, those behind the limit included
    _live: list[int] = field(default_factory=list)  # [rows] threads

    def __call__(self, event: Event) -> None:
        match event:
            case RequestStarted():
                self.rows[event.request] = len(self.rows)
                for counts in (self.steps, self.thread_steps, self.gained, self._live):
                    counts.append(0)
            case ThreadStarted():
                self._live[self.rows[event.request]] += 1
            case StepStarted():
                for row, live in enumerate(self._live):
                    self.steps[row] += live > 0
            case TokensAccepted():
                self.thread_steps[self.rows[event.request]] += 1
                self.gained[self.rows[event.request]] += len(event.token_ids)
            case TokensInserted():  # in the step of what was accepted before them
                self.gained[self.rows[event.request]] += len(event.token_ids)
            case ThreadFinished():
                self._live[self.rows[event.request]] -= 1


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
        events=counter,
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
def answer_logits(model: Any, ids: list[int], prompt_length: int) -> torch.Tensor:
    """[len(ids) - prompt_length, vocab]: what transformers says in one pass before each token of the answer."""
    row = torch.tensor([ids], device=model.device)
    logits: torch.Tensor = model(input_ids=row, use_cache=False).logits
    return logits[0, prompt_length - 1 : -1].float()


def answer_loss(model: Any, ids: list[int], prompt_length: int, banned: list[int]) -> tuple[float, float]:
    """Summed cross-entropy of ids[prompt_length:], and the same with `banned` ids out of the distribution."""
    logits = answer_logits(model, ids, prompt_length)
    answer = torch.tensor(ids[prompt_length:], device=logits.device)
    raw = F.cross_entropy(logits, answer, reduction="sum")
    logits[:, banned] = -torch.inf
    return float(raw), float(F.cross_entropy(logits, answer, reduction="sum"))
