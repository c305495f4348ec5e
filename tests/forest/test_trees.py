"""Properties of random paragraph trees, draft trees, forests and the slots they use."""

import itertools
from dataclasses import dataclass, field
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import and_masks, causal_mask_function, sliding_window_overlay

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.drafting.step_cost import StepCost
from medusa_apar.engine.fork_manager import ForkManager
from medusa_apar.forest.device_tables import PackedForest
from medusa_apar.forest.forest import Forest, Stem
from medusa_apar.kv.path_table import PathTable
from medusa_apar.kv.pool import KVPool
from medusa_apar.kv.slot_ledger import SlotLedger
from medusa_apar.threads.fork_policy import ControlTokenForks, NoForks
from medusa_apar.threads.paragraph_tree import ParagraphTree, ReadingCursor
from medusa_apar.triton_kernels.layout import LayoutKind, Sizes, Tile
from medusa_apar.triton_kernels.reference import seen_slots
from medusa_apar.verify.verdict import Verdict

FORK, CHILD, EOS = 1, 2, 0


@dataclass
class Script:
    """A random request written step by step through the real forest and fork manager, tokens drawn by hypothesis."""

    data: st.DataObject
    ledger: SlotLedger = field(default_factory=lambda: SlotLedger(KVPool()))
    steps: int = 6
    policy: NoForks = field(default_factory=ControlTokenForks)
    fork_id: int | None = FORK

    def run(self, after_step=lambda forest, trees: None) -> list[ParagraphTree]:
        draw = self.data.draw
        lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
        trees = [ParagraphTree([9] * length, 7, {EOS}, self.fork_id, CHILD) for length in lengths]
        manager = ForkManager(self.ledger, None, self.policy)
        for _ in range(self.steps):
            requests = [stems for tree in trees if (stems := self._stems(tree))]
            if not requests:
                break
            forest = Forest(requests, self.ledger, torch.device("cpu"))
            owner = {thread: tree for tree in trees for thread in tree.threads}
            after_step(forest, trees)
            for stem in forest.verified:
                manager.commit(owner[stem.thread], stem, self._verdict(stem))
            self.ledger.check()
        return trees

    def cached_path(self, thread) -> list[int]:
        """Slots of what is cached on the path; a `[Fork]` just accepted is not."""
        booked = self.ledger._slots
        return [slot for t, stop in [*thread.ancestors(), (thread, None)] for slot in booked.get(t, [])[:stop]]

    def _stems(self, tree: ParagraphTree) -> list[Stem]:
        stems = []
        for thread in tree.depth_first():
            if thread.live:
                size = self.data.draw(st.integers(0, 6))
                draft_tree = DraftTree.likeliest(8)
                tokens = [20 + node for node in range(size)]
                stems.append(Stem(thread, len(thread.tokens), draft_tree=draft_tree, draft_tokens=tokens))
        return stems

    def _verdict(self, stem: Stem) -> Verdict:
        """Walks a random way down the draft tree, then one more token; any token may turn out to be any other."""
        nodes, node = [], -1
        parents = stem.draft_tree.parents[: len(stem.draft_tokens)].tolist()
        while (below := [n for n, p in enumerate(parents) if p == node]) and self.data.draw(st.booleans()):
            node = self.data.draw(st.sampled_from(below))
            nodes.append(node)
        tokens = []
        previous = stem.thread.tokens[-1]
        for _ in range(len(nodes) + 1):
            choice = self.data.draw(st.sampled_from([5, 6, FORK, FORK, EOS]))
            previous = 5 if choice == FORK and previous in (FORK, CHILD) else choice
            tokens.append(previous)
        return Verdict(tokens, nodes, 0)


def slow_reading_order(tree: ParagraphTree, thread=None) -> list[int]:
    """DESIGN's definition, word for word: a thread's tokens, each child's text spliced in at its `[Fork]`."""
    thread = thread or tree.trunk
    text = []
    children = {child.fork_index: child for child in thread.children}
    for index in range(thread.num_forced, len(thread.tokens)):
        token = thread.tokens[index]
        if index in children:
            text += slow_reading_order(tree, children[index])
        elif not (token == EOS and thread.parent is not None):
            text.append(token)
    return text


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_reading_order_positions_and_ends(data):
    cursors: dict[ParagraphTree, ReadingCursor] = {}
    shown: dict[ParagraphTree, list[int]] = {}

    def after_step(forest, trees):
        for tree in trees:
            cursor = cursors.setdefault(tree, ReadingCursor(tree))
            shown.setdefault(tree, []).extend(thread.tokens[index] for thread, index in cursor.advance())
            # What was shown never has to be taken back.
            assert slow_reading_order(tree)[: len(shown[tree])] == shown[tree]
            for thread, before in tree.live_in_reading_order():
                written = list(tree.reading_order())
                own = [number for number, (owner, _) in enumerate(written) if owner is thread]
                if own:
                    # Its end stands right behind its last visible token and everything spliced in before that.
                    assert before >= own[-1] + 1
                assert 0 <= before <= len(written)

    for tree in Script(data).run(after_step):
        assert [thread.tokens[index] for thread, index in tree.reading_order()] == slow_reading_order(tree)
        for thread in tree.threads[1:]:
            assert thread.start == thread.parent.start + thread.fork_index + 1
            assert len(thread.ancestor_ids()) == thread.start
            assert thread.path_ids == [
                *thread.parent.ancestor_ids(),
                *thread.parent.tokens[: thread.fork_index + 1],
                CHILD,
            ]
        total = len(slow_reading_order(tree))
        live = tree.live_in_reading_order()
        assert [before for _, before in live] == sorted(before for _, before in live)
        if live and live[-1][0] is tree.trunk:
            assert live[-1][1] == total


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
    manager = ForkManager(script.ledger, context_length=None)
    for tree in trees:
        for thread in tree.threads:
            if thread.live:
                manager.cancel(thread)
    script.ledger.check()
    assert script.ledger.pool.in_use == 0


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_eviction_frees_only_what_no_other_path_needs(data):
    script = Script(data, steps=4)
    trees = script.run()
    live = [thread for tree in trees for thread in tree.threads if thread.live]
    for victim in data.draw(st.permutations(live)):
        claiming = [thread for thread in live if script.ledger.claims(thread) and thread is not victim]
        needed = {slot for thread in claiming for slot in script.cached_path(thread)}
        before = script.ledger.pool.in_use
        freed = script.ledger.evict(victim)
        assert script.ledger.pool.in_use == before - freed
        assert needed <= set(script.ledger.pool.used.tolist())
        script.ledger.check()
    assert script.ledger.pool.in_use == 0
    for thread in live:
        script.ledger.resume(thread)
        assert sum(stop - script.ledger.cached(member) for member, stop in script.ledger.missing(thread)) == thread.end


def test_a_slot_given_back_twice_is_an_error():
    pool = KVPool(max_slots=3)
    slots = pool.allocate(np.arange(3))
    with pytest.raises(MemoryError, match="0 left"):
        pool.allocate(np.arange(1))
    pool.release(slots.tolist())
    with pytest.raises(KeyError):
        pool.release([0])
    assert pool.peak == 3 and pool.in_use == 0


ACCEPTANCE = st.lists(
    st.lists(st.floats(0.01, 0.3), min_size=1, max_size=4).map(lambda ranks: sorted(ranks, reverse=True)),
    min_size=1,
    max_size=4,
)


def chance(choice, acceptance):
    return np.prod([acceptance[head][rank] for head, rank in enumerate(choice)])


@given(ACCEPTANCE, st.integers(0, 40))
def test_likeliest_tree_is_a_tree_and_optimal(acceptance, size):
    tree = DraftTree.likeliest(size, acceptance)
    chosen = set(tree.choices)
    assert len(chosen) == len(tree)
    for node, choice in enumerate(tree.choices):
        assert tree.parents[node] == (-1 if len(choice) == 1 else tree.choices.index(choice[:-1]))
        assert tree.parents[node] < node
        ancestors = {tree.choices[n] for n in np.flatnonzero(tree.ancestors[node])}
        assert ancestors == {choice[:length] for length in range(1, len(choice) + 1)}
    assert tree.chances == pytest.approx([chance(choice, acceptance) for choice in tree.choices])
    # Nothing left out is likelier than something taken in.
    worst = min((chance(choice, acceptance) for choice in chosen), default=1.0)
    for choice in [*chosen, ()]:
        if len(choice) < len(acceptance):
            for rank in range(len(acceptance[len(choice)])):
                candidate = (*choice, rank)
                if candidate not in chosen and len(tree) == size > 0:
                    assert chance(candidate, acceptance) <= worst * (1 + 1e-9)


@given(ACCEPTANCE, st.integers(1, 12), st.floats(1, 100), st.floats(0.1, 10), st.floats(0, 2))
def test_nodes_that_pay_are_the_best_of_all_sizes(acceptance, threads, fixed, row, level):
    tree = DraftTree.likeliest(12, acceptance)
    cost = StepCost(((1, fixed), (9, fixed), (10, fixed + row)), ((1, level),))

    def rate(nodes):
        tokens = 1 + sum(chance(choice, acceptance) for choice in tree.choices[:nodes])
        return tokens / (fixed + row * max(threads * (1 + nodes) - 9, 0) + level * (nodes > 0))

    assert rate(cost.nodes(threads, tree)) == pytest.approx(max(rate(n) for n in range(len(tree) + 1)))
    assert cost.nodes(threads, DraftTree(tree.choices)) == len(tree)  # chances that nobody said


def test_more_threads_draft_less_each():
    tree, cost = DraftTree.likeliest(15), StepCost(((1, 5), (2, 6)))
    nodes = [cost.nodes(threads, tree) for threads in range(1, 20)]
    assert nodes == sorted(nodes, reverse=True) and nodes[0] > 0 == nodes[-1]


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_tree_equals_medusa_llm_buffers(widths):
    """The user's own medusa-llm as an independent oracle: ancestors, depths, and which guess a node takes."""
    utils = pytest.importorskip("medusa.model.utils")
    levels = [itertools.product(*map(range, widths[:depth])) for depth in range(1, len(widths) + 1)]
    tree = DraftTree([choice for level in levels for choice in level])
    buffers = utils.generate_medusa_buffers([1, *widths], device="cpu")
    mask = buffers["medusa_attn_mask"][0, 0].bool()
    assert mask[:, 0].all()  # everyone sees the root
    assert mask[1:, 1:].tolist() == tree.ancestors.tolist()
    assert list(buffers["medusa_position_ids"])[1:] == (tree.depths + 1).tolist()
    first_of_head = 1 + np.concatenate([[0], np.cumsum(widths)[:-1]])
    assert list(buffers["tree_indices"])[1:] == (first_of_head[tree.depths] + tree.ranks).tolist()


@pytest.mark.parametrize("choices", [[()], [(0, 0)], [(0,), (0,)], [(-1,)]])
def test_malformed_trees(choices):
    with pytest.raises(ValueError, match="(?i)draft tree"):
        DraftTree(choices)
