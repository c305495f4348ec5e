"""From logits to accepted tokens: walk each draft tree for as long as it guessed what the model would have chosen.

One rule serves greedy and sampling (DESIGN promise 2): the model's choice at a node is argmax(processed log-probs +
noise), where the noise is zero or a function of (seed, thread, position). A draft is accepted iff it is that choice.
Typical acceptance, for those who ask for it, takes drafts that are merely likely enough: see `TypicalAcceptance`.

Scores come about as in plain transformers where `ControlTokensLogitsProcessor` is the last of the user's processors:
those see the model's own logits, control tokens are banned behind them, and the warpers of sampling come last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import transformers
from transformers import LogitsProcessor, LogitsProcessorList, PrefixConstrainedLogitsProcessor

from medusa_apar.forest.forest import Forest, Stem
from medusa_apar.threads.control_tokens import ControlTokens
from medusa_apar.threads.fork_policy import ForkIf, fork_point
from medusa_apar.threads.paragraph_tree import Thread
from medusa_apar.threads.request import Request
from medusa_apar.triton_kernels import reference
from medusa_apar.triton_kernels.reference import TypicalAcceptance, Verified, likeliest, sample

from .device_verify import Choice, Drafting
from .processor_state import StateWatch, name_of
from .verdict import Verdict


def _exactly(*names: str) -> frozenset[type]:
    """transformers' processors of these names: the exact types, since a subclass may do anything; those that this
    version lacks are left out."""
    kinds = (
        getattr(transformers, name + kind, None) for name in names for kind in ("LogitsWarper", "LogitsProcessor", "")
    )
    return frozenset(kind for kind in kinds if kind is not None)


# Those that keep the likeliest tokens. Bans come before them, or a banned token would take the place of a possible one.
_WARPERS = _exactly("Temperature", "TopK", "TopP", "TopH", "MinP", "Typical", "Epsilon", "Eta", "LogitNormalization")
# Those that ignore `input_ids`: all rows of a forest go through them at once.
_PATH_FREE = _WARPERS | _exactly("InfNanRemove", "SuppressTokens")
# Those that treat every row of a batch by itself: one row is enough to show them.
_BY_ROW = _PATH_FREE | _exactly(
    *("NoRepeatNGram", "NoBadWords", "SequenceBias", "MinLength", "MinNewTokensLength"),
    *("ForcedBOSToken", "ForcedEOSToken", "ExponentialDecayLengthPenalty"),
    *("SuppressTokensAtBegin", "PrefixConstrained"),
)
# None of transformers' own that are known here keeps anything between calls.
_STATELESS = _BY_ROW | _exactly("RepetitionPenalty", "EncoderRepetitionPenalty", "EncoderNoRepeatNGram")
_NO_IDS = cast(torch.LongTensor, torch.zeros(0, 0, dtype=torch.long, device="cpu"))


@dataclass(slots=True)
class Verifier:
    """How tokens are chosen in one generate call.

    `control` bans what the fork rule bans (see ControlTokensLogitsProcessor, the same rule on a plain path).
    """

    control: ControlTokens | None
    fork: bool
    max_depth: int
    processors: LogitsProcessorList
    seed: int | None  # None: greedy
    fork_if: ForkIf | None = None  # asked wherever the model would choose `[Fork]`; where it says no, that is banned
    keep_scores: bool = False
    keep_logits: bool = False
    argmax: Callable[[torch.Tensor], torch.Tensor] = partial(torch.argmax, dim=-1)  # of logits [M, vocab]
    # triton_kernels.verify, or its reference, to be used wherever a path's tokens do not change its logits.
    in_one_launch: Callable[..., Verified] | None = None
    typical: TypicalAcceptance | None = None  # None: exact
    watch: StateWatch | None = None  # None: a new one
    # Written by __post_init__, which divides `processors` into those before and behind the bans:
    before: list[LogitsProcessor] = field(init=False)
    warpers: list[LogitsProcessor] = field(init=False)

    def __post_init__(self) -> None:
        behind = len(self.processors)
        while behind and type(self.processors[behind - 1]) in _WARPERS:
            behind -= 1
        self.before, self.warpers = list(self.processors[:behind]), list(self.processors[behind:])
        if self.watch is None:
            self.watch = StateWatch(_own(processor) for processor in self.before if _may_keep_state(processor))

    def choice(self, forest: Forest, depth: int, drafting: Drafting | None) -> Choice | None:
        """Verification in one launch, and drafting behind it; None where a path's tokens change its logits, or scores
        have to be kept. depth: most draft nodes that a thread can accept."""
        by_path = self.fork_if is not None or any(type(processor) not in _PATH_FREE for processor in self.processors)
        if self.in_one_launch is None or by_path or self.keep_scores or self.keep_logits:
            return None

        def process(logits: torch.Tensor) -> torch.Tensor:
            scores = logits.float()
            for processor in self.before:
                scores = processor(_NO_IDS, scores)
            scores = self._ban(forest, scores)
            for warper in self.warpers:
                scores = warper(_NO_IDS, scores)
            return scores

        return Choice.of(
            *(self.in_one_launch, forest, self.control, self.fork_bans(forest), self.seed, depth, drafting),
            process=process if self.processors else None,
            typical=self.typical,
        )

    def __call__(self, forest: Forest, logits: torch.Tensor, requests: dict[Stem, Request]) -> list[Verdict]:
        """`logits` [M, vocab] of the forest's verified rows; a verdict per verified stem, in order. ValueError where a
        row leaves no token to choose."""
        raw = logits.float() if self.keep_logits else None
        if self.keep_logits:
            logits = logits.clone()
        if self.typical is not None:
            return self._typically(forest, logits, raw, requests)
        per_path = self.seed is not None or len(self.processors) > 0 or self.keep_scores or self.fork_if is not None
        if not self.before:
            logits = self._ban(forest, logits)
        targets = None if per_path else self.greedy(logits)
        bans = self.fork_bans(forest)

        def choose(verdict: Verdict, path: list[int], request: Request, stem: Stem, key: int, end: int) -> int:
            """Chooses the next token of a verdict, from the logits of its row, and appends it."""
            ahead, banned = verdict.tokens, self._banned(bans[verdict.row])
            if targets is not None:
                token = targets[verdict.row]
            else:
                asked = stem.thread, ahead
                scores, token = self._scored(
                    *(path + ahead, logits[verdict.row], request, banned, asked, key, end + len(ahead))
                )
                if self.keep_scores:
                    verdict.scores.append(scores.clone())  # not a view that keeps the whole forest's logits
            if token < 0:
                raise self._impossible(path + ahead, logits[verdict.row], request, banned)
            if raw is not None:
                verdict.logits.append(raw[verdict.row].clone())
            verdict.tokens.append(token)
            return token

        verdicts, first = [], 0
        for stem in forest.verified:
            verdict, request, thread = Verdict([], [], first), requests[stem], stem.thread
            path = request.path(thread) if per_path else []
            guesses = _guesses(stem)
            node = -1
            while True:
                verdict.row = first + 1 + node
                token = choose(verdict, path, request, stem, thread.key, thread.end)
                guess = guesses.get((node, token))
                if guess is None or (self.before and _is_last(request, verdict.tokens)):
                    break
                verdict.nodes.append(guess)
                node = guess
            for fork, child in stem.forks.items():
                if fork in verdict.nodes:
                    ahead = verdict.nodes.index(fork) + 1
                    begun = verdict.children[fork] = Verdict([], [], first + 1 + child)
                    above = [*path, *verdict.tokens[:ahead], stem.draft_tokens[child]]
                    choose(begun, above, request, stem, stem.child_key(fork), thread.end + ahead + 1)
            verdicts.append(verdict)
            first += 1 + len(stem.draft_tokens)
        return verdicts

    def _typically(
        self, forest: Forest, logits: torch.Tensor, raw: torch.Tensor | None, requests: dict[Stem, Request]
    ) -> list[Verdict]:
        """By the rule's own reference, from the scores of every node: the longest path is known only in the end."""
        scores = self._scores_of_all(forest, logits, requests)
        depth = max(stem.draft_tree.height for stem in forest.verified)
        unbanned = [False] * len(scores)  # what is banned is impossible by now
        choice = Choice.of(
            reference.verify, forest, None, unbanned, self.seed, depth, drafting=None, typical=self.typical
        )
        verdicts = self.read(choice, choice.run(scores, scores, choice.inputs()), forest, logits, requests)
        first = 0
        for stem, verdict in zip(forest.verified, verdicts, strict=True):
            kept = [(verdict, [first, *(first + 1 + node for node in verdict.nodes)])]
            for its, rows in kept + [(begun, [begun.row]) for begun in verdict.children.values()]:
                its.scores = [scores[row].clone() for row in rows] if self.keep_scores else []
                its.logits = [raw[row].clone() for row in rows] if raw is not None else []
            first += 1 + len(stem.draft_tokens)
        return verdicts

    def _scores_of_all(self, forest: Forest, logits: torch.Tensor, requests: dict[Stem, Request]) -> torch.Tensor:
        """What `logits` [M, vocab] are after each row's processors, float32. Bans may be written to `logits`."""
        if not self.before:
            logits = self._ban(forest, logits)
        if not self.processors:
            return logits.float()
        scores: list[torch.Tensor] = []
        bans = self.fork_bans(forest)
        for stem in forest.verified:
            paths = [requests[stem].path(stem.thread)]
            for parent, token in zip(stem.draft_tree.parents.tolist(), stem.draft_tokens, strict=False):
                paths.append([*paths[parent + 1], token])
            for path in paths:
                row = len(scores)
                scores.append(self.processed(path, logits[row], requests[stem], self._banned(bans[row])))
        return torch.stack(scores)

    def read(
        self,
        choice: Choice,
        chosen: torch.Tensor,
        forest: Forest,
        logits: torch.Tensor,
        requests: dict[Stem, Request],
    ) -> list[Verdict]:
        """What a choice of this forest's `logits` chose. ValueError where a row leaves no token to choose."""
        verdicts = choice.read(chosen)
        for stem, verdict in zip(forest.verified, verdicts, strict=True):
            for its in (verdict, *verdict.children.values()):
                if its.tokens[-1] < 0:
                    path, banned = requests[stem].path(stem.thread), self._banned(self.fork_bans(forest)[its.row])
                    raise self._impossible(path + its.tokens[:-1], logits[its.row], requests[stem], banned)
        return verdicts

    def greedy(self, logits: torch.Tensor) -> list[int]:
        """The likeliest token of each row of `logits` [M, vocab]; -1 where nothing is possible."""
        tokens = self.argmax(logits)
        if logits.device.type == "cpu" and logits.dtype == torch.float32:
            best = logits.numpy()[np.arange(len(tokens)), tokens.numpy()].tolist()
        else:
            best = logits.gather(1, tokens[:, None])[:, 0].tolist()
        pairs = zip(tokens.tolist(), best, strict=True)
        return [token if value > -math.inf else likeliest(logits[row]) for row, (token, value) in enumerate(pairs)]

    def _ban(self, forest: Forest, logits: torch.Tensor) -> torch.Tensor:
        if self.control is None:
            return logits
        # Through numpy where it can be: between two steps, when nothing is in the cache, torch takes 0.1 ms for it.
        plain = logits.device.type == "cpu" and logits.dtype == torch.float32
        columns: Any = logits.numpy() if plain else logits
        columns[:, self.control.child_id] = -math.inf
        banned = self.fork_bans(forest)
        if any(banned):
            columns[np.flatnonzero(banned), self.control.fork_id] = -math.inf
        return logits

    def may_fork(self, thread: Thread) -> bool:
        """But for what its last token forbids."""
        return self.fork and thread.depth < self.max_depth

    def fork_bans(self, forest: Forest) -> list[bool]:
        """For each verified row whether it may not choose `[Fork]`."""
        control = self.control and (self.control.fork_id, self.control.child_id)
        return [
            not control or not self.may_fork(stem.thread) or token in control
            for stem in forest.verified
            for token in (stem.pending[-1], *stem.draft_tokens)
        ]

    def _banned(self, fork_banned: bool) -> list[int]:
        """The control tokens that a row may not choose."""
        if self.control is None:
            return []
        return [self.control.child_id, self.control.fork_id] if fork_banned else [self.control.child_id]

    def processed(self, path: list[int], logits: torch.Tensor, request: Request, banned: Sequence[int]) -> torch.Tensor:
        """float32 [vocab]: what the processors make of the logits behind a path, which is one as of `Request.path`."""
        return self._warped(self._shown(path, logits, request), banned)

    def _shown(self, path: list[int], logits: torch.Tensor, request: Request) -> torch.Tensor:
        """float32 [vocab]: what the processors before the bans make of a row."""
        scores = logits.float()
        if not self.before:
            return scores
        assert self.watch is not None
        ids = torch.tensor([path], dtype=torch.long, device=logits.device)
        scores = scores[None].clone()  # some processors write to what they are given
        for processor in self.before:
            scores = _applied(processor, ids, scores, request)
        self.watch.called()
        if self.watch.stateful is not None and (
            request.batch_size > 1 or len(request.tree.threads) > 1 or self.typical is not None
        ):
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
            scores = warper(_NO_IDS, scores)
        return scores[0]

    def _impossible(self, path: list[int], logits: torch.Tensor, request: Request, banned: Sequence[int]) -> ValueError:
        """What to say where no token can be chosen: whose fault it is, found by asking one after the other again."""

        def possible(scores: torch.Tensor) -> bool:
            scores = scores.clone()
            scores[..., list(banned)] = -math.inf
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
                scores[..., list(banned)] = -math.inf
                for warper in self.warpers:
                    scores = warper(_NO_IDS, scores)
                    if not possible(scores):
                        blamed = name_of(warper)
                        break
        return ValueError(f"{blamed} left no token to choose after {len(path)} tokens: every score is NaN or -inf.")

    def _scored(
        self,
        path: list[int],
        row: torch.Tensor,
        request: Request,
        banned: Sequence[int],
        asked: tuple[Thread, list[int]],
        key: int,
        end: int,
    ) -> tuple[torch.Tensor, int]:
        """Processed scores of a row behind the path, and the token they choose; `end` is its path position.
        asked: the thread, and what of the path it has chosen in this step."""
        shown = self._shown(path, row, request)
        scores = self._warped(shown, banned)
        token = self._choose(scores, key, end)
        if self.fork_if is None or self.control is None or token != self.control.fork_id:
            return scores, token
        thread, ahead = asked
        if not request.tree.eos_ids.isdisjoint(ahead):  # behind an end token nothing counts
            return scores, token
        if not self.fork_if(fork_point(thread, ahead, ahead.count(token))):
            scores = self._warped(shown, [token])
            token = self._choose(scores, key, end)
        return scores, token

    def _choose(self, scores: torch.Tensor, key: int, position: int) -> int:
        return likeliest(scores) if self.seed is None else sample(scores, self.seed, key, position)


def _applied(processor: LogitsProcessor, ids: torch.Tensor, scores: torch.Tensor, request: Request) -> torch.Tensor:
    """A processor's scores [1, vocab] for a row of the batch. One that may hold something per row is shown the whole
    batch and asked for one row."""
    processor = _of_row(processor, request.row)
    if type(processor) in _BY_ROW or request.batch_size == 1:
        return processor(cast(torch.LongTensor, ids), cast(torch.FloatTensor, scores))
    rows = request.batch_size
    return processor(ids.expand(rows, -1), scores.repeat(rows, 1))[request.row, None]


def _own(processor: LogitsProcessor) -> Callable:
    """What of a processor is the user's."""
    allowed = isinstance(processor, PrefixConstrainedLogitsProcessor)
    return processor._prefix_allowed_tokens_fn if allowed else processor  # type: ignore[attr-defined]


def _may_keep_state(processor: LogitsProcessor) -> bool:
    return type(processor) not in _STATELESS or isinstance(processor, PrefixConstrainedLogitsProcessor)


def _is_last(request: Request, ahead: list[int]) -> bool:
    """Whether nothing is read behind what the thread has chosen in this step, so that no processor need be asked."""
    if ahead[-1] in request.tree.eos_ids:
        return True
    return len(request.tree.threads) == 1 and len(request.text) + len(ahead) >= request.max_new_tokens


def _of_row(processor: LogitsProcessor, row: int) -> LogitsProcessor:
    """A `prefix_allowed_tokens_fn` is asked by row number, and other rows' numbers do not go with this row's path."""
    if not isinstance(processor, PrefixConstrainedLogitsProcessor):
        return processor
    allowed = processor._prefix_allowed_tokens_fn
    return PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), num_beams=1)


def _guesses(stem: Stem) -> dict[tuple[int, int], int]:
    """(parent node, token) -> node; -1 is the root."""
    parents = stem.draft_tree.parents[: stem.guessed].tolist()
    return {(parent, token): node for node, (parent, token) in enumerate(zip(parents, stem.draft_tokens, strict=False))}
