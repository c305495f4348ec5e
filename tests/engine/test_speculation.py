"""What is guessed ahead, and which of it becomes nodes: it decides when a token is made, never which."""

import numpy as np
import pytest
import torch

import medusa_apar
from medusa_apar.drafting.budget import ForestBudget
from medusa_apar.drafting.candidates import Proposal
from medusa_apar.drafting.options import Speculation
from medusa_apar.drafting.step_cost import StepCost
from medusa_apar.heads import HydraHeads
from medusa_apar.said import say_once
from medusa_apar.triton_kernels import reference
from tests.support.drafters import RecallHeads, WeightlessHeads
from tests.support.models import CONTROL, VOCAB, forking_model, tiny_model
from tests.support.oracles import assert_threads_are_plain
from tests.support.prompts import prompts

POLICIES = {
    "all": Speculation(),
    "heads alone": Speculation(ngrams=False, forks=False, thread_weights=False),
    "thread_weights": Speculation(ngrams=False, forks=False),
    "forks": Speculation(ngrams=False),
    "ngrams": Speculation(forks=False),
    "recycling": Speculation(ngrams=False, forks=False, recycling=True),
    "all and recycling": Speculation(recycling=True),
    "even": Speculation.even(),
}


def run(model, heads=None, rows=2, limit=40, generate=None, **options):
    plain = {"speculation": "off"} if heads is None else {}
    apar = medusa_apar.attach(model, heads, CONTROL, **plain | options)
    arguments = prompts(rows, 6, seed=rows, ragged=True) | {"do_sample": False} | (generate or {})
    return apar.generate(**arguments, max_new_tokens=limit, return_dict_in_generate=True)


@pytest.fixture(scope="module", params=[5, 24])
def forked(request):
    model = forking_model(request.param)
    return model, run(model)


# ---- promises 1 and 5, over every policy


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("budget", [None, 30])
def test_policies_never_show(forked, policy, budget):
    model, plain = forked
    for heads in (RecallHeads(model, plain.paragraph_tree), HydraHeads.random(model)):
        out = run(model, heads, speculation=POLICIES[policy], budget=budget)
        assert torch.equal(out.sequences, plain.sequences)
        assert out.stats.final_slots == 0
    if policy == "all":  # the others wrote the same
        assert_threads_are_plain(model, out.paragraph_tree)


@pytest.mark.parametrize("policy", ["all", "forks", "even", "all and recycling"])
@pytest.mark.parametrize("generate", [{"do_sample": True, "seed": 3}, {"repetition_penalty": 1.2}])
def test_policies_never_show_in_samples_and_behind_processors(policy, generate):
    model = forking_model(11)
    plain = run(model, generate=generate)
    heads = RecallHeads(model, plain.paragraph_tree)
    out = run(model, heads, speculation=POLICIES[policy], budget=40, generate=generate)
    assert torch.equal(out.sequences, plain.sequences)
    stats = out.stats
    assert stats.iteration_tokens.total() == stats.steps < plain.stats.steps
    by_length = sum(length * count for length, count in stats.drafts.items())
    by_source = sum(stats.accepted[source] for source in ("heads", "ngrams", "recycled"))
    assert by_length == by_source > 0 == plain.stats.drafts.total()


@pytest.mark.parametrize("limits", [{"max_threads": 1}, {"pool_slots": 6 + 2 * 40 + 2 * 3}, {"runtime": "torch"}])
def test_limits_never_show_beside_speculation(forked, limits):
    model, plain = forked
    out = run(model, RecallHeads(model, plain.paragraph_tree), speculation="forest", budget=30, **limits)
    assert torch.equal(out.sequences, plain.sequences)
    assert out.stats.peak_slots <= limits.get("pool_slots", 10_000)


def test_scores_of_begun_children_are_kept(forked):
    model, plain = forked
    scored = {"output_scores": True, "output_logits": True}
    expected = run(model, generate=scored)
    heads = RecallHeads(model, plain.paragraph_tree, wrong_every=10**9)
    out = run(model, heads, budget=60, generate=scored)
    assert out.stats.accepted["forks"] > 0
    for ours, theirs in zip(out.scores + out.logits, expected.scores + expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_threads_speculate_without_heads():
    model = forking_model(24)
    plain = run(model, rows=1)
    assert not plain.stats.drafted
    out = run(model, rows=1, speculation="forest")
    assert torch.equal(out.sequences, plain.sequences) and out.stats.drafted["ngrams"] > 0


@pytest.mark.parametrize("generate", [{}, {"do_sample": True, "seed": 3}, {"repetition_penalty": 1.2}])
@pytest.mark.parametrize("runtime", ["cpu", "torch", "one launch"])
def test_recycled_tokens_alone_save_steps_and_never_show(runtime, generate):
    model = forking_model(24, "wide_llama")
    chosen = "torch" if runtime == "one launch" else runtime
    plain = run(model, runtime=chosen, generate=generate)
    policy = Speculation(ngrams=False, recycling=True)
    apar = medusa_apar.attach(model, None, CONTROL, speculation=policy, runtime=chosen, budget=40)
    if runtime == "one launch":
        apar.runtime.verify = reference.verify
    arguments = prompts(2, 6, seed=2, ragged=True) | {"do_sample": False} | generate
    out = apar.generate(**arguments, max_new_tokens=40, return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain.sequences)
    assert out.stats.accepted["recycled"] > 0 and out.stats.steps < plain.stats.steps
    assert not out.stats.drafted["heads"] and not out.stats.drafted["ngrams"]


def test_a_model_without_heads_guesses_unless_it_is_told_not_to(caplog):
    model = forking_model(24)
    say_once.cache_clear()
    arguments = prompts(1, 6) | {"do_sample": False, "max_new_tokens": 40, "return_dict_in_generate": True}
    outs = [medusa_apar.attach(model, None, CONTROL, speculation=how).generate(**arguments) for how in (None, "off")]
    assert outs[0].stats.drafted["ngrams"] > 0 and not outs[1].stats.drafted
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    medusa_apar.attach(model)
    assert [record.message for record in caplog.records if "n-gram" in record.message or "off" in record.message] == [
        "LlamaForCausalLM has no draft heads: drafting from n-grams of the prompt and the answer (speculation='off' "
        "disables it)."
    ]


def test_a_fork_mode_of_attach_holds_where_a_call_says_nothing():
    apar = medusa_apar.attach(forking_model(24), None, CONTROL, fork="off")
    arguments = prompts(1, 6) | {"do_sample": False, "max_new_tokens": 40, "return_dict_in_generate": True}
    assert apar.generate(**arguments).stats.forks == 0
    assert apar.generate(**arguments, fork="auto").stats.forks > 0
    with pytest.raises(ValueError, match="'auto', 'off', 'lists'"):
        medusa_apar.attach(forking_model(24), None, CONTROL, fork="everywhere")


def test_a_representation_says_what_runs():
    model = tiny_model("wide_llama")
    threads = medusa_apar.attach(model, HydraHeads.random(model), CONTROL, runtime="torch")
    assert repr(threads) == (
        "MedusaApar(LlamaForCausalLM, torch on cpu in float32, guesses by 3 Hydra heads and n-grams, forks at token 3)"
    )
    plain = medusa_apar.attach(model, speculation="off", runtime="cpu")
    assert repr(plain) == (
        "MedusaApar(LlamaForCausalLM, compiled code on cpu in float32, guesses nothing, never forks)"
    )


def test_plans_are_two():
    with pytest.raises(ValueError, match="forest"):
        Speculation(plan="sideways")
    with pytest.raises(ValueError, match="even"):
        Speculation("even")


# ---- speculative fork


def test_a_drafted_fork_costs_no_step(forked):
    model, plain = forked
    heads = RecallHeads(model, plain.paragraph_tree, wrong_every=10**9)  # guesses all
    steps = {}
    for forks in (True, False):
        policy = Speculation(ngrams=False, forks=forks)
        out = run(model, heads, speculation=policy, budget=120)
        seen = out.recording
        children = [thread for tree in seen.trees for thread in tree.threads[1:] if seen.origins[thread]]
        waits = [seen.origins[thread][0].step - seen.started[thread] for thread in children]
        steps[forks] = waits
        assert out.stats.accepted["forks"] == (waits.count(0) if forks else 0)
    assert set(steps[False]) == {1}  # a child's [Child] runs in the step behind its [Fork]'s
    assert steps[True].count(0) >= 3
    assert set(steps[True]) <= {0, 1}  # 1: the [Fork] was no draft node but the step's last token


# ---- promise 7


class WrongHeads(WeightlessHeads):
    """Claims to know, and never does."""

    def propose(self, hidden_states, root_ids, tree, min_probability=0.0):
        token_ids = torch.full((len(root_ids), len(tree)), VOCAB - 1)
        return token_ids, torch.full(token_ids.shape, -0.1)


def test_heads_that_do_not_pay_are_no_longer_asked():
    model = tiny_model()
    policy, cost = Speculation(ngrams=False), StepCost(((1, 10.0), (2, 12.0), (64, 140.0)), ((1, 4.0),))
    plain = run(model, rows=1, limit=120, generate={"min_new_tokens": 120})
    assert plain.stats.steps == 120
    out = run(model, WrongHeads(), 1, 120, {"min_new_tokens": 120}, speculation=policy, step_cost=cost)
    assert torch.equal(out.sequences, plain.sequences)
    assert out.stats.undrafted_steps > 60
    assert (
        sum(step.rows for step in out.recording.steps[61:]) <= 60 + 10
    )  # the second half is plain decoding, but for a look now and then


def test_heads_are_not_given_up_for_one_weak_step():
    budget = ForestBudget(24, StepCost(((1, 4.0), (4, 7.0), (24, 30.0)), ((1, 2.0),)))
    asked = []
    for step in range(40):
        asked.append(budget.heads_enabled())
        claim = 0.2 if step == 0 else 0.9
        proposal = Proposal(np.array([5]), np.array([-1]), np.array([claim]), heads=1) if asked[-1] else None
        budget.choose([proposal], np.ones(1), 99)
    assert all(asked)


class BrokenHeads(WrongHeads):
    """Half of what they claim is no number."""

    def propose(self, hidden_states, root_ids, tree, min_probability=0.0):
        token_ids, log_probs = super().propose(hidden_states, root_ids, tree)
        log_probs[:, ::2] = torch.nan
        log_probs[:, 1::4] = torch.inf
        return token_ids, log_probs


def test_claims_that_are_no_probabilities_do_no_harm(forked):
    model, plain = forked
    out = run(model, BrokenHeads(), speculation="forest", budget=30)
    assert torch.equal(out.sequences, plain.sequences)


@pytest.mark.parametrize("seed", [1, 6, 18])
def test_a_recall_inside_the_heads_tree_leaves_ids_whole(seed):
    """Ids that had become floats cost seeds and keys their low bits: other samples in one launch."""
    model = tiny_model(seed=seed)
    sampled = {"do_sample": True, "temperature": 0.15, "seed": 5}
    plain = run(model, rows=1, limit=120, generate=sampled, runtime="torch")
    apar = medusa_apar.attach(model, RecallHeads(model, plain.paragraph_tree), CONTROL, runtime="torch", budget=30)
    apar.runtime.verify = reference.verify
    inputs = prompts(1, 6, seed=1, ragged=True)
    out = apar.generate(**inputs, **sampled, max_new_tokens=120, return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain.sequences) and out.stats.drafted["ngrams"] > 0


def test_heads_are_asked_once_a_step_however_tokens_are_chosen():
    model, cost = tiny_model(), StepCost(((1, 10.0), (2, 12.0), (64, 140.0)), ((1, 4.0),))
    policy = Speculation(ngrams=False)
    apar = medusa_apar.attach(model, WrongHeads(), CONTROL, runtime="torch", step_cost=cost, speculation=policy)
    apar.runtime.verify = reference.verify  # which scores cannot go through
    options = {"max_new_tokens": 60, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    stats = apar.generate(**prompts(1, 6), **options).stats
    assert 0 < stats.undrafted_steps < stats.steps


def test_no_node_stands_beyond_the_positions_that_a_model_has():
    model = tiny_model("gpt2")
    for speculation in ("forest", "even"):
        apar = medusa_apar.attach(model, HydraHeads.random(model), speculation=speculation, budget=60)
        inputs = prompts(1, 200)
        out = apar.generate(**inputs, max_new_tokens=70, do_sample=False)
        assert torch.equal(out, model.generate(**inputs, max_new_tokens=56, do_sample=False))
