"""The fork rule: where control tokens may be chosen (APAR, arXiv 2401.06761, section 3). This is its one statement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .control_tokens import ControlTokens


@dataclass(frozen=True, slots=True)
class ForkRule:
    """`[Child]` is never chosen. `[Fork]` is not chosen right behind `[Fork]` or `[Child]`, nor by a thread of depth
    `max_depth`. With `fork=False` neither is ever chosen.

    A thread's depth is the number of `[Child]` on its path behind the prompt; the trunk has 0.
    """

    fork_id: int
    child_id: int
    max_depth: int
    fork: bool = True

    @classmethod
    def of(cls, control: ControlTokens, max_depth: int | None = None, fork: bool = True) -> ForkRule:
        """The rule of a model's control tokens; `max_depth` None is as deep as the model was tuned."""
        return cls(control.fork_id, control.child_id, control.max_depth if max_depth is None else max_depth, fork)

    def may_fork(self, depth: int) -> bool:
        """Whether a thread of this depth may fork at all; the ban behind a control token is `bans_fork`'s to check."""
        return self.fork and depth < self.max_depth

    def bans_fork(self, last_token: Any, depth: Any) -> Any:
        """Whether `[Fork]` may not follow `last_token` in a thread of this depth: of two ints a bool, of arrays or
        tensors one of bools."""
        follows = (last_token == self.fork_id) | (last_token == self.child_id)
        return follows | (depth >= self.max_depth) | (not self.fork)

    def banned(self, last_token: int, depth: int) -> tuple[int, ...]:
        """The token ids that may not follow `last_token` in a thread of this depth."""
        return (self.child_id, self.fork_id) if self.bans_fork(last_token, depth) else (self.child_id,)
