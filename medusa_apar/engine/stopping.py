"""What ends an answer: stopping criteria, limits and end tokens of a call as transformers says them, stop strings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import GenerationConfig
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from medusa_apar.events.texts import TextStream
from medusa_apar.threads.request import Request


class StopConditions(NamedTuple):
    """What ends an answer. `eos_ids` end a thread, `criteria` are asked of the reading order."""

    max_new_tokens: int
    eos_ids: frozenset[int]
    criteria: list[Callable]

    @classmethod
    def of(
        cls, stopping_criteria: Sequence[Callable], config: GenerationConfig, prompt_length: int, one_thread: bool
    ) -> StopConditions:
        """From the list that transformers makes of a call's own criteria and of the config's.

        A `MaxLengthCriteria` or `EosTokenCriteria` of the call's, but no subclass of them, replaces the config's there.
        Threads end at the config's end tokens all the same, as they were trained to; with `one_thread` nothing does.
        """
        lengths = [criterion.max_length for criterion in stopping_criteria if type(criterion) is MaxLengthCriteria]
        eos: torch.Tensor | None = config._eos_token_tensor
        eos_ids = frozenset() if eos is None else frozenset(eos.flatten().tolist())
        ends = [criterion for criterion in stopping_criteria if type(criterion) is EosTokenCriteria]
        configs = [criterion for criterion in ends if set(criterion.eos_token_id.flatten().tolist()) == eos_ids]
        criteria = [
            criterion
            for criterion in stopping_criteria
            if type(criterion) is not MaxLengthCriteria and not any(criterion is known for known in configs)
        ]
        replaced = one_thread and bool(ends) and not configs
        length = math.ceil(min(lengths, default=config.max_length)) - prompt_length
        # transformers asks a criterion behind a token, so that there is one.
        return cls(max(length, 1), frozenset() if replaced else eos_ids, criteria)


class CriteriaStop:
    """transformers' stopping criteria as a `RequestOptions.stop`; one for each request.

    Criteria may hold something per row of the batch, so they are shown the whole batch and asked for one row.
    """

    def __init__(self, criteria: Sequence[Callable], device: torch.device | str) -> None:
        self._criteria, self._device = criteria, device
        self._ids: torch.Tensor | None = None  # long [capacity]: the row, then the text
        self._known = 0  # tokens of the text that are among them
        self._scores: list[torch.Tensor] = []  # of the text, [batch, vocab] each

    def __call__(self, request: Request) -> bool:
        row = request.row
        ids = self._text(request)[None].expand(row.batch_size, -1)
        scores = None
        if request.options.scores:
            for thread, index in request.text[len(self._scores) :]:
                own = request.scores[thread][index - thread.num_forced]
                self._scores.append(own.expand(row.batch_size, -1))
            scores = tuple(self._scores)
        verdicts = [torch.as_tensor(criterion(ids, scores)).expand(row.batch_size) for criterion in self._criteria]
        return any(bool(verdict[row.index]) for verdict in verdicts)

    def _text(self, request: Request) -> torch.Tensor:
        """Row and text, long [length]; it grows in place, as it would be made anew for every token."""
        before, new = len(request.row.ids), request.text_ids[self._known :]
        length = before + len(request.text_ids)
        if self._ids is None or len(self._ids) < length:
            whole = torch.tensor(request.row.ids + request.text_ids, dtype=torch.long, device=self._device)
            self._ids = torch.cat([whole, torch.zeros_like(whole)])
        else:
            self._ids[before + self._known : length] = torch.tensor(new, dtype=torch.long, device=self._device)
        self._known = len(request.text_ids)
        return self._ids[:length]


class TextStop:
    """Stop strings as a `RequestOptions.stop`; one for each request. They end the answer at the token that brings the
    last character of one, as a reader of the text would."""

    def __init__(self, text: TextStream) -> None:
        self._text, self._known = text, 0

    def __call__(self, request: Request) -> bool:
        for token in request.text_ids[self._known :]:
            self._text.push(token)
        self._known = len(request.text_ids)
        return self._text.stopped
