"""What happens behind a step's forward pass: verification, and drafting where both stay on the device.

A kernel verifies all threads that it can in one launch, whatever their seeds and temperatures. The host verifies the
others, each for itself: those whose processors have to be asked path by path, or whose scores are to be kept. Without a
kernel it verifies all.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from torch import Tensor

from medusa_apar.drafting.recycling import TOP_K, SeenRows, shares_of
from medusa_apar.drafting.speculator import Drafting
from medusa_apar.forest.forest import Forest, Segment
from medusa_apar.threads.request import Request
from medusa_apar.triton_kernels.reference import Verified

from .device_verify import DeviceVerify
from .host_verify import HostVerify
from .logprobs import top
from .recipe import Chooser
from .scoring import score
from .verify_result import VerifyResult


class StepOutput(NamedTuple):
    """What a runtime's step returns, of the forest's M verified rows.

    logits: [M, vocab]. hidden: [M, input_size]. chosen: what the tail's device part has written, None without one.
    states: of all N rows, [N, boundaries * hidden size], for layers that run behind the base; None beyond a runtime.
    """

    logits: Tensor
    hidden: Tensor
    chosen: Tensor | None = None
    states: Tensor | None = None


class Tail:
    """One step's verification, ready to run behind its forward pass.

    Args:
        verify: `triton_kernels.verify.verify` or its reference; None where the host verifies all.
        argmax: the runtime's, [M, vocab] -> long [M].
        chooser: the runtime's, for what the host verifies; None where it has none.
        drafting: what the heads draft on the device behind the verification; None for nothing.
        depth: most draft nodes that a thread can accept.
        top: the runtime's, where the likeliest tokens of all rows are kept for later drafts; None keeps nothing.

    `device` is what the runtime runs behind the pass; None for nothing. `seen` is what `read` has kept.
    """

    def __init__(
        self,
        forest: Forest,
        verify: Callable[..., Verified] | None,
        argmax: Callable[[Tensor], Tensor],
        chooser: Chooser | None,
        drafting: Drafting | None,
        depth: int,
        top: Callable[[Tensor, np.ndarray, int], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self._forest, self._argmax, self._chooser, self._top = forest, argmax, chooser, top
        self.seen: list[tuple[Request, SeenRows]] = []
        self.device: DeviceVerify | None = None
        scoring = any(segment.request.options.score_from is not None for segment in forest.verified)
        if verify is not None and not scoring and any(segment.request.sampler.on_device for segment in forest.verified):
            self.device = DeviceVerify.of(verify, forest, depth, drafting)

    @property
    def drafting(self) -> Drafting | None:
        """What the heads draft on the device, for the threads that are verified there."""
        return None if self.device is None else self.device.drafting

    def read(self, output: StepOutput) -> list[VerifyResult | None]:
        """A result for each verified segment: the one wait for the device.

        None where the request's text was scored, and where its verification has failed: `Request.error` says why.
        """
        seen = self._likeliest(output.logits)
        results: list[VerifyResult | None] = [None] * len(self._forest.verified)
        if self.device is not None and output.chosen is not None:
            results = list(self.device.read(output.chosen))
        here = [
            (place, first, segment)
            for place, (first, segment) in enumerate(zip(self._forest.first_rows, self._forest.verified, strict=True))
            if results[place] is None
        ]
        chosen = [(first, segment) for _, first, segment in here if segment.request.options.score_from is None]
        host = HostVerify(chosen, output.logits, self._argmax, self._chooser)
        likeliest = top if self._chooser is None else self._chooser.top
        for place, first, segment in here:
            if segment.request.error is not None:
                continue
            try:
                if segment.request.options.score_from is None:
                    results[place] = host(first, segment)
                else:
                    score(segment, output.logits[first : first + segment.scored], self._argmax, likeliest)
            except Exception as error:  # it ends this request alone
                segment.request.error = error
        self._check(results, output.logits)
        self.seen = [] if seen is None else _by_request(*seen)
        return results

    def _likeliest(self, logits: Tensor) -> tuple[list[Segment], Tensor, Tensor] | None:
        """Segments of requests that are guessed for, with ids and logits of their rows' likeliest tokens, before bans
        are written; on a device nobody waits for them yet."""
        own = [
            (first, segment)
            for first, segment in zip(self._forest.first_rows, self._forest.verified, strict=True)
            if segment.request.options.speculation and segment.request.options.score_from is None
        ]
        if self._top is None or not own:
            return None
        rows = np.concatenate([np.arange(first, first + 1 + len(segment.draft_tokens)) for first, segment in own])
        ids, scores = self._top(logits, rows, min(TOP_K, logits.shape[1]))
        return [segment for _, segment in own], ids, scores

    def _check(self, results: list[VerifyResult | None], logits: Tensor) -> None:
        """Fails requests for which the device found no token to choose."""
        for segment, result in zip(self._forest.verified, results, strict=True):
            if result is None:
                continue
            # The device has chosen for every drafted child, those of forks that were not accepted among them.
            begun = [child for fork, child in result.children.items() if fork in result.nodes]
            for its in (result, *begun):
                if its.tokens[-1] < 0:
                    request, sampler = segment.request, segment.request.sampler
                    path = request.path(segment.thread) + its.tokens[:-1]
                    bans = [ban for each in self._forest.verified for ban in each.request.sampler.fork_bans(each)]
                    request.error = sampler.impossible(path, logits[its.row], request, bans[its.row])
        for place, segment in enumerate(self._forest.verified):
            if segment.request.error is not None:
                results[place] = None


def _by_request(segments: list[Segment], ids: Tensor, scores: Tensor) -> list[tuple[Request, SeenRows]]:
    """The likeliest tokens [rows, k] of segments' rows, each request's with the ends of its rows' paths."""
    tokens, shares, first = ids.cpu().numpy(), shares_of(scores.cpu().numpy()), 0
    found: list[tuple[Request, SeenRows]] = []
    for request, own in groupby(segments, attrgetter("request")):
        before, last = (np.concatenate(parts) for parts in zip(*(each.last_two() for each in own), strict=True))
        rows = slice(first, first + len(last))
        found.append((request, SeenRows(before, last, tokens[rows], shares[rows])))
        first = rows.stop
    return found
