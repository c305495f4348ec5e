"""Verification on the host: the kernels' reference, with scores made path by path where processors ask for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medusa_apar.forest.forest import Segment
from medusa_apar.threads.request import Request
from medusa_apar.triton_kernels.reference import deepest_path, likeliest, likeliest_path, walk

from .logprobs import RowLogprobs, top
from .recipe import Chooser, choices_of
from .sampler import Sampler
from .verify_result import VerifyResult


class HostVerify:
    """Chooses for segments from `logits` [M, vocab], the forest's verified rows, to which bans may be written.

    Args:
        segments: each with the place of its first verified row among the M.
        argmax: the runtime's, [M, vocab] -> long [M].
        chooser: the runtime's; None where Python and torch do all of it.
    """

    def __init__(
        self,
        segments: Sequence[tuple[int, Segment]],
        logits: Tensor,
        argmax: Callable[[Tensor], Tensor],
        chooser: Chooser | None = None,
    ) -> None:
        self._logits = logits
        by_recipe: list[tuple[int, Segment]] = []
        self._bans: dict[int, list[bool]] = {}
        self._raw: dict[int, Tensor] = {}  # by first row: the segment's rows before bans, where they are kept
        told: list[int] = []  # rows whose log-probabilities are
        banned: list[int] = []  # rows that may not choose [Fork]
        control: list[int] = []  # rows that may not choose [Child]
        masks: dict[int, np.ndarray] = {}  # by first row, what a grammar allows
        rule = None
        for first, segment in segments:
            sampler: Sampler = segment.request.sampler
            bans = self._bans[first] = sampler.fork_bans(segment)
            if segment.request.options.logits:
                self._raw[first] = logits[first : first + len(bans)].float().clone()
            if segment.request.options.logprobs is not None:
                told += range(first, first + len(bans))
            recipe = None if chooser is None or sampler.plain else sampler.recipe
            if recipe is not None and recipe.max_id < logits.shape[1]:
                by_recipe.append((first, segment))
                if (allowed := sampler.masks(segment)) is not None:
                    masks[first] = allowed
            elif sampler.rule is not None and not sampler.before:  # others see the model's own logits
                rule = sampler.rule
                control += range(first, first + len(bans))
                banned += [first + row for row, ban in enumerate(bans) if ban]
        if told:  # before bans are written
            most = max(segment.request.options.logprobs or 0 for _, segment in segments)
            self._logprobs = RowLogprobs(logits, told, most, top if chooser is None else chooser.top)
        if rule is not None:
            # Through numpy where it can be: between two steps, when nothing is in the cache, torch takes 0.1 ms for it.
            numpy = logits.device.type == "cpu" and logits.dtype == torch.float32
            columns: Any = logits.numpy() if numpy else logits
            everywhere = slice(None) if len(control) == len(logits) else np.array(control)
            columns[everywhere, rule.child_id] = -math.inf
            if banned:
                columns[np.array(banned), rule.fork_id] = -math.inf
        plain = any(segment.request.sampler.plain for _, segment in segments)
        # By row, what it chooses, of requests that have nothing to be asked in Python.
        self._chosen = dict(enumerate(greedy(logits, argmax))) if plain else {}
        self._settled = {first for first, segment in segments if segment.request.sampler.plain}
        self._judged: dict[int, tuple[float, float]] = {}  # by row, log-probability and entropy of `Chosen`
        if chooser is not None and by_recipe:
            choices = choices_of(by_recipe, self._bans, masks)
            rows, chosen = choices.rows[:, 0].tolist(), chooser.choose(logits, choices)
            self._chosen.update(zip(rows, chosen.tokens, strict=True))
            if any(recipe.judged for recipe in choices.recipes):
                self._judged = dict(zip(rows, zip(chosen.log_probs, chosen.entropies, strict=True), strict=True))
            self._settled.update(first for first, _ in by_recipe)

    def __call__(self, first: int, segment: Segment) -> VerifyResult:
        """ValueError where a row leaves no token to choose; whatever a processor or a `fork_if` raises."""
        sampler: Sampler = segment.request.sampler
        kept = sampler.options.logits or sampler.options.logprobs is not None
        if first in self._settled and not segment.draft_tokens and not kept and self._chosen[first] >= 0:
            return VerifyResult([self._chosen[first]], [], first)  # as most rows of a large batch are
        choose = _Choices(self, sampler, first, segment)
        drafted = segment.draft_tree.parents[: segment.num_candidates].tolist()
        parents = [-1, *(parent + 1 for parent in drafted)]
        ids, size = [segment.extend_tokens[-1], *segment.draft_tokens], 1 + len(drafted)
        if sampler.by_thresholds:
            accepted = self._judge(first, choose, ids, parents, len(drafted))
        else:
            accepted = walk(0, size, choose, ids, parents, len(drafted))
        last = accepted[-1] if accepted else 0
        nodes = [row - 1 for row in accepted]
        result = VerifyResult(choose.tokens, nodes, first + last, choose.scores, choose.logits, choose.logprobs)
        for fork, child in segment.forks.items():
            if fork in nodes:
                ahead = result.tokens[: nodes.index(fork) + 1]
                begun = _Choices(self, sampler, first, segment, (ahead, fork, child))
                begun(1 + child)
                row = first + 1 + child
                result.children[fork] = VerifyResult(begun.tokens, [], row, begun.scores, begun.logits, begun.logprobs)
        return result

    def _judge(self, first: int, choose: _Choices, ids: list[int], parents: list[int], depth: int) -> list[int]:
        """Takes the tokens of the rows that typical acceptance keeps, and the last one's choice; returns those rows."""
        typical, size = choose._sampler.typical, 1 + depth
        if first in self._settled:

            def judge(row: int) -> tuple[float, float]:
                return self._judged[first + row][0], typical.limit(self._judged[first + parents[row]][1])

            accepted = deepest_path(0, size, judge, parents, depth)
            for row in accepted:
                choose.took(parents[row], ids[row], None)
            choose(accepted[-1] if accepted else 0)
            return accepted

        @cache
        def scores(row: int) -> Tensor:
            return choose.scored(row, ids, parents)

        accepted = likeliest_path(0, size, scores, ids, parents, depth, typical)
        for row in accepted:
            choose.took(parents[row], ids[row], scores(parents[row]))
        last = accepted[-1] if accepted else 0
        choose.again(last, scores(last))
        return accepted


class _Choices:
    """The tokens that a segment's thread chooses in a step, asked row by row; rows count from the segment's root."""

    def __init__(
        self,
        host: HostVerify,
        sampler: Sampler,
        first: int,
        segment: Segment,
        child: tuple[list[int], int, int] | None = None,
    ) -> None:
        """child: for a drafted `[Child]`, what its parent has chosen up to the `[Fork]`, and the nodes of both."""
        self._host, self._sampler, self._first, self._segment = host, sampler, first, segment
        self._bans = host._bans[first]
        self.tokens: list[int] = []
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.logprobs: list[Any] = []
        self._key, self._end = segment.thread.key, segment.thread.end
        self._above: list[int] = []
        if child is not None:
            ahead, fork, node = child
            self._above = [*ahead, segment.draft_tokens[node]]
            self._key, self._end = segment.child_key(fork), segment.thread.end + len(self._above)
        # A plain thread is asked for its path only where something goes wrong.
        self._path: list[int] | None = None

    @property
    def _behind(self) -> list[int]:
        if self._path is None:
            self._path = self._segment.request.path(self._segment.thread) + self._above
        return self._path

    def __call__(self, row: int) -> int:
        """The token that a row chooses; -1 where the walk has to end there all the same."""
        sampler, place = self._sampler, self._first + row
        if self._first in self._host._settled:
            scores, token = None, self._host._chosen[place]
        else:
            path = self._behind + self.tokens
            scores, token = sampler.choose(
                *(path, self._host._logits[place], self._segment, self.tokens),
                *(self._bans[row], self._key, self._end + len(self.tokens)),
            )
        self.took(row, token, scores)
        return -1 if sampler.before and _is_last(self._segment, self.tokens) else token

    def scored(self, row: int, ids: list[int], parents: list[int]) -> Tensor:
        """The processed scores [vocab] of a row, whatever was chosen before it."""
        sampler, above = self._sampler, list[int]()
        node = row
        while node > 0:
            above.append(ids[node])
            node = parents[node]
        path = self._behind + above[::-1] if sampler.before else []
        banned = sampler.banned(self._bans[row])
        return sampler.processed(path, self._host._logits[self._first + row], self._segment.request, banned)

    def again(self, row: int, scores: Tensor) -> None:
        """Chooses from scores that are known."""
        token = self._sampler.choice(scores, self._key, self._end + len(self.tokens))
        self.took(row, token, scores)

    def took(self, row: int, token: int, scores: Tensor | None) -> None:
        """The thread's next token, which the row chose or accepted."""
        options, sampler = self._sampler.options, self._sampler
        if token < 0:
            path, logits = self._behind + self.tokens, self._host._logits[self._first + row]
            raise sampler.impossible(path, logits, self._segment.request, self._bans[row])
        if options.scores and scores is not None:
            self.scores.append(scores.clone())  # not a view that keeps the whole forest's logits
        if options.logits:
            self.logits.append(self._host._raw[self._first][row].clone())
        if options.logprobs is not None:
            self.logprobs.append(self._host._logprobs(self._first + row, token, options.logprobs))
        self.tokens.append(token)


def greedy(logits: Tensor, argmax: Callable[[Tensor], Tensor]) -> list[int]:
    """The likeliest token of each row of `logits` [M, vocab]; -1 where nothing is possible."""
    tokens = argmax(logits)
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        best = logits.numpy()[np.arange(len(tokens)), tokens.numpy()].tolist()
    else:
        best = logits.gather(1, tokens[:, None])[:, 0].tolist()
    pairs = zip(tokens.tolist(), best, strict=True)
    return [token if value > -math.inf else likeliest(logits[row]) for row, (token, value) in enumerate(pairs)]


def _is_last(segment: Segment, ahead: list[int]) -> bool:
    """Whether nothing is read behind what the thread has chosen in this step, so that no processor need be asked."""
    request: Request = segment.request
    if ahead[-1] in request.end_ids(segment.thread) or ahead[-1] in request.options.stop_ids:
        return True
    return len(request.tree.threads) == 1 and len(request.text) + len(ahead) >= request.max_new_tokens
