"""The fork rule as a logits processor, so that plain `generate` can be run under the very same rule."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor

from medusa_apar.threads.control_tokens import ControlTokens
from medusa_apar.threads.fork_rule import ForkRule


class ControlTokensLogitsProcessor(LogitsProcessor):
    """Bans what `ForkRule` bans, as a pure function of a path.

    A path's depth is the number of `[Child]` behind the prompt, which has `prompt_length` tokens.
    """

    def __init__(self, control: ControlTokens, prompt_length: int, fork: bool = True, max_depth: int | None = None):
        self.rule, self.prompt_length = ForkRule.of(control, max_depth, fork), prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`input_ids` long [rows, length], `scores` [rows, vocab]; returns new scores."""
        depths = (input_ids[:, self.prompt_length :] == self.rule.child_id).sum(dim=1)
        scores = scores.clone()
        ban_control_tokens(self.rule, scores, input_ids[:, -1], depths)
        return scores


def ban_control_tokens(rule: ForkRule, scores: torch.Tensor, last_ids: torch.Tensor, depths: torch.Tensor) -> None:
    """Writes the rule's bans to `scores` [rows, vocab]; `last_ids` and `depths` are long [rows]."""
    scores[:, rule.child_id] = -torch.inf
    scores[rule.bans_fork(last_ids, depths), rule.fork_id] = -torch.inf
