"""Random forests: masks and the kernels' tables show every row its path and nothing else."""

from unittest.mock import patch

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import and_masks, causal_mask_function, sliding_window_overlay

from medusa_apar.forest.device_tables import PackedForest
from medusa_apar.kv.path_table import PathTable
from medusa_apar.triton_kernels.layout import LayoutKind, Sizes, Tile
from medusa_apar.triton_kernels.reference import seen_slots
from tests.support.random_requests import Script


def seen_by_row(forest, window, draw) -> dict[int, list[int]]:
    """What the tables of the attention kernels say, whatever the chunks and however large the buffers."""
    kind = LayoutKind(window, Tile(16, 1, 1, 1), draw(st.integers(1, 16)), draw(st.booleans()))
    layout = forest.layout(kind)
    sizes = Sizes.of(forest.leaves).rounded()
    roomy = PackedForest(sizes, torch.device("cpu"), roomy=True, commits=sizes.queries)
    roomy.become(forest)
    roomy.pack()
    assert roomy.rows[0, : len(forest)].equal(forest.input_ids[0]) and roomy.rows[2, : len(forest)].equal(forest.slots)
    assert (roomy.rows[2, len(forest) :] == -1).all()
    padded = roomy.layout(kind, forest)
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
        for stem in forest.verified:
            group = next(i for i, g in enumerate(forest.groups) if g.rows.start <= stem.row < g.rows.stop)
            rows = forest.groups[group].rows
            columns = forest.groups[group].columns
            slots = torch.arange(columns.start, columns.stop) if isinstance(columns, slice) else columns
            lineage = script.ledger.path_slots(stem.thread).tolist()
            assert len(lineage) == len(set(lineage)) == stem.thread.end
            for offset in range(stem.size):
                node = offset - len(stem.pending)
                if node < 0:
                    path = lineage[: stem.thread.end - len(stem.pending) + offset + 1]
                else:
                    above = np.flatnonzero(stem.draft_tree.ancestors[node]).tolist()
                    path = lineage + [int(stem.slots[len(stem.pending) + n]) for n in above]
                row = stem.row + offset - rows.start
                seen = slots[full.masks[group][row]].tolist()
                assert sorted(seen) == sorted(path)
                listed = [slot for start, length in runs[stem.row + offset] for slot in lists[start : start + length]]
                assert listed == path
                assert of_kernels[None][stem.row + offset] == path
                assert of_kernels[window][stem.row + offset] == path[-window:]
                # Position ids count along the path; a window takes its last tokens by position, wherever they lie.
                assert forest.position_ids[0, stem.row + offset] == len(path) - 1
                assert sorted(slots[sliding.masks[group][row]].tolist()) == sorted(path[-window:])

    trees = script.run(after_step)
    for thread in [thread for tree in trees for thread in tree.threads if thread.live]:
        thread.finish_reason = "cancelled"
        script.ledger.settle(thread)
    script.ledger.check()
    assert script.ledger.pool.in_use == 0
