"""Segments without an engine, each of a request that says how tokens are chosen, and their verification on the host."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate

import numpy as np
import torch

from medusa_apar.drafting.draft_tree import DraftTree, TreeShape
from medusa_apar.forest.forest import Segment
from medusa_apar.threads.paragraph_tree import Thread
from medusa_apar.threads.request import Request, RequestOptions
from medusa_apar.verify.host_verify import HostVerify
from medusa_apar.verify.recipe import Chooser
from medusa_apar.verify.sampler import Sampler
from medusa_apar.verify.verify_result import VerifyResult
from tests.support.models import CHILD, FORK

NO_DRAFTS = DraftTree([])


def request_of(prompt_ids: list[int], key: int | None = None, **options) -> Request:
    """A request as its engine has it: with a sampler."""
    request = Request("0", prompt_ids, RequestOptions(**options), key)
    request.sampler = Sampler(request.options)
    return request


def segment_of(
    request: Request,
    thread: Thread | None = None,
    draft_tree: TreeShape = NO_DRAFTS,
    draft_tokens: Sequence[int] = (),
    **fields,
) -> Segment:
    """A thread's last token and the draft tree below it; by default the trunk's. Everything before is cached."""
    thread = request.tree.trunk if thread is None else thread
    segment = Segment(
        thread, len(thread.tokens), draft_tree=draft_tree, draft_tokens=list(draft_tokens), request=request
    )
    segment.extend_tokens = thread.tokens[-1:]
    for name, value in fields.items():
        setattr(segment, name, value)
    return segment


def drafted_forks(tree: TreeShape, tokens: list[int]) -> tuple[TreeShape, list[int], dict[int, int]]:
    """The tree with a `[Child]` below each `[Fork]`, as candidates have it."""
    forks = [node for node, token in enumerate(tokens) if token == FORK]
    nodes = {fork: len(tokens) + place for place, fork in enumerate(forks)}
    return TreeShape(np.append(tree.parents, forks).astype(np.int64)), [*tokens, *[CHILD] * len(forks)], nodes


def first_rows(segments: Sequence[Segment]) -> list[int]:
    """Each one's first row among all that are verified."""
    return [0, *accumulate(segment.scored + len(segment.draft_tokens) for segment in segments)][:-1]


def verified_on_host(
    segments: Sequence[Segment], logits: torch.Tensor, chooser: Chooser | None = None
) -> list[VerifyResult]:
    """logits [M, vocab], of all the segments' rows; they stay as they are."""
    places = list(zip(first_rows(segments), segments, strict=True))
    verify = HostVerify(places, logits.clone(), partial(torch.argmax, dim=-1), chooser)
    return [verify(first, segment) for first, segment in places]
