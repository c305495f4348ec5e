"""What a request's processors do to logits, as a list of operations that compiled code knows.

Processors of transformers, and our own, are read by exact type, since a subclass may do anything. A request with any
other processor has no recipe: Python asks its processors, path by path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import transformers
from torch import Tensor

from medusa_apar.forest.forest import Segment
from medusa_apar.threads.fork_rule import ForkRule

from .guides import GuideLogitsProcessor
from .logprobs import Top
from .min_tokens import MinTokensLogitsProcessor
from .penalties import PresenceFrequencyLogitsProcessor

_MAX_LENGTH = 2**31 - 1  # that compiled code can hold


class Operation(NamedTuple):
    """One step from logits to scores; `runtimes/cpu/scores.h` says what the numbers mean for each kind."""

    kind: str
    value: float = 0.0
    length: int = 0
    ids: tuple[int, ...] = ()
    values: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Recipe:
    """How one request's tokens come out of logits.

    seed: None for the likeliest token. reads_path: whether an operation looks at the tokens of the path. max_id: the
    greatest token id that one names; where the model has no such token, transformers says what is wrong. judged:
    whether `Chosen` is to tell of draft tokens.
    """

    operations: tuple[Operation, ...]
    seed: int | None
    reads_path: bool
    max_id: int
    judged: bool = False


class Choices(NamedTuple):
    """The rows of a step that recipes choose for.

    recipes: the requests'. rows: int64 [N, 11], a `scores.h` Choice each. paths: int64, the tokens that they read.
    masks: int32 [masks, words], what grammars allow, a bit a token.
    """

    recipes: list[Recipe]
    rows: np.ndarray
    paths: np.ndarray
    masks: np.ndarray = np.zeros((0, 0), dtype=np.int32)


class Chosen(NamedTuple):
    """What rows choose; and of judged recipes' rows, what typical acceptance goes by.

    tokens: -1 where nothing is possible. log_probs: of the row's own draft token in its parent's distribution.
    entropies: of the row's distribution, in nats. Both are of processed scores, and say nothing of other recipes' rows,
    of rows without a parent and of rows without children.
    """

    tokens: list[int]
    log_probs: list[float]
    entropies: list[float]


class Chooser(Protocol):
    """A runtime's compiled code for the host, all rows of a step in one call."""

    def choose(self, logits: Tensor, choices: Choices) -> Chosen:
        """What rows choose from `logits` [M, vocab], in the order of `choices`."""

    def top(self, logits: Tensor, rows: np.ndarray, count: int) -> Top:
        """As `logprobs.TopOfRows`; of equals the lowest id first."""


def recipe_of(
    processors: Sequence[Any],
    num_before: int,
    rule: ForkRule | None,
    seed: int | None,
    row: int = 0,
    judged: bool = False,
) -> Recipe | None:
    """The recipe of a request's processors, of which so many come before the bans of control tokens.

    It has their parameters as they are now: a processor that is changed later is not read again. row: the request's
    place in its batch, for what a processor holds by row. judged: as of `Recipe`.
    """
    operations: list[Operation] = []
    for place, processor in enumerate([*processors[:num_before], None, *processors[num_before:]]):
        if place == num_before:
            found = None if rule is None else Operation("bans", ids=(rule.fork_id, rule.child_id))
        elif (found := _operation(processor, row)) is None:
            return None
        if found is not None:
            if found.kind == "held_back":
                found = found._replace(length=1 << sum(its.kind == "held_back" for its in operations))
            operations.append(found)
    reads_path = any(operation.kind in ("repetition", "presence_frequency") for operation in operations)
    max_id = max((max(operation.ids, default=0) for operation in operations), default=0)
    return Recipe(tuple(operations), seed, reads_path, max_id, judged)


def choices_of(
    segments: Sequence[tuple[int, Segment]], bans: dict[int, list[bool]], masks: dict[int, np.ndarray]
) -> Choices:
    """The rows of segments whose requests have recipes, each segment with its first row among the logits.

    bans, masks: by first row, where `[Fork]` may not be chosen, and what a grammar allows (int32 [rows, words]).
    """
    recipes: list[Recipe] = []
    rows: list[np.ndarray] = []
    paths: list[np.ndarray] = []
    start = held = masked = 0
    for first, segment in segments:
        request, thread, drafted = segment.request, segment.thread, len(segment.draft_tokens)
        recipe = request.sampler.recipe
        path = np.array(request.path(thread) if recipe.reads_path else (), dtype=np.int64)
        length = len(request.row.ids) + thread.end - len(request.prompt_ids)
        table = np.zeros((1 + drafted, 11), dtype=np.int64)
        table[:, 0] = np.arange(first, first + 1 + drafted)
        table[:, (1, 4, 5)] = len(recipes), held, length
        table[0, 2], table[1:, 2] = -1, start + 1 + segment.draft_tree.parents[:drafted]
        table[1:, 3] = segment.draft_tokens
        keys = np.full(1 + drafted, thread.key, dtype=np.uint64)
        for fork, node in segment.forks.items():
            keys[1 + node] = segment.child_key(fork)
        table[:, 6] = keys.view(np.int64)
        table[0, 7], table[1:, 7] = thread.end, thread.end + 1 + segment.draft_tree.depths[:drafted]
        table[:, 8] = bans[first]
        table[:, 9] = request.sampler.held_back(segment)
        table[:, 10] = np.arange(masked, masked + 1 + drafted) if first in masks else -1
        recipes.append(recipe)
        rows.append(table)
        paths.append(path)
        start += 1 + drafted
        held += len(path)
        masked += len(masks.get(first, ()))
    found = [masks[first] for first, _ in segments if first in masks]
    return Choices(recipes, np.concatenate(rows), np.concatenate(paths), *([np.concatenate(found)] if found else []))


def path_operation(processor: Any, row: int) -> Operation | None:
    """What a processor does that looks at the path alone, for a batch's row; None of any other."""
    if type(processor) not in PATH_PROCESSORS:
        return None
    found: Operation = _READERS[type(processor)](processor, row)
    ids = tuple(id for id in found.ids if id >= 0)  # transformers bans none that is no token's
    return found._replace(length=max(0, min(found.length, _MAX_LENGTH)), ids=ids)


def _operation(processor: Any, row: int) -> Operation | None:
    """What a processor does; None where that is nothing compiled code knows."""
    read = _READERS.get(type(processor))
    if read is None or getattr(processor, "filter_value", -math.inf) != -math.inf:
        return None
    found: Operation | None = read(processor, row)
    if found is None or min(found.ids, default=0) < 0:
        return None
    return found._replace(length=max(0, min(found.length, _MAX_LENGTH)))


def _ids(tensor: Any) -> tuple[int, ...]:
    return tuple(tensor.reshape(-1).tolist())


def _repetition(processor: Any, row: int) -> Operation:
    ignored = processor.prompt_ignore_length
    if isinstance(ignored, Tensor):  # the padding of each row
        ignored = int(ignored[row])
    return Operation("repetition", processor.penalty, ignored or 0)


def _bias(processor: Any, row: int) -> Operation | None:
    biases = dict(processor.sequence_bias)
    if any(len(sequence) != 1 for sequence in biases):
        return None
    return Operation("bias", ids=tuple(ids[0] for ids in biases), values=tuple(biases.values()))


_READERS: dict[type, Any] = {
    transformers.RepetitionPenaltyLogitsProcessor: _repetition,
    PresenceFrequencyLogitsProcessor: lambda p, row: Operation(
        "presence_frequency", p.frequency_penalty, p.prompt_length, p.free_ids, (p.presence_penalty,)
    ),
    transformers.SequenceBiasLogitsProcessor: _bias,
    transformers.MinLengthLogitsProcessor: lambda p, row: Operation(
        "min_length", length=p.min_length, ids=_ids(p.eos_token_id)
    ),
    transformers.MinNewTokensLengthLogitsProcessor: lambda p, row: Operation(
        "min_length", length=p.prompt_length_to_skip + p.min_new_tokens, ids=_ids(p.eos_token_id)
    ),
    MinTokensLogitsProcessor: lambda p, row: Operation("held_back", ids=p.end_ids),
    GuideLogitsProcessor: lambda p, row: Operation("mask"),
    transformers.SuppressTokensLogitsProcessor: lambda p, row: Operation("suppress", ids=_ids(p.suppress_tokens)),
    transformers.TemperatureLogitsWarper: lambda p, row: Operation("temperature", p.temperature),
    transformers.TopKLogitsWarper: lambda p, row: Operation("top_k", length=p.top_k),
    transformers.TopPLogitsWarper: lambda p, row: Operation("top_p", p.top_p, p.min_tokens_to_keep),
    transformers.MinPLogitsWarper: lambda p, row: Operation("min_p", p.min_p) if p.min_tokens_to_keep == 1 else None,
    transformers.TypicalLogitsWarper: lambda p, row: Operation("typical", p.mass, p.min_tokens_to_keep),
}
# Those that `path_changes.py` can do.
PATH_PROCESSORS = {
    transformers.RepetitionPenaltyLogitsProcessor,
    PresenceFrequencyLogitsProcessor,
    transformers.MinLengthLogitsProcessor,
    transformers.MinNewTokensLengthLogitsProcessor,
    MinTokensLogitsProcessor,
    GuideLogitsProcessor,
}
