"""What requests may take from the prefix cache, and when one waits for what another is about to leave there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from medusa_apar.kv.slot_ledger import SlotLedger
from medusa_apar.threads.paragraph_tree import Thread
from medusa_apar.threads.request import Request, Status

_WORTH_A_STEP = 16  # tokens that need not be fed twice


def most_tokens(request: Request, thread: Thread) -> int:
    """How many of a thread's own tokens may come from the cache: rows of what is asked for have to run."""
    first = request.options.score_from
    if first is None:
        return len(thread.tokens) - 1
    return first + len(request.text_scores.logprobs) - 1  # the row before a token scores it


def num_shared(request: Request, ledger: SlotLedger) -> int:
    """Slots that a request which waits will share with live threads, so that it needs them no more."""
    trunk = request.tree.trunk
    found = ledger.found(trunk, most_tokens(request, trunk))
    return sum(len(slots) for _, slots in found) - ledger.num_idle(found)


def is_being_fed(
    request: Request, have: int, fed: Mapping[Thread, int], others: Iterable[Request], ledger: SlotLedger
) -> bool:
    """Whether a step feeds for another request what this one's prompt goes on with, so that the next finds it.

    have: how many of its tokens it has. fed: of each thread of the step, how many of its tokens in all.
    """
    trunk = request.tree.trunk
    salt, until = ledger.salt(trunk), have + _WORTH_A_STEP
    if salt is None or request.status is not Status.PREFILLING or until > most_tokens(request, trunk):
        return False
    return any(
        other.status is Status.PREFILLING
        and fed.get(other.tree.trunk, 0) >= until
        and ledger.salt(other.tree.trunk) == salt
        and other.tree.trunk.tokens[:until] == trunk.tokens[:until]
        for other in others
    )
