"""Drafts of a compiled EAGLE-3 drafter are those of its network in torch."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import medusa_apar
from medusa_apar import DraftTree
from medusa_apar.drafting.drafter import NewRows, Written
from medusa_apar.heads import Eagle3Heads
from medusa_apar.heads.eagle3 import drafter as drafter_module
from medusa_apar.kv.pool import KVPool
from tests.support.eagle3_files import LAYOUTS, checkpoint
from tests.support.models import CONTROL, VOCAB, forking_model, tiny_model
from tests.support.oracles import assert_threads_are_plain
from tests.support.prompts import prompts

NAMES = ["its authors'", "with an embedding of its own", "two layers", "Qwen3's norms", "scaled rope"]
NAMES += ["biases", "whole vocabulary", "norm before the residual", "five states"]
CHOICES = [(0,), (0, 0), (1,), (0, 1), (0, 0, 0), (2,), (1, 0), (0, 0, 1), (0, 0, 0, 0), (1, 0, 2), (1, 0, 2, 0)]
SLOTS, LAYERS = 160, 2  # the tiny models have two layers
SHAPES = [(4, 2, 32), (3, 3, 64), (6, 1, 32), (8, 2, 128), (12, 3, 32)]  # heads, key/value heads, dimensions of each


def heads_of(name, model, seed=3, shape=SHAPES[0]):
    layout = LAYOUTS[name]
    target = layout.target and model.config.hidden_size
    layout = replace(layout, ids=tuple(2 - place % 2 for place in range(layout.states)), where_ids="top", target=target)
    sizes = {"hidden": model.config.hidden_size, "vocab": VOCAB, "feed": 48}
    sizes |= dict(zip(("heads", "kv_heads", "head_dim"), shape, strict=True))
    return Eagle3Heads.from_state(*checkpoint(layout, seed, **sizes), model)


def written_of(heads, lengths, seed):
    """Threads that have written so much, whose keys, values and features are random; their slots lie anywhere."""
    generator = torch.Generator().manual_seed(seed)
    pool = KVPool(SLOTS)
    pool.storage.first_draft_layer = LAYERS
    for layer in range(LAYERS, LAYERS + heads.num_layers):
        for store in (pool.keys, pool.values):
            config = heads.network.config
            store[layer] = torch.randn(SLOTS, config.num_key_value_heads, config.head_dim, generator=generator)
    pool.slots = torch.arange(SLOTS)
    pool.keep_features(torch.randn(SLOTS, heads.network.hidden_size, generator=generator))
    paths = [torch.randperm(SLOTS, generator=generator)[:length].numpy() for length in lengths]
    return Written(pool, paths)


def both(heads, packing="float32"):
    drafters = heads.drafter(), heads.drafter(packing)
    assert [drafter._compiled is not None for drafter in drafters] == [False, True]
    return drafters


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.sampled_from(SHAPES),
    st.integers(1, len(CHOICES)),
    st.lists(st.tuples(st.integers(0, VOCAB - 1), st.integers(1, 150)), min_size=1, max_size=5),
    st.sampled_from([1, 2, 3]),
    st.integers(0, 99),
)
def test_compiled_drafts_are_those_of_torch(name, shape, nodes, roots, threads, seed):
    heads, tree = heads_of(name, tiny_model("wide_llama", seed=2), shape=shape), DraftTree(CHOICES[:nodes])
    ids, lengths = zip(*roots, strict=True)
    written, roots = written_of(heads, lengths, seed), torch.tensor(ids)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        (ids, log_probs), (compiled_ids, compiled) = (
            drafter.propose_behind(written, roots, tree) for drafter in both(heads)
        )
    finally:
        torch.set_num_threads(before)
    assert torch.equal(compiled_ids, ids)
    torch.testing.assert_close(compiled, log_probs, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, len(CHOICES)), st.integers(1, 4), st.floats(0.0005, 0.9), st.booleans())
def test_below_what_is_too_unlikely_nothing_is_looked_for(nodes, threads, least, compiled):
    heads, tree = heads_of("its authors'", tiny_model("wide_llama", seed=2)), DraftTree(CHOICES[:nodes])
    written, roots = written_of(heads, [20] * threads, nodes), torch.arange(threads)
    drafter = both(heads)[compiled]
    ids, log_probs = drafter.propose_behind(written, roots, tree)
    pruned_ids, pruned = drafter.propose_behind(written, roots, tree, least)
    reach = torch.zeros(threads, len(tree))
    for node, parent in enumerate(tree.parents.tolist()):
        above = reach[:, parent] if parent >= 0 else torch.zeros(threads)
        reach[:, node] = above + log_probs[:, node]
        wanted = above.exp() >= least if parent >= 0 else torch.ones(threads, dtype=torch.bool)
        looked = wanted if compiled else (pruned_ids[:, node] >= 0)  # torch looks where any of the threads wants it
        assert (looked | ~wanted).all() and bool(wanted.any()) == bool(looked.any())
        assert torch.equal(pruned_ids[looked, node], ids[looked, node])
        torch.testing.assert_close(pruned[looked, node], log_probs[looked, node])
        assert (pruned_ids[~looked, node] == -1).all() and (pruned[~looked, node] == -torch.inf).all()


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_in_low_precision_they_are_those_of_the_same_products_in_torch(kind):
    heads, tree = heads_of("its authors'", tiny_model("wide_llama", seed=2)), DraftTree(CHOICES[:9])
    written, roots = written_of(heads, [9, 30, 1, 77], 0), torch.tensor([5, 9, 30, 2])
    with patch.object(drafter_module, "compilable", lambda *_: False):
        level_by_level = drafter_module.Eagle3Drafter(heads, kind)
    ids, log_probs = level_by_level.propose_behind(written, roots, tree)
    compiled_ids, compiled = both(heads, kind)[1].propose_behind(written, roots, tree)
    assert torch.equal(compiled_ids, ids)
    torch.testing.assert_close(compiled, log_probs, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"quantize": "int8"}])
def test_texts_never_show_who_drafts(name, options):
    options = dict(options)
    model = forking_model(5, "wide_llama").to(options.pop("dtype", torch.float32))
    shared = {"runtime": "cpu"} | options
    plain = medusa_apar.attach(model, None, CONTROL, speculation="off", **shared)
    heads = heads_of(name, model)
    apar = medusa_apar.attach(model, heads, CONTROL, budget=40, **shared)
    arguments = prompts(2, 6, seed=2, ragged=True) | {"do_sample": False, "max_new_tokens": 40}
    expected = plain.generate(**arguments, return_dict_in_generate=True)
    out = apar.generate(**arguments, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected.sequences)
    assert out.stats.drafted["heads"] > 0 and out.stats.final_slots == 0
    assert apar.runtime.drafter(heads)._compiled is not None
    if not options and model.dtype == torch.float32:
        assert_threads_are_plain(model, out.paragraph_tree)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([*NAMES, "under eagle_config", "a norm for each state"]), st.integers(1, 40), st.integers(0, 99))
def test_what_a_step_keeps_for_drafts_is_what_torch_keeps(name, count, seed):
    model = tiny_model("wide_llama", seed=2)
    layout, heads = LAYOUTS[name], heads_of(name, model)
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(count, heads.network.num_states * heads.network.input_size, generator=generator)
    slots = torch.randperm(SLOTS, generator=generator)[:count]
    parents = torch.tensor([-1, *slots[:-1].tolist()])  # one path, whose rows the step runs all
    tokens = torch.randint(0, VOCAB, (count,), generator=generator)
    rows = NewRows(tokens, torch.arange(count), slots, parents)
    level_by_level, compiled = both(heads)
    pools = [KVPool(SLOTS), KVPool(SLOTS)]
    written = compiled.write(states, rows, pools[0], LAYERS)
    assert written == (layout.layers == 1) and not level_by_level.write(states, rows, pools[1], LAYERS)
    if not written:
        return
    pools[1].slots = slots
    pools[1].keep_features(level_by_level.fuse(states))

    def keep(index, k, v):
        pools[1].update(k.transpose(0, 1)[None], v.transpose(0, 1)[None], LAYERS + index)

    level_by_level.extend(tokens, pools[1].features_at(parents), rows.positions, None, keep)
    for read in (
        lambda pool: pool.features_at(slots),
        lambda pool: pool.keys[LAYERS],
        lambda pool: pool.values[LAYERS],
    ):
        torch.testing.assert_close(read(pools[0]), read(pools[1]), rtol=1e-4, atol=1e-4)
