"""What a step brings one request: its output, and scores of its tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from medusa_apar.events import Event
from medusa_apar.threads.paragraph_tree import Thread
from medusa_apar.threads.request import Request, TokenLogprobs
from medusa_apar.verify.verify_result import VerifyResult


@dataclass(slots=True)
class RequestOutput:
    """What a step has brought one request.

    token_ids: its new readable tokens.
    finish_reason: "stop", "length", "aborted" or "error" once it has ended.
    error: what it failed by.
    events: what happened, where the options ask for it.
    logprobs: of each of the tokens, where the options ask for them.
    cached_tokens: how many of its prompt's tokens came from the prefix cache.
    queued: seconds for which it had waited when its first step began.
    prompt_logprobs: with the last one, of the prompt's tokens from `score_from` on, where the options ask for both.
    """

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    events: list[Event] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    cached_tokens: int = 0
    queued: float | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)


def next_output(request: Request) -> RequestOutput | None:
    """What is new since the last one; None where nothing is."""
    start, request.sent = request.sent, len(request.text_ids)
    new = request.text_ids[start:]
    told = [] if request.options.logprobs is None else request.text[start:]
    logprobs = [request.logprobs[thread][index - thread.num_forced] for thread, index in told]
    events = request.watcher.take() if request.options.events else []
    if not (new or events or request.status.ended):
        return None
    reason, its = request.finish_reason if request.status.ended else None, request.stats
    output = RequestOutput(request.id, new, reason, request.error, events, logprobs, its.cached_tokens, its.queued)
    output.prompt_logprobs = request.text_scores.told if reason else []
    return output


def keep_scores(request: Request, thread: Thread, result: VerifyResult, gained: int) -> None:
    """Keeps scores of a thread's new tokens; those of forced ones say that nothing else was possible."""
    for kept, new in ((request.scores, result.scores), (request.logits, result.logits)):
        if new:
            own = kept.setdefault(thread, [])
            own += new[:gained]
            own += [_forced(token, own[-1]) for token in thread.token_ids[len(own) :]]
    if result.logprobs:
        told = request.logprobs.setdefault(thread, [])
        told += result.logprobs[:gained]
        told += [TokenLogprobs(0.0)] * (len(thread.token_ids) - len(told))


def _forced(token: int, like: torch.Tensor) -> torch.Tensor:
    """Scores of an inserted token, as transformers writes those of forced ones: nothing else was possible."""
    scores = torch.full_like(like, -torch.inf)
    scores[token] = 0
    return scores
