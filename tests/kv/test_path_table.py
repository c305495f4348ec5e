"""The table of paths on the device: what it says is what the ledger has booked, through any history."""

import heapq
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_apar.forest.device_tables import PackedForest
from medusa_apar.forest.forest import Segment
from medusa_apar.kv.path_table import PathTable
from medusa_apar.kv.pool import KVPool
from medusa_apar.kv.slot_ledger import SlotLedger
from medusa_apar.triton_kernels.layout import Sizes
from tests.support.random_requests import Evicting, Script


def on_device(forest, draw) -> torch.Tensor:
    """The table after a step ran, over buffers of its own or those of a graph; in these, several forks do not fit."""
    sizes = Sizes.of(forest.leaves)
    reusable = draw(st.booleans())
    commits = sizes.queries if reusable else len(forest.changes.entries)
    packed = PackedForest(sizes.rounded() if reusable else sizes, torch.device("cpu"), reusable, commits)
    packed.load(forest)
    packed.pack()
    return forest.table


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([1, 2, 3, 8]), st.integers(0, 3), st.booleans())
def test_it_has_every_live_path_through_any_history(data, chunk, unasked, prefix_cache):
    """unasked: steps before anybody wants the table, as with another backend."""
    with patch.object(PathTable, "chunk", chunk), patch("medusa_apar.kv.path_table._FIRST_CHUNKS", 2):
        script = Evicting(data, SlotLedger(KVPool(), prefix_cache), steps=7)
        steps = 0

        def after_step(forest, trees):
            nonlocal steps
            steps += 1
            if steps <= unasked:
                return
            device, table = on_device(forest, data.draw), script.ledger.table
            for segment in forest.segments:
                path = device[list(table.chunk_ids(segment.thread))].flatten().tolist()
                expected = [*script.cached_path(segment.thread), *segment.drafted_slots.tolist()]
                assert path[: len(expected)] == expected == [*segment.path_slots, *segment.slots]
            for thread, path in table._paths.items():  # those that wait, too
                columns = thread.start + path.written
                said = device[list(path.chunk_ids)].flatten()[:columns].tolist()
                assert said == script.cached_path(thread)[:columns]

        trees = script.run(after_step)
        for thread in [thread for tree in trees for thread in tree.threads if thread.live]:
            thread.finish_reason = "cancelled"
            script.ledger.free_unneeded(thread)
            script.ledger.check()
        table = script.ledger.table
        assert not table._paths and sorted(table._free) == list(range(len(table.slots)))


def placed(data) -> Script:
    script = Script(data, steps=3)
    trees = script.run(lambda forest, trees: forest.changes)
    for tree in trees:  # somebody must be left
        for thread in tree.threads:
            if thread.live and script.ledger.cached(thread):
                return script
    return placed(data)


@settings(max_examples=20, deadline=None)
@given(st.data(), st.sampled_from(["lost", "returned", "moved"]))
def test_a_chunk_that_is_lost_or_given_twice_is_found(data, harm):
    with patch.object(PathTable, "chunk", 2):
        script = placed(data)
        table = script.ledger.table
        script.ledger.check()
        thread = data.draw(st.sampled_from([thread for thread, path in table._paths.items() if path.written]))
        path = table._paths[thread]
        if harm == "lost":
            del table._paths[thread]
        elif harm == "returned":
            heapq.heappush(table._free, path.chunk_ids[-1])
        else:
            table.slots[path.chunk_ids[0], 0] += 1
        with pytest.raises(AssertionError):
            script.ledger.check()


def test_chunks_that_are_complete_before_a_fork_are_shared_and_the_others_copied():
    """Two children forked at different tokens of the third chunk, and one at a chunk's very edge."""
    from medusa_apar.forest.forest import Forest
    from medusa_apar.threads.paragraph_tree import ParagraphTree

    with patch.object(PathTable, "chunk", 4):
        ledger = SlotLedger(KVPool())
        tree = ParagraphTree([9] * 6 + [1, 1, 9, 1], 7, {0}, 1, 2)
        children = [tree.fork(tree.trunk, place, place) for place in (6, 7, 9)]
        threads = [tree.trunk, *children]
        forest = Forest([[Segment(thread, len(thread.tokens)) for thread in threads]], ledger, torch.device("cpu"))
        first = len(forest.changes.entries)
        paths = [list(ledger.table.chunk_ids(thread)) for thread in threads]
        assert [len(path) for path in paths] == [3, 2, 3, 3]
        assert len({path[0] for path in paths}) == 1
        assert paths[2][1] == paths[0][1] == paths[3][1] != paths[1][1]
        assert len({paths[0][2], paths[2][2], paths[3][2]}) == 3
        assert first == 10 + 3 + 3 + 0 + 2  # the trunk, three children's tokens, and two copies
        # From then on a step says what is new.
        for thread in threads:
            thread.tokens.append(9)
        forest = Forest([[Segment(thread, len(thread.tokens)) for thread in threads]], ledger, torch.device("cpu"))
        assert len(forest.changes.entries) == 4
