"""Which requests can ever be answered: the lengths of prompt and answer against the model's context and the KV pool."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedModel

from medusa_apar.models.families import context_length, max_positions
from medusa_apar.threads.request import RequestOptions


class QueueFull(RuntimeError):
    """The engine takes no further request now; it may later."""


def check_ids(size: int, ids: Sequence[int], name: str = "the prompt") -> None:
    """ValueError for a token that a model of so many does not know; name: what holds the ids."""
    wrong = next((token for token in ids if not 0 <= token < size), None)
    if wrong is not None:
        raise ValueError(f"{name} holds {wrong}, but the model's vocabulary has ids from 0 to {size - 1}.")


def check_fits(
    model: PreTrainedModel, max_slots: int | None, prompts: Iterable[list[int]], options: RequestOptions
) -> None:
    """ValueError, with the numbers, for prompts that can never be answered under these options.

    max_slots: of the KV pool; None where it grows. The longest path has to fit into it alone.
    """
    longest, limit = max(map(len, prompts)), context_length(model)
    context = max_positions(model) or longest + 1
    scoring = options.score_from is not None
    if options.score_from is not None and options.score_from >= min(map(len, prompts)):
        raise ValueError(f"score_from={options.score_from} leaves no token of the text to score.")
    if longest >= context + scoring:  # a text's last token is only looked for, never fed
        raise ValueError(f"The prompt has {longest} tokens, but the model's context ends at {context}.")
    if limit is not None and longest >= limit + scoring:
        raise ValueError(
            f"The prompt has {longest} tokens, but from {limit} on this model's rotary scaling depends on the whole "
            "batch, which parallel threads cannot have."
        )
    if max_slots is None:
        return
    hidden = options.policy.max_invisible_tokens(options.max_new_tokens, options.max_depth)
    needed = longest if scoring else longest + options.max_new_tokens + hidden
    if limit is not None:
        needed = min(needed, limit)
    if max_slots < needed:
        raise ValueError(
            f"pool_slots={max_slots} is too small: a prompt of {longest} tokens and max_new_tokens="
            f"{options.max_new_tokens} may need {needed} slots."
        )
