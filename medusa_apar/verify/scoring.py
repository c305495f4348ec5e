"""Scores of a given text: what plain decoding, which forks nowhere, says of its tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from medusa_apar.forest.forest import Segment
from medusa_apar.triton_kernels.reference import likeliest

from .host_verify import greedy
from .logprobs import RowLogprobs, TopOfRows
from .sampler import Sampler


def score(segment: Segment, logits: Tensor, argmax: Callable[[Tensor], Tensor], top: TopOfRows) -> None:
    """Appends to the request's `text_scores` what `logits` [segment.scored, vocab] say of the tokens behind each row.

    Log-probabilities are the model's own, before processors, without the control tokens, which one thread never writes;
    those that are told are with them.

    top: the runtime's, or `logprobs.top`.
    """
    request = segment.request
    sampler: Sampler = request.sampler
    tokens, scores = segment.thread.tokens, request.text_scores
    first = segment.cached + len(segment.extend_tokens) - segment.scored + 1  # of the tokens that are scored
    actual = tokens[first : first + segment.scored]
    if (count := sampler.options.logprobs) is not None:  # before bans are written
        told = RowLogprobs(logits, range(len(actual)), count, top)
        scores.told += [told(row, token, count) for row, token in enumerate(actual)]
    logits, banned = logits.float(), sampler.banned(True)
    if sampler.seed is None and sampler.options.processors:
        padding = len(request.row.ids) - len(request.prompt_ids)
        for row, token in enumerate(actual):
            path = request.row.ids[: padding + first + row]
            chosen = likeliest(sampler.processed(path, logits[row].clone(), request, banned))
            scores.chosen.append(chosen == token)
    logits[:, banned] = -torch.inf
    ids = torch.tensor(actual, dtype=torch.long, device=logits.device)
    scores.logprobs += (logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(dim=-1)).tolist()
    if sampler.seed is None and not sampler.options.processors:
        scores.chosen += [mine == token for mine, token in zip(greedy(logits, argmax), actual, strict=True)]
