"""Draft trees as lines of text: chains of nodes that hang one below the other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from medusa_apar.events import StepFinished
from medusa_apar.events.recording import Recording
from medusa_apar.threads.paragraph_tree import ParagraphTree, Thread

from .pieces import Pieces


def chains(parents: Sequence[int], nodes: Collection[int]) -> list[tuple[int, list[int]]]:
    """The nodes, each in one chain, with the node that each chain hangs below (-1: the root), likeliest first.

    parents: of the whole draft tree. A chain goes on with the first child, other children begin chains of their own.
    """
    found: list[tuple[int, list[int]]] = []
    ends: dict[int, int] = {}  # last node of a chain -> its place in `found`
    for node in sorted(nodes):
        place = ends.pop(parents[node], None)
        if place is None:
            place = len(found)
            found.append((parents[node], []))
        found[place][1].append(node)
        ends[node] = place
    return found


def guess_text(
    pieces: Pieces, tree: ParagraphTree, thread: Thread, place: int, token_ids: list[int], known: int = 0
) -> str:
    """Tokens guessed for a place among the thread's own, but the first `known`: one line, forks and ends by name."""
    signs = dict.fromkeys(tree.eos_ids, "[end]") | {tree.fork_id: "[Fork]"}
    texts = zip(token_ids, pieces.at(thread, place, token_ids), strict=True)
    return "".join(signs.get(token) or text.replace("\n", "⏎") for token, text in list(texts)[known:])


def wrong_guesses(recording: Recording, thread: Thread) -> Iterator[tuple[int, list[int]]]:
    """Wrong drafts of the recording's latest step: before which of the thread's own tokens each stood, and its ids."""
    rejected, drafted = recording.rejected.get(thread), recording.drafted.get(thread)
    if rejected is None or drafted is None:
        return
    accepted, origins = recording.accepted.get(thread), recording.origins[thread]
    nodes = () if accepted is None else accepted.nodes
    first = next((place for place, origin in enumerate(origins) if origin.step == rejected.step), len(origins))
    places = {-1: first} | {node: first + ahead for ahead, node in enumerate(nodes, 1)}
    for above, chain in chains(drafted.parents, rejected.nodes):
        if above in places:  # not what hung below another wrong guess
            yield places[above], [drafted.token_ids[node] for node in chain]


def all_wrong_guesses(recording: Recording, row: int) -> dict[tuple[Thread, int], list[tuple[int, list[int]]]]:
    """Wrong drafts of all steps, by thread of the row and place: the step, and the likeliest of those drafts."""
    found: dict[tuple[Thread, int], list[tuple[int, list[int]]]] = {}
    again = Recording()
    for event in recording.events:
        again(event)
        if not isinstance(event, StepFinished):
            continue
        for thread, rejected in again.rejected.items():
            if recording.rows[rejected.request] != row:
                continue
            theirs = recording.trees[row].threads[thread.index]
            at_place: dict[int, list[int]] = {}
            for place, token_ids in wrong_guesses(again, thread):
                at_place.setdefault(place, token_ids)
            for place, token_ids in at_place.items():
                found.setdefault((theirs, place), []).append((event.step, token_ids))
    return found
