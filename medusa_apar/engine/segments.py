"""A planned step's threads as segments of a forest."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from medusa_apar.drafting.candidates import Proposal
from medusa_apar.drafting.draft_tree import TreeShape
from medusa_apar.forest.forest import Segment
from medusa_apar.kv.slot_ledger import SlotLedger
from medusa_apar.threads.paragraph_tree import Thread
from medusa_apar.threads.request import Request

from .plan import Plan

Drafted = Mapping[Thread, tuple[Proposal, np.ndarray]]  # of each thread that drafts: candidates, and which it checks


def segments(request: Request, plan: Plan, drafted: Drafted, ledger: SlotLedger) -> list[Segment]:
    """What the request runs, ancestors first."""
    members = plan.requests[request]
    if len(members) > 1:
        fed = set(members)
        members = [thread for thread in request.tree.depth_first() if thread in fed]
    return [
        _verified(request, thread, *drafted.get(thread, (None, None)))
        if thread in plan.chosen
        else _fed(request, thread, plan.feed[thread], ledger.cached(thread))
        for thread in members
    ]


def _fed(request: Request, thread: Thread, stop: int, cached: int) -> Segment:
    """A segment that is not verified, or whose rows score a given text."""
    first = request.options.score_from
    if first is not None:  # a preempted one goes on behind what is scored
        first += len(request.text_scores.logprobs)
    scored = 0 if first is None else stop - max(cached, first - 1)
    if scored > 0:
        return Segment(thread, stop, scored=scored, request=request)
    return Segment(thread, stop, verified=False, request=request)


def _verified(request: Request, thread: Thread, proposal: Proposal | None, kept: np.ndarray | None) -> Segment:
    if proposal is None or kept is None:
        return Segment(thread, len(thread.tokens), request=request)
    places = np.full(len(proposal.tokens) + 1, -1)  # the last entry is the root's
    places[kept] = np.arange(len(kept))
    return Segment(
        thread,
        len(thread.tokens),
        draft_tree=TreeShape.of(places[proposal.parents[kept]]),
        draft_tokens=proposal.tokens[kept].tolist(),
        forks={int(places[f]): int(places[c]) for f, c in proposal.forks.items() if places[c] >= 0},
        proposal=proposal,
        kept=kept,
        request=request,
    )
