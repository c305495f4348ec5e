"""How many KV slots an answer will hold at most, learned from answers that have ended: what admission goes by."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from medusa_apar.threads.request import Request, Status

_BACK_OFF = 0.1  # what a preemption adds to the share of their limit that answers are expected to need
_MEMORY = 0.9  # of the running mean of what answers need, beside their limit


@dataclass(slots=True)
class SlotNeeds:
    """Args:
    context_length: most tokens of a path, None without a limit.
    share: of `max_new_tokens`, how many slots behind the prompt answers have held at once. Threads give theirs back as
        they end, so an answer that forks holds fewer than it writes; 1 before any has ended.
    """

    context_length: int | None = None
    share: float = 1.0
    _peaks: dict[Request, int] = field(default_factory=dict)  # of unfinished requests, behind their prompts

    def expected(self, request: Request) -> int:
        """Slots for prompt and answer; a preempted one needs what it had."""
        if request.options.score_from is not None:
            return len(request.prompt_ids)
        behind = max(math.ceil(self.share * request.max_new_tokens), self._peaks.get(request, 0))
        expected = len(request.prompt_ids) + behind
        return expected if self.context_length is None else min(expected, self.context_length)

    def note(self, request: Request, held: int) -> None:
        """The request holds so many slots now."""
        self._peaks[request] = max(held - len(request.prompt_ids), self._peaks.get(request, 0))

    def back_off(self) -> None:
        """Answers have needed more than was expected."""
        self.share = min(self.share + _BACK_OFF, max(self.share, 1.0))

    def learn(self, request: Request) -> None:
        """Takes over what a request that has ended tells, if it has been answered."""
        peak = self._peaks.pop(request, None)
        if peak is not None and request.status is Status.FINISHED and request.options.score_from is None:
            needed = (peak + 1) / request.max_new_tokens  # the last step's token has had a slot, too
            self.share = _MEMORY * self.share + (1 - _MEMORY) * min(needed, 2.0)
