"""How one request's tokens come out of logits: processors, bans, warpers, choice.

One rule serves greedy and sampling (CONTRIBUTING, promise 2): the model's choice is argmax(processed log-probs +
noise), where the noise is zero or a function of (seed, thread, position).

Scores come about as in plain transformers where `ControlTokensLogitsProcessor` is the last of the user's processors:
those see the model's own logits, control tokens are banned behind them, and the warpers of sampling come last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
import transformers
from transformers import LogitsProcessor, PrefixConstrainedLogitsProcessor

from medusa_apar.forest.forest import Segment
from medusa_apar.threads.fork_policy import fork_point
from medusa_apar.threads.request import Request, RequestOptions
from medusa_apar.triton_kernels.reference import likeliest, sample

from .guides import GuideLogitsProcessor
from .min_tokens import MinTokensLogitsProcessor
from .path_changes import MaskChange, PathChange
from .penalties import PresenceFrequencyLogitsProcessor
from .processor_state import StateWatch, name_of
from .recipe import PATH_PROCESSORS, Operation, Recipe, path_operation, recipe_of


def _exactly(*names: str) -> frozenset[type]:
    """transformers' processors of these names: the exact types, since a subclass may do anything; those that this
    version lacks are left out."""
    kinds = (
        getattr(transformers, name + kind, None) for name in names for kind in ("LogitsWarper", "LogitsProcessor", "")
    )
    return frozenset(kind for kind in kinds if kind is not None)


# Those that keep the likeliest tokens. Bans come before them, or a banned token would take the place of a possible one.
_WARPERS = _exactly("Temperature", "TopK", "TopP", "TopH", "MinP", "Typical", "Epsilon", "Eta", "LogitNormalization")
# Those that ignore `input_ids`: all rows of a request go through them at once.
_PATH_FREE = _WARPERS | _exactly("InfNanRemove", "SuppressTokens")
# Those that treat every row of a batch by itself: one row is enough to show them.
_BY_ROW = (
    _PATH_FREE
    | {PresenceFrequencyLogitsProcessor, MinTokensLogitsProcessor, GuideLogitsProcessor}
    | _exactly(
        *("NoRepeatNGram", "NoBadWords", "SequenceBias", "MinLength", "MinNewTokensLength"),
        *("ForcedBOSToken", "ForcedEOSToken", "ExponentialDecayLengthPenalty"),
        *("SuppressTokensAtBegin", "PrefixConstrained"),
    )
)
# None of those that are known here keeps anything between calls.
_STATELESS = _BY_ROW | _exactly("RepetitionPenalty", "EncoderRepetitionPenalty", "EncoderNoRepeatNGram")
_NO_IDS = cast(torch.LongTensor, torch.zeros(0, 0, dtype=torch.long, device="cpu"))


class Sampler:
    """Chooses one request's tokens; `row` is the request's place in its batch.

    before, warpers: its processors, divided into those before and those behind the bans. plain: whether a token is the
    likeliest that is not banned, and nothing else is asked. on_device: whether its scores can be made from what is
    known before the forward pass, so that a kernel can choose. guide: its grammar, None without one.
    """

    def __init__(self, options: RequestOptions, row: int = 0) -> None:
        self._row = row
        self.options, self.rule, self.seed, self.typical = options, options.rule, options.seed, options.typical
        processors = list(options.processors)
        before = num_before(processors)
        self.before: list[LogitsProcessor] = cast(Any, processors[:before])
        self.warpers: list[LogitsProcessor] = cast(Any, processors[before:])
        self.watch = StateWatch(own_part(p) for p in self.before if may_keep_state(p))
        kept = options.scores or options.logits or options.logprobs is not None
        free = options.fork_if is None and not kept
        self.on_device = free and all(is_path_free(p) or type(p) in PATH_PROCESSORS for p in processors)
        self.plain = options.seed is None and not processors and not options.scores and options.fork_if is None
        self._held_back = [p for p in self.before if type(p) is MinTokensLogitsProcessor]
        self.guide = next((p for p in self.before if type(p) is GuideLogitsProcessor), None)

    @cached_property
    def recipe(self) -> Recipe | None:
        """What compiled code chooses by; None where Python has to be asked. Made when a runtime first asks for it: to
        read a processor's ids may take a copy from a device."""
        if self.options.fork_if is not None or self.options.scores:
            return None
        processors = [*self.before, *self.warpers]
        return recipe_of(processors, len(self.before), self.rule, self.seed, self._row, self.by_thresholds)

    @cached_property
    def path_operations(self) -> list[Operation | None]:
        """Of each processor before the bans, what it does that looks at the path. To read one may wait for a device."""
        return [path_operation(processor, self._row) for processor in self.before]

    def path_changes(self, segment: Segment) -> list[PathChange | MaskChange | None]:
        """What `path_operations` change in a segment's rows. `on_device` only."""
        if not any(self.path_operations):
            return [None] * len(self.before)
        return [
            operation and self._path_change(operation, processor, segment)
            for operation, processor in zip(self.path_operations, self.before, strict=True)
        ]

    def _path_change(self, operation: Operation, processor: Any, segment: Segment) -> PathChange | MaskChange | None:
        if type(processor) is GuideLogitsProcessor:
            masks = self.masks(segment)
            return None if masks is None else MaskChange(masks)
        if type(processor) is MinTokensLogitsProcessor:
            return PathChange.bans(operation, processor.held(*_rows(segment)))
        return PathChange.of(operation, *_rows(segment))

    def held_back(self, segment: Segment) -> list[int]:
        """For each of a segment's rows, whose end tokens may not be chosen there: a bit for each processor of them."""
        bits = [0] * (1 + len(segment.draft_tokens))
        for place, processor in enumerate(self._held_back):
            for row, held in enumerate(processor.held(*_rows(segment))):
                bits[row] |= held << place
        return bits

    def masks(self, segment: Segment) -> np.ndarray | None:
        """What the request's grammar allows in a segment's rows, int32 [rows, words]; None without a grammar, and
        where it fails, which is the request's error."""
        if self.guide is None or segment.request.error is not None:
            return None
        try:
            return self.guide.masks(*_rows(segment))
        except ValueError as error:
            segment.request.error = error
            return None

    @property
    def by_thresholds(self) -> bool:
        """Whether drafts are accepted by their probability; greedy decoding is exact in either case."""
        return self.typical is not None and self.seed is not None

    def fork_bans(self, segment: Segment) -> list[bool]:
        """For the segment's root and each of its draft nodes, whether `[Fork]` may not be chosen there."""
        rule, tokens, depth = self.rule, (segment.extend_tokens[-1], *segment.draft_tokens), segment.thread.depth
        if rule is None or not rule.may_fork(depth):
            return [True] * len(tokens)
        return [rule.bans_fork(token, depth) for token in tokens]

    def banned(self, fork_banned: bool) -> list[int]:
        """The control tokens that a row may not choose."""
        if self.rule is None:
            return []
        return [self.rule.child_id, self.rule.fork_id] if fork_banned else [self.rule.child_id]

    def process(
        self,
        logits: torch.Tensor,
        fork_bans: Sequence[bool],
        changes: Sequence[Callable[[torch.Tensor], torch.Tensor] | None],
    ) -> torch.Tensor:
        """The scores of a segment's rows: `logits` [rows, vocab] -> float32, alike. `on_device` only.

        changes: of each processor before the bans, what does to scores in its place what it would; None: it does so.
        """
        scores = logits.float()
        for processor, change in zip(self.before, changes, strict=True):
            scores = change(scores) if change is not None else processor(_NO_IDS, cast(torch.FloatTensor, scores))
        if self.rule is not None:
            scores[:, self.rule.child_id] = -math.inf
            rows = [row for row, banned in enumerate(fork_bans) if banned]
            if rows:
                scores[rows, self.rule.fork_id] = -math.inf
        for warper in self.warpers:
            scores = warper(_NO_IDS, cast(torch.FloatTensor, scores))
        return scores

    def processed(self, path: list[int], logits: torch.Tensor, request: Request, banned: Sequence[int]) -> torch.Tensor:
        """float32 [vocab]: what the processors make of the logits behind a path, which is one as of `Request.path`."""
        return self._warped(self._shown(path, logits, request), banned)

    def choose(
        self,
        path: list[int],
        row: torch.Tensor,
        segment: Segment,
        ahead: Sequence[int],
        fork_banned: bool,
        key: int,
        end: int,
    ) -> tuple[torch.Tensor, int]:
        """Scores [vocab] of a row, and the token they choose.

        Args:
            path: as of `Request.path`, what was chosen in this step included.
            row: the model's logits [vocab].
            ahead: what of the path the segment's thread has chosen in this step.
            key, end: the thread's key and the path's length, which name the noise.
        """
        request, rule = segment.request, self.rule
        shown = self._shown(path, row, request)
        scores = self._warped(shown, self.banned(fork_banned))
        token = self.choice(scores, key, end)
        fork_if = self.options.fork_if
        if fork_if is None or rule is None or token != rule.fork_id:
            return scores, token
        if not request.end_ids(segment.thread).isdisjoint(ahead):  # behind an end token nothing counts
            return scores, token
        if not fork_if(fork_point(segment.thread, ahead, ahead.count(token))):
            scores = self._warped(shown, [token])
            token = self.choice(scores, key, end)
        return scores, token

    def impossible(self, path: list[int], logits: torch.Tensor, request: Request, fork_banned: bool) -> ValueError:
        """What to say where no token can be chosen: whose fault it is, found by asking one after the other again."""
        banned = self.banned(fork_banned)

        def possible(scores: torch.Tensor) -> bool:
            scores = scores.clone()
            scores[..., banned] = -math.inf
            return bool((scores > -math.inf).any())

        scores, ids = logits.float()[None].clone(), torch.tensor([path], device=logits.device)
        blamed = "the model"
        if possible(scores):
            blamed = "the logits processors"
            for processor in self.before:
                scores = _applied(processor, ids, scores, request)
                if not possible(scores):
                    blamed = name_of(processor)
                    break
            else:
                scores = scores.clone()
                scores[..., banned] = -math.inf
                for warper in self.warpers:
                    scores = warper(_NO_IDS, cast(torch.FloatTensor, scores))
                    if not possible(scores):
                        blamed = name_of(warper)
                        break
        return ValueError(f"{blamed} left no token to choose after {len(path)} tokens: every score is NaN or -inf.")

    def _shown(self, path: list[int], logits: torch.Tensor, request: Request) -> torch.Tensor:
        """float32 [vocab]: what the processors before the bans make of a row."""
        scores = logits.float()
        if not self.before:
            return scores
        ids = torch.tensor([path], dtype=torch.long, device=logits.device)
        scores = scores[None].clone()  # some processors write to what they are given
        for processor in self.before:
            scores = _applied(processor, ids, scores, request)
        self.watch.called()
        shared = request.row.batch_size > 1 or self.watch.shared or len(request.tree.threads) > 1
        if self.watch.stateful is not None and (shared or self.typical is not None):
            raise ValueError(
                f"{self.watch.stateful} between its calls, which the threads and rows of one answer would "
                "mix up: use it with fork=False, one row and exact acceptance, or have it go by the ids it is given."
            )
        return scores[0].clone()  # what a processor returns may be its own, and bans are written to this

    def _warped(self, scores: torch.Tensor, banned: Sequence[int]) -> torch.Tensor:
        """`scores` [vocab] behind the bans, which are written to it."""
        for token in banned:
            scores[token] = -math.inf
        if not self.warpers:
            return scores
        scores = scores[None]
        for warper in self.warpers:
            scores = warper(_NO_IDS, cast(torch.FloatTensor, scores))
        return scores[0]

    def choice(self, scores: torch.Tensor, key: int, position: int) -> int:
        """The token that processed scores [vocab] choose; -1 where nothing is possible."""
        return likeliest(scores) if self.seed is None else sample(scores, self.seed, key, position)


def _rows(segment: Segment) -> tuple[list[int], list[int], list[int]]:
    """What a segment's rows stand behind: a path, and below it draft nodes, their tokens and the nodes above."""
    nodes = len(segment.draft_tokens)
    return segment.request.path(segment.thread), segment.draft_tokens, segment.draft_tree.parents[:nodes].tolist()


def is_path_free(processor: Callable) -> bool:
    """Whether a processor makes the same of scores whatever the path."""
    if type(processor) is transformers.SequenceBiasLogitsProcessor:
        return all(len(sequence) == 1 for sequence in dict(processor.sequence_bias))
    return type(processor) in _PATH_FREE


def num_before(processors: Sequence[Callable]) -> int:
    """How many of a request's processors come before the bans: all but the warpers at their end."""
    behind = len(processors)
    while behind and type(processors[behind - 1]) in _WARPERS:
        behind -= 1
    return behind


def _applied(processor: LogitsProcessor, ids: torch.Tensor, scores: torch.Tensor, request: Request) -> torch.Tensor:
    """A processor's scores [1, vocab] for a row of the batch. One that may hold something per row is shown the whole
    batch and asked for one row."""
    row = request.row
    processor = _of_row(processor, row.index)
    if type(processor) in _BY_ROW or row.batch_size == 1:
        made: torch.Tensor = processor(cast(torch.LongTensor, ids), cast(torch.FloatTensor, scores))
        return made
    shown = cast(torch.LongTensor, ids.expand(row.batch_size, -1))
    made = processor(shown, cast(torch.FloatTensor, scores.repeat(row.batch_size, 1)))
    return made[row.index, None]


def own_part(processor: Callable) -> Callable:
    """The part of a processor that the user wrote."""
    allowed = isinstance(processor, PrefixConstrainedLogitsProcessor)
    return processor._prefix_allowed_tokens_fn if allowed else processor  # type: ignore[attr-defined]


def may_keep_state(processor: Callable) -> bool:
    return type(processor) not in _STATELESS or isinstance(processor, PrefixConstrainedLogitsProcessor)


def _of_row(processor: LogitsProcessor, row: int) -> LogitsProcessor:
    """A `prefix_allowed_tokens_fn` is asked by row number, and other rows' numbers do not go with this row's path."""
    if not isinstance(processor, PrefixConstrainedLogitsProcessor):
        return processor
    allowed = processor._prefix_allowed_tokens_fn
    return PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), num_beams=1)
