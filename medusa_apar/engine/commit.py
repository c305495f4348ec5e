"""What a verified segment does to threads and slots: the fork manager's half and the slot ledger's."""

from __future__ import annotations

from dataclasses import dataclass, field

from medusa_apar.forest.forest import Segment
from medusa_apar.kv.slot_ledger import SlotLedger
from medusa_apar.threads.fork_manager import ForkManager
from medusa_apar.threads.paragraph_tree import Thread
from medusa_apar.verify.verify_result import VerifyResult


@dataclass(slots=True)
class Commit:
    """What became of a segment.

    gained: tokens that its thread was given. nodes: its accepted draft nodes, in order. forks: children that were
    spawned. begun: those of them whose `[Child]` had been drafted, each with what it chose.
    """

    gained: int = 0
    nodes: list[int] = field(default_factory=list)
    forks: int = 0
    begun: list[tuple[Thread, VerifyResult]] = field(default_factory=list)


def commit(segment: Segment, result: VerifyResult, manager: ForkManager, ledger: SlotLedger) -> Commit:
    """Appends the verified tokens to the segment's thread, books accepted draft nodes and frees rejected ones.

    Raises what the request's fork policy raises; all draft nodes are free then.
    """
    request, thread, drafted = segment.request, segment.thread, segment.drafted_slots.tolist()
    made = Commit()
    try:
        outcome = manager.advance(request, thread, result.tokens)
        made.gained, made.nodes, made.forks = outcome.gained, result.nodes[: outcome.gained], len(outcome.children)
        accepted = [(thread, [drafted[node] for node in made.nodes])]
        for place, child in outcome.children:
            fork = made.nodes[place] if place < len(made.nodes) else None
            if child.live and fork in segment.forks:
                first = result.children[fork]
                accepted.append((child, [drafted[segment.forks[fork]]]))
                outcome.ended += manager.advance(request, child, first.tokens).ended
                made.begun.append((child, first))
    except Exception:
        ledger.commit(drafted, [], [])
        raise
    ledger.commit(drafted, accepted, outcome.ended)
    return made
