"""Promises 1, 3, 4 and 5 with forking on: every thread is plain greedy decoding, whatever the schedule."""

import pytest
import torch

import medusa_apar
from medusa_apar import DraftTree
from medusa_apar.heads import HydraHeads, MedusaHeads
from tests.support.drafters import RecallHeads
from tests.support.models import CHILD, CONTROL, EOS, FORK, forking_model
from tests.support.oracles import assert_threads_are_plain
from tests.support.prompts import prompts

LIMIT = 40
SEEDS = (1, 5, 11, 24)
# By both runtimes that a CPU has: the second is that of the wide models.
MODELS = ((1, "llama"), (5, "llama"), (13, "wide_llama"), (24, "wide_llama"))


def run(model, heads=None, rows=2, limit=LIMIT, generate=None, **options):
    return answered(medusa_apar.attach(model, heads, CONTROL, **options), rows, limit, generate)


def answered(apar, rows=2, limit=LIMIT, generate=None):
    inputs = prompts(rows, 6, seed=rows, ragged=True)
    return apar.generate(
        **inputs, max_new_tokens=limit, do_sample=False, return_dict_in_generate=True, **(generate or {})
    )


@pytest.fixture(scope="module", params=MODELS, ids=str)
def forked(request):
    """A model and its answer with threads but no drafts."""
    model = forking_model(*request.param)
    return model, run(model)


def test_every_thread_is_plain_greedy_decoding(forked):
    model, out = forked
    assert out.stats.forks >= 3
    assert assert_threads_are_plain(model, out.paragraph_tree) >= 5


def test_threads_fork_deep_and_child_is_forced(forked):
    _, out = forked
    for tree in out.paragraph_tree:
        for thread in tree.threads[1:]:
            assert thread.path_ids[-1] == CHILD and thread.path_ids[-2] == FORK
            assert CHILD not in thread.token_ids
            assert thread.parent.tokens[thread.fork_index] == FORK
            assert thread.depth <= 3
            if thread.token_ids:
                assert thread.token_ids[0] != FORK


def test_some_thread_forks_below_a_child():
    deepest = max(
        thread.depth for seed in SEEDS for tree in run(forking_model(seed)).paragraph_tree for thread in tree.threads
    )
    assert deepest == 3  # the depth limit is reached and holds


def test_forks_inside_accepted_runs_change_nothing(forked):
    model, plain = forked
    out = run(model, RecallHeads(model, plain.paragraph_tree), budget=200)
    assert torch.equal(out.sequences, plain.sequences)
    assert_threads_are_plain(model, out.paragraph_tree)
    assert max(out.stats.accepted_lengths) >= 4  # whole runs at once, [Fork] tokens among them
    assert out.stats.steps < plain.stats.steps


@pytest.mark.parametrize("max_threads", [1, 2, 8])
def test_thread_limits_never_show(forked, max_threads):
    model, plain = forked
    for heads in (None, RecallHeads(model, plain.paragraph_tree), HydraHeads.random(model)):
        out = run(model, heads, max_threads=max_threads)
        assert torch.equal(out.sequences, plain.sequences)
        assert out.stats.peak_threads <= 2 * max_threads  # two requests
        assert_threads_are_plain(model, out.paragraph_tree)


@pytest.mark.parametrize("budget", [1, 7, 16, 100])
@pytest.mark.parametrize(
    "tree", [DraftTree.likeliest(12), DraftTree([(0,), (0, 0), (0, 0, 0)])], ids=["sparse", "chain"]
)
def test_budgets_and_trees_never_show(forked, budget, tree):
    model, plain = forked
    out = run(model, RecallHeads(model, plain.paragraph_tree), budget=budget, draft_tree=tree)
    assert torch.equal(out.sequences, plain.sequences)


def test_memory_pressure_never_shows(forked):
    model, plain = forked
    slots = 6 + 2 * LIMIT + 2 * 3  # the least that is accepted: one path at its longest
    for heads in (None, RecallHeads(model, plain.paragraph_tree), HydraHeads.random(model, aux_layers=(0,))):
        out = run(model, heads, pool_slots=slots)
        assert torch.equal(out.sequences, plain.sequences)
        assert out.stats.peak_slots <= slots and out.stats.final_slots == 0


@pytest.mark.parametrize(("seed", "rows", "slots"), [(11, 3, 138), (13, 2, 92), (24, 2, 92)])
def test_preemption_feeds_again_and_never_shows(seed, rows, slots):
    """All rows seem to fit, and need more: threads and a request are preempted, and their prompts fed again."""
    model = forking_model(seed)
    plain = run(model, rows=rows, speculation="off")
    out = run(model, rows=rows, pool_slots=slots, speculation="off")
    assert out.stats.peak_slots <= slots < plain.stats.peak_slots and out.stats.final_slots == 0
    assert torch.equal(out.sequences, plain.sequences)
    assert 1 <= out.stats.preemptions < rows and out.stats.thread_preemptions > 0


@pytest.mark.parametrize("seed", [5, 11])
def test_rows_that_do_not_fit_wait_and_never_show(monkeypatch, seed):
    """A pool far below what the checks would let pass: even one row's threads are preempted."""
    monkeypatch.setattr("medusa_apar.engine.admission.check_fits", lambda *args: None)
    model = forking_model(seed)
    plain = run(model, rows=3)
    out = run(model, rows=3, pool_slots=64)
    assert plain.stats.peak_slots > 130 and out.stats.peak_slots <= 64 and out.stats.final_slots == 0
    assert torch.equal(out.sequences, plain.sequences)
    assert out.stats.thread_preemptions > 0 and out.stats.steps > 1.5 * plain.stats.steps


def test_a_row_alone_is_the_row_in_a_batch(forked):
    model, batch = forked
    inputs = prompts(2, 6, seed=2, ragged=True)
    for row, kind in ((row, kind) for row in range(2) for kind in (MedusaHeads, HydraHeads)):
        apar = medusa_apar.attach(model, kind.random(model), CONTROL)
        alone = {name: tensor[row : row + 1, 2 * row :] for name, tensor in inputs.items()}
        out = apar.generate(**alone, max_new_tokens=LIMIT, do_sample=False)[0, 6 - 2 * row :]
        assert batch.sequences[row, 6 : 6 + len(out)].tolist() == out.tolist()


@pytest.mark.parametrize(("seed", "family"), [(5, "llama"), (13, "wide_llama")])
def test_every_limit_is_the_unlimited_run_cut_short(seed, family):
    model = forking_model(seed, family)
    whole = run(model, rows=1, limit=LIMIT)
    apar = medusa_apar.attach(model, RecallHeads(model, whole.paragraph_tree), CONTROL)
    for limit in range(1, LIMIT + 1):
        out = answered(apar, 1, limit)
        assert torch.equal(out.sequences, whole.sequences[:, : 6 + limit])
        assert out.stats.final_slots == 0


def test_threads_beyond_the_limit_are_cancelled_early():
    model = forking_model(24)
    short, long = run(model, rows=1, limit=5), run(model, rows=1, limit=LIMIT)
    assert any(thread.finish_reason == "length" for thread in short.paragraph_tree[0].threads)
    assert short.stats.steps < long.stats.steps
    assert sum(len(t.token_ids) for t in short.paragraph_tree[0].threads) < 40


def test_streaming_is_the_reading_order():
    class Collector:
        def __init__(self):
            self.columns, self.ended = [], False

        def put(self, value):
            self.columns.append(value)

        def end(self):
            self.ended = True

    model = forking_model(24)
    for rows in (1, 3):
        collector, arrived = Collector(), []
        out = run(
            model,
            rows=rows,
            generate={"streamer": collector, "events": lambda _, c=collector, a=arrived: a.append(len(c.columns))},
        )
        assert len(set(arrived)) > 5  # as they become final, not all at the end
        prompt, *columns = collector.columns
        assert collector.ended and prompt.shape == (rows, 6)
        assert torch.equal(torch.stack(columns, dim=1), out.sequences[:, 6:])


def test_stop_criteria_act_on_the_finished_reading_order():
    model = forking_model(24)
    whole = run(model, rows=1)
    text = whole.sequences[0, 6:].tolist()
    seen = []

    def stop_after_nine(input_ids, scores, **kwargs):
        seen.append(input_ids[0].tolist())
        return torch.tensor([input_ids.shape[1] >= 6 + 9])

    out = run(
        model, RecallHeads(model, whole.paragraph_tree), rows=1, generate={"stopping_criteria": [stop_after_nine]}
    )
    assert out.sequences[0, 6:].tolist() == text[:9]
    assert [ids[6:] for ids in seen] == [text[:length] for length in range(1, 10)]


def test_slots_return_as_threads_end_and_forks_copy_nothing():
    """Peak slots stay below what the threads would need if each held its own copy, or held on until the end."""
    model = forking_model(5)
    out = run(model, rows=1)
    (tree,) = out.paragraph_tree
    written = tree.trunk.num_forced + sum(len(thread.tokens) for thread in tree.threads)
    assert out.stats.final_slots == 0
    assert out.stats.peak_slots < written


def test_child_end_tokens_are_not_in_the_text():
    for seed in SEEDS:
        out = run(forking_model(seed), rows=1)
        text = out.sequences[0, 6:].tolist()
        ended = [t for t in out.paragraph_tree[0].threads[1:] if t.finish_reason == "stop"]
        assert all(thread.token_ids[-1] == EOS for thread in ended)
        assert FORK not in text and CHILD not in text and EOS not in text[:-1]
