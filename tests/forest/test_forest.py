"""Random forests: masks and the kernels' tables show every row its path and nothing else."""

from unittest.mock import patch

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import and_masks, causal_mask_function, sliding_window_overlay

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.forest.device_tables import PackedForest
from medusa_apar.forest.forest import Forest, Segment
from medusa_apar.kv.path_table import PathTable
from medusa_apar.kv.pool import KVPool
from medusa_apar.kv.slot_ledger import SlotLedger
from medusa_apar.threads.paragraph_tree import ParagraphTree
from medusa_apar.triton_kernels.layout import LayoutKind, Sizes, Tile
from medusa_apar.triton_kernels.reference import seen_slots
from tests.support.random_requests import CHILD, EOS, FORK, Script


def seen_by_row(forest, window, draw) -> dict[int, list[int]]:
    """What the tables of the attention kernels say, whatever the chunks and however large the buffers."""
    kind = LayoutKind(window, Tile(16, 1, 1, 1), draw(st.integers(1, 16)), draw(st.booleans()))
    layout = forest.layout(kind)
    sizes = Sizes.of(forest.leaves).rounded()
    reusable = PackedForest(sizes, torch.device("cpu"), reusable=True, commits=sizes.queries)
    reusable.load(forest)
    reusable.pack()
    assert reusable.rows[0, : len(forest)].equal(forest.input_ids[0]) and reusable.rows[2, : len(forest)].equal(
        forest.slots
    )
    assert (reusable.rows[2, len(forest) :] == -1).all()
    padded = reusable.layout(kind, forest)
    seen = seen_slots(padded, window)
    assert seen[: len(forest)] == seen_slots(layout, window)
    assert not any(seen[len(forest) :])  # padding sees nothing
    return dict(zip(layout.order.tolist(), seen, strict=False))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_masks_show_exactly_the_path_and_slots_are_accounted(data):
    with patch.object(PathTable, "chunk", data.draw(st.sampled_from([1, 2, 4, 64]))):
        _show_exactly_the_path(data)


def _show_exactly_the_path(data):
    script = Script(data)

    def after_step(forest, trees):
        window = data.draw(st.integers(1, 6))
        full = forest.mask(causal_mask_function)
        sliding = forest.mask(and_masks(causal_mask_function, sliding_window_overlay(window)))
        lists, runs, longest = forest.paths()
        assert longest == int(runs[..., 1].sum(1).max())
        of_kernels = {seen: seen_by_row(forest, seen, data.draw) for seen in (None, window)}
        for segment in forest.verified:
            group = next(i for i, g in enumerate(forest.groups) if g.rows.start <= segment.row < g.rows.stop)
            rows = forest.groups[group].rows
            columns = forest.groups[group].columns
            slots = torch.arange(columns.start, columns.stop) if isinstance(columns, slice) else columns
            lineage = script.ledger.path_slots(segment.thread).tolist()
            assert len(lineage) == len(set(lineage)) == segment.thread.end
            for offset in range(segment.size):
                node = offset - len(segment.extend_tokens)
                if node < 0:
                    path = lineage[: segment.thread.end - len(segment.extend_tokens) + offset + 1]
                else:
                    above = np.flatnonzero(segment.draft_tree.ancestors[node]).tolist()
                    path = lineage + [int(segment.slots[len(segment.extend_tokens) + n]) for n in above]
                row = segment.row + offset - rows.start
                seen = slots[full.masks[group][row]].tolist()
                assert sorted(seen) == sorted(path)
                listed = [
                    slot for start, length in runs[segment.row + offset] for slot in lists[start : start + length]
                ]
                assert listed == path
                assert of_kernels[None][segment.row + offset] == path
                assert of_kernels[window][segment.row + offset] == path[-window:]
                # Position ids count along the path; a window takes its last tokens by position, wherever they lie.
                assert forest.position_ids[0, segment.row + offset] == len(path) - 1
                assert sorted(slots[sliding.masks[group][row]].tolist()) == sorted(path[-window:])

    trees = script.run(after_step)
    for thread in [thread for tree in trees for thread in tree.threads if thread.live]:
        thread.finish_reason = "cancelled"
        script.ledger.free_unneeded(thread)
    script.ledger.check()
    assert script.ledger.pool.in_use == 0


def test_requests_that_decode_side_by_side_are_views_of_the_pool():
    """Each has two threads, whose drafts are partly accepted: nobody's slots have to be gathered."""
    trees = [ParagraphTree([9] * (4 + row), row, {EOS}, FORK, CHILD) for row in range(6)]
    ledger, tree = SlotLedger(KVPool(max_slots=1024)), DraftTree.likeliest(8)
    for step in range(30):
        segments = [
            [Segment(thread, len(thread.tokens), draft_tree=tree, draft_tokens=[9] * 3) for thread in each.threads]
            for each in trees
        ]
        forest = Forest(segments, ledger, torch.device("cpu"))
        assert all(isinstance(group.columns, slice) for group in forest.groups)
        for segment in forest.segments:
            accepted, *rejected = segment.drafted_slots.tolist()
            ledger.commit([accepted, *rejected], [(segment.thread, [accepted])], [])
            segment.thread.tokens += [9, 9]
        ledger.check()
        if step == 5:
            for each in trees:
                each.trunk.tokens[-1] = FORK
                each.fork(each.trunk, len(each.trunk.tokens) - 1, 0)
    assert forest.segments[-1].cached > 60
