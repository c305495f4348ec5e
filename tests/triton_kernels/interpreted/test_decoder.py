"""The whole decoder over the attention kernels, token for token what it is over dense masks."""

from dataclasses import replace

import pytest
import torch

import medusa_apar
from medusa_apar import DraftTree
from medusa_apar.events import StepFinished
from medusa_apar.heads import Eagle3Heads, HydraHeads
from medusa_apar.kv.path_table import PathTable
from medusa_apar.runtimes.cuda_graphs import GraphedSteps, StaticForest
from tests.support.drafters import RecallHeads
from tests.support.eagle3_files import LAYOUTS, checkpoint
from tests.support.models import CONTROL, VOCAB, forking_model, tiny_model
from tests.support.oracles import assert_threads_are_plain
from tests.support.prompts import prompts

# Windows, soft caps, two kinds of layers, sinks, positions that are learned.
FAMILIES = ("mistral", "gemma2", "gemma3", "gpt_oss", "gpt2")


def run(model, attention, heads=None, rows=2, limit=16, length=6, **options):
    apar = medusa_apar.attach(model, heads, CONTROL, attention=attention, runtime="torch", **options)
    inputs = prompts(rows, length, seed=rows, ragged=True)
    return apar.generate(**inputs, max_new_tokens=limit, do_sample=False, return_dict_in_generate=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_decode_the_same_over_kernels_and_masks(family):
    model = tiny_model(family, fork=0.9, eos=0.2) if family != "gpt_oss" else tiny_model(family)
    heads = HydraHeads.random(model)
    ours, plain = (run(model, attention, heads, rows=1, limit=5, budget=8) for attention in ("triton", "sdpa"))
    assert torch.equal(ours.sequences, plain.sequences)


@pytest.mark.parametrize("graphs", [False, True])
def test_threads_drafts_and_batches_decode_the_same(monkeypatch, graphs):
    """Over paths of several chunks, which threads share; and over the buffers that a CUDA graph would read."""
    model = forking_model(24)
    plain = run(model, "sdpa", rows=1, length=34, limit=6)
    heads = RecallHeads(model, plain.paragraph_tree)
    monkeypatch.setattr(PathTable, "chunk", 32)
    used = []
    monkeypatch.setattr(StaticForest, "layout", spied(StaticForest.layout, used))
    ours = run(model, "triton", heads, rows=1, length=34, limit=6, budget=12, cuda_graphs=graphs)
    assert torch.equal(ours.sequences, plain.sequences)
    assert ours.stats.forks >= 2 and max(ours.stats.accepted_lengths) >= 3
    assert bool(used) == graphs
    assert_threads_are_plain(model, ours.paragraph_tree)


@pytest.mark.parametrize("graphs", [False, True])
def test_a_drafter_that_attends_drafts_and_decodes_the_same(monkeypatch, graphs):
    """Its layer runs behind the base's pass, which a graph may have been."""
    model = forking_model(24)
    layout = replace(LAYOUTS["with an embedding of its own"], ids=(1, 2, 2), more={"boundaries": [1, 2, 2]})
    heads = Eagle3Heads.from_state(*checkpoint(layout, 1, model.config.hidden_size, VOCAB), model)
    plain = run(model, "sdpa", heads, limit=8, budget=12)
    used = []
    monkeypatch.setattr(StaticForest, "layout", spied(StaticForest.layout, used))
    apar = medusa_apar.attach(model, heads, CONTROL, attention="triton", runtime="torch", budget=12, cuda_graphs=graphs)
    made = []
    monkeypatch.setattr(GraphedSteps, "_made", spied(GraphedSteps._made, made))
    counts = []
    for _ in range(3):
        inputs = prompts(2, 6, seed=2, ragged=True)
        ours = apar.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        counts.append(len(made))
        assert torch.equal(ours.sequences, plain.sequences) and ours.stats.steps == plain.stats.steps
        assert ours.stats.drafted == plain.stats.drafted and ours.stats.drafted["heads"] > 0
        assert ours.stats.accepted == plain.stats.accepted
    # What the drafter keeps is begun anew in each call: no graph knows of it, and none is made for that.
    assert bool(used) == graphs and counts[1] == counts[2] and bool(counts[0]) == graphs
    assert_threads_are_plain(model, ours.paragraph_tree)


def spied(function, calls: list):
    def call(*args):
        calls.append(function.__name__)  # not the arguments: a pool that is kept is a pool in use
        return function(*args)

    return call


def test_what_is_fed_again_after_preemption_decodes_the_same():
    model = forking_model(24)
    plain = run(model, "sdpa", limit=12, speculation="off", budget=24)
    ours = run(model, "triton", limit=12, pool_slots=36, speculation="off", budget=24)
    assert torch.equal(ours.sequences, plain.sequences)
    assert plain.stats.peak_slots > 36 >= ours.stats.peak_slots
    assert ours.stats.preemptions > 0 and ours.stats.thread_preemptions > 3


def test_graphs_serve_call_after_call_and_calls_within_calls(monkeypatch):
    """They keep the KV pool between calls; a call inside another gets a pool of its own."""
    model = forking_model(11)
    plain = [run(model, "sdpa", rows=1, length=length, limit=6).sequences for length in (5, 9)]
    apar = medusa_apar.attach(model, None, CONTROL, attention="triton", cuda_graphs=True)
    inner = []

    def within(event):
        if isinstance(event, StepFinished) and event.step == 2 and not inner:
            inner.append(apar.generate(**prompts(1, 9, seed=1, ragged=True), max_new_tokens=6, do_sample=False))

    made, replayed, counts = [], [], []
    monkeypatch.setattr(GraphedSteps, "_made", spied(GraphedSteps._made, made))
    monkeypatch.setattr(StaticForest, "load", spied(StaticForest.load, replayed))
    for inference in (True, False):
        # Tensors made in a caller's inference mode could not be filled by the next call.
        with torch.inference_mode(inference):
            out = apar.generate(**prompts(1, 5, seed=1, ragged=True), max_new_tokens=6, do_sample=False, events=within)
        assert torch.equal(out, plain[0])
        counts.append((len(replayed), len(made)))
    assert torch.equal(inner[0], plain[1])
    (first, made_first), (second, made_second) = counts
    # The second call finds all its sizes, but for the prompt's: the first one met that before it had a pool.
    assert second - first == first + 1 > 2 and made_second == made_first + 1


def test_weights_that_moved_leave_no_graph_behind(monkeypatch):
    model = tiny_model()
    apar = medusa_apar.attach(model, attention="triton", cuda_graphs=True)
    options = prompts(1, 5) | {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    apar.generate(**options)
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.9
    made = []
    monkeypatch.setattr(GraphedSteps, "_made", spied(GraphedSteps._made, made))
    expected = medusa_apar.attach(model, attention="sdpa", runtime="torch").generate(**options)
    assert torch.equal(apar.generate(**options), expected) and made


def test_the_kernels_are_what_runs(monkeypatch):
    """Else the tests above compare masks with masks."""

    def broken(*args, **kwargs):
        raise RuntimeError("the kernel was called")

    model = tiny_model()
    apar = medusa_apar.attach(model, attention="triton", runtime="torch")
    monkeypatch.setattr("medusa_apar.runtimes.triton_attention.tree_attention", broken)
    with pytest.raises(RuntimeError, match="the kernel was called"):
        apar.generate(**prompts(1, 4), max_new_tokens=2)


def test_trees_of_more_nodes_than_a_word_has_bits_are_refused_or_cut():
    model = tiny_model()
    chain = DraftTree([(0,) * (depth + 1) for depth in range(65)])
    with pytest.raises(ValueError, match="65 nodes"):
        medusa_apar.attach(model, attention="triton", draft_tree=chain)
    apar = medusa_apar.attach(model, HydraHeads.random(model), attention="triton", budget=200)
    assert len(apar.options.draft_tree) <= 64


@pytest.mark.parametrize("options", [{"attention": "sdpa", "cuda_graphs": True}, {"cuda_graphs": True}])
def test_graphs_need_the_kernels(options):
    with pytest.raises(ValueError, match="cuda_graphs"):
        medusa_apar.attach(tiny_model(), runtime="torch", **options)
