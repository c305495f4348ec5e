"""What one request of vLLM is asked for: a part of a thread."""

from __future__ import annotations

from dataclasses import dataclass, replace

from medusa_apar.threads.fork_policy import fork_point
from medusa_apar.threads.paragraph_tree import Thread, thread_key
from medusa_apar.threads.request import Request

from .sampling import VllmSampling, min_tokens_of, tokens_left


@dataclass(frozen=True, slots=True)
class Part:
    """Args:
    prompt_ids: the thread's path.
    sampling: as of the thread's request; `seed` is this part's own.
    max_tokens, min_tokens: of this part. stop_ids: tokens that end it, the last of its own.
    banned: sequences that are not written; a prompt's tokens do not count as the beginning of one.
    cache_salt: only requests of the same share blocks.
    prompt_logprobs: how many of the likeliest tokens are told at each of the prompt's; None for no log-probabilities.
    """

    prompt_ids: list[int]
    sampling: VllmSampling
    max_tokens: int
    min_tokens: int = 0
    stop_ids: frozenset[int] = frozenset()
    banned: tuple[tuple[int, ...], ...] = ()
    cache_salt: str = ""
    prompt_logprobs: int | None = None


def part_of(request: Request, thread: Thread, sampling: VllmSampling, room: int, banned: frozenset[int]) -> Part:
    """The next part of a thread.

    room: tokens that its path may grow by. banned: what may not come next, and only next; the part is one token long
    then.
    """
    options = request.options
    seed = None if options.seed is None else thread_key(options.seed, thread.key, len(thread.tokens)) >> 1
    stop_ids = request.end_ids(thread) | options.stop_ids
    return Part(
        prompt_ids=[*thread.ancestor_ids(), *thread.tokens],
        sampling=replace(sampling, seed=seed),
        max_tokens=1 if banned else room,
        min_tokens=0 if banned else min(_min_tokens(request, thread, stop_ids), room),
        stop_ids=stop_ids,
        banned=(*_fork_bans(request, thread), *((token,) for token in sorted(banned))),
        cache_salt=options.cache_salt,
    )


def forbids(request: Request, thread: Thread, token: int) -> frozenset[int]:
    """What may not come next where `token` would; empty where it may.

    vLLM's bans say most of it. They do not see the prompt, so that the first token of a part may be a `[Fork]` where
    the rule has none; they know neither `fork_if` nor which part of a path counts for `min_tokens`.
    """
    options, rule = request.options, request.options.rule
    if rule is not None and token in (banned := rule.banned(thread.tokens[-1], thread.depth)):
        return frozenset(banned)
    if rule is not None and token == rule.fork_id and options.fork_if is not None:
        return frozenset() if options.fork_if(fork_point(thread)) else frozenset((token,))
    for each in min_tokens_of(options.processors):
        if token in each.end_ids and each.held(request.path(thread))[0]:
            return frozenset(each.end_ids)
    return frozenset()


def _min_tokens(request: Request, thread: Thread, stop_ids: frozenset[int]) -> int:
    """How many tokens come before any of `stop_ids` may: vLLM knows no difference among them.

    It would hold the model's end tokens back too, whatever `ignore_eos` says: with it they are tokens like others, as
    long as they are no stop tokens.
    """
    holding = min_tokens_of(request.options.processors)
    if not holding:
        return 0
    path, together = request.path(thread), stop_ids | request.options.eos_ids
    left = {each: tokens_left(each, path) for each in holding if each.held(path)[0]}
    each_left = (max((n for its, n in left.items() if token in its.end_ids), default=0) for token in together)
    return min(each_left, default=0)


def _fork_bans(request: Request, thread: Thread) -> tuple[tuple[int, ...], ...]:
    """The fork rule as far as sequences can say it."""
    rule = request.options.rule
    if rule is None:
        return ()
    return ((rule.child_id,), (rule.fork_id, rule.fork_id) if rule.may_fork(thread.depth) else (rule.fork_id,))
