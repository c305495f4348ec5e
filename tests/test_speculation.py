"""What is guessed ahead, and which of it becomes nodes: it decides when a token is made, never which."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import medusa_apar
from medusa_apar.draft_tree import DraftTree
from medusa_apar.forest_budget import LEAST_CHANCE, ForestBudget, worths
from medusa_apar.heads import HydraHeads
from medusa_apar.paragraph_tree import ParagraphTree
from medusa_apar.proposals import Calibration, Proposal, Proposer, Trust
from medusa_apar.sibling_memory import LONGEST, MOST_RECALLED, SHORTEST, Recall, SiblingMemory
from medusa_apar.speculation import Speculation
from medusa_apar.step_cost import StepCost
from medusa_apar.triton_kernels import reference
from tests.tiny import (
    CHILD,
    CONTROL,
    FORK,
    VOCAB,
    RecallHeads,
    assert_threads_are_plain,
    forking_model,
    prompts,
    tiny_model,
)

POLICIES = {
    "all": Speculation(),
    "heads alone": Speculation(siblings=False, forks=False, worths=False),
    "worths": Speculation(siblings=False, forks=False),
    "forks": Speculation(siblings=False),
    "siblings": Speculation(forks=False),
    "even": Speculation.even(),
}


def run(model, heads=None, rows=2, limit=40, generate=None, **options):
    apar = medusa_apar.attach(model, heads, CONTROL, **options)
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


@pytest.mark.parametrize("policy", ["all", "forks", "even"])
@pytest.mark.parametrize("generate", [{"do_sample": True, "seed": 3}, {"repetition_penalty": 1.2}])
def test_policies_never_show_in_samples_and_behind_processors(policy, generate):
    model = forking_model(11)
    plain = run(model, generate=generate)
    heads = RecallHeads(model, plain.paragraph_tree)
    out = run(model, heads, speculation=POLICIES[policy], budget=40, generate=generate)
    assert torch.equal(out.sequences, plain.sequences)
    assert out.stats.steps < plain.stats.steps


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
    assert torch.equal(out.sequences, plain.sequences) and out.stats.drafted["siblings"] > 0


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
        policy = Speculation(siblings=False, forks=forks)
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


class WrongHeads:
    """Claims to know, and never does."""

    taps = ()
    num_heads = 3
    acceptance = [[0.8, 0.1, 0.05]] * 3

    def check_matches(self, model): ...

    def propose(self, hidden, root_ids, tree):
        token_ids = torch.full((len(root_ids), len(tree)), VOCAB - 1)
        return token_ids, torch.full(token_ids.shape, -0.1)


def test_heads_that_do_not_pay_are_no_longer_asked():
    model = tiny_model()
    policy, cost = Speculation(siblings=False), StepCost(((1, 10.0), (2, 12.0), (64, 140.0)), ((1, 4.0),))
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
        asked.append(budget.heads_pay())
        claim = 0.2 if step == 0 else 0.9
        proposal = Proposal(np.array([5]), np.array([-1]), np.array([claim]), heads=1) if asked[-1] else None
        budget.choose([proposal], np.ones(1), 99)
    assert all(asked)


class BrokenHeads(WrongHeads):
    """Half of what they claim is no number."""

    def propose(self, hidden, root_ids, tree):
        token_ids, log_probs = super().propose(hidden, root_ids, tree)
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
    assert torch.equal(out.sequences, plain.sequences) and out.stats.drafted["siblings"] > 0


def test_heads_are_asked_once_a_step_however_tokens_are_chosen():
    model, cost = tiny_model(), StepCost(((1, 10.0), (2, 12.0), (64, 140.0)), ((1, 4.0),))
    policy = Speculation(siblings=False)
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


# ---- sibling memory


@settings(deadline=None)
@given(st.data())
def test_recall_is_what_followed_the_longest_match(data):
    tree = ParagraphTree(data.draw(st.lists(st.integers(5, 8), min_size=1, max_size=12)), fork_id=FORK, child_id=CHILD)
    memory = SiblingMemory(CHILD)
    written = []  # (thread, index) of every token that follows an n-gram, in the order in which they were learned
    known = {}

    def learn(thread):
        memory.learn(thread)
        written.extend((thread, index) for index in range(known.get(thread, 0), len(thread.tokens)))
        known[thread] = len(thread.tokens)

    learn(tree.trunk)
    for _ in range(data.draw(st.integers(1, 12))):
        thread = data.draw(st.sampled_from(tree.threads))
        thread.tokens += data.draw(st.lists(st.integers(5, 8), min_size=1, max_size=3))
        if data.draw(st.booleans()):
            thread.tokens.append(FORK)
            child = tree.fork(thread, len(thread.tokens) - 1, key=0)
            learn(child)
        learn(thread)

    for thread in tree.threads:
        tokens, recall = thread.tokens, memory.recall(thread)
        if len(tokens) == 1 and thread.parent is not None:
            elder = [t for t in tree.threads if t.parent is not None and len(t.tokens) > 1]
            assert (recall is None) == (not elder)
            continue
        expected = None
        for length in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            places = [
                (other, index)
                for other, index in written
                if index >= length and other.tokens[index - length : index] == tokens[-length:]
            ]
            if places:
                expected = length, places[-1]
                break
        if expected is None:
            assert recall is None
        else:
            length, (other, index) = expected
            assert recall.tokens == other.tokens[index : index + MOST_RECALLED]
            assert recall.match >= length
            assert other.tokens[index - recall.match : index] == tokens[-recall.match :]


# ---- proposals


@st.composite
def guesses(draw):
    """A tree of heads' guesses with its tokens and claims; siblings differ, and claim no more than one together."""
    tree = DraftTree.likeliest(draw(st.integers(1, 20)))
    tokens, claims = np.zeros(len(tree), dtype=np.int64), np.zeros(len(tree))
    for children in tree.children:
        if children:
            tokens[children] = draw(st.permutations(range(2, 14)))[: len(children)]
            shares = np.array([draw(st.floats(0.01, 1)) for _ in range(len(children) + 1)])
            claims[children] = np.sort(shares[:-1] / shares.sum())[::-1]
    return tree, tokens, claims


@settings(deadline=None)
@given(guesses(), st.lists(st.integers(2, 14), min_size=1, max_size=8), st.integers(1, 14), st.booleans())
def test_proposals_are_trees_whose_chances_are_chances(guessed, recalled, match, may_fork):
    tree, tokens, claims = guessed
    proposer = Proposer(FORK, CHILD)
    (alone,) = proposer.of_heads(tree, tokens[None], np.log(claims)[None])
    proposal = proposer.with_recall(alone, tree, Recall(recalled, match))
    assert [int(proposal.tokens[node]) for node in proposal.chain] == recalled
    assert proposal.parents[proposal.chain].tolist() == [-1, *proposal.chain[:-1]]
    # The recalled token is likelier than either source makes it; whatever else hangs there is less likely than before.
    first = proposal.chain[0]
    trust = proposer.trust.of(match)
    assert proposal.chances[first] >= trust - 1e-9
    others = [node for node in tree.children[-1] if node != first]
    assert (proposal.chances[others] <= alone.chances[others] + 1e-9).all()
    np.testing.assert_allclose(proposal.chances[others], (1 - trust) * alone.chances[others])

    proposal = proposer.with_children(proposal, may_fork)
    parents, chances = proposal.parents, proposal.chances
    for node, parent in enumerate(parents.tolist()):
        assert parent < node and 0 <= chances[node] <= (chances[parent] if parent >= 0 else 1) + 1e-9
    for parent in range(-1, len(parents)):
        below = [n for n in range(len(parents)) if parents[n] == parent and n not in proposal.forks.values()]
        total = chances[parent] if parent >= 0 else 1.0
        assert chances[below].sum() <= total + 1e-9
        assert len({int(proposal.tokens[n]) for n in below}) == len(below)
    for node, token in enumerate(proposal.tokens.tolist()):
        before = int(proposal.tokens[parents[node]]) if parents[node] >= 0 else None
        spawned = node in proposal.forks.values()
        if token == CHILD:
            assert spawned or chances[node] == 0
        if token == FORK:
            allowed = may_fork and before not in (FORK, CHILD) and chances[node] > 0
            assert (node in proposal.forks) == allowed or chances[node] == 0
            if node in proposal.forks:
                assert parents[proposal.forks[node]] == node and chances[proposal.forks[node]] == chances[node]


@given(st.floats(0.2, 0.95), st.floats(0.0, 0.4), st.integers(0, 10_000))
def test_trust_finds_the_share_of_what_is_recalled(share, other, seed):
    """Tokens come from the sibling with that share, else as the heads say."""
    random, trust = np.random.default_rng(seed), Trust()
    for draw in random.random(4000) < share + (1 - share) * other:
        trust.saw(5, other, bool(draw))
    assert abs(trust.of(5) + (1 - trust.of(5)) * other - (share + (1 - share) * other)) < 0.05
    assert trust.of(6) == Trust().of(6)


@given(st.floats(0.1, 1.0), st.integers(0, 10_000))
def test_claims_are_corrected_by_what_became_of_them(honesty, seed):
    random, calibration = np.random.default_rng(seed), Calibration()
    for _ in range(60):
        claims = random.uniform(0.05, 0.95, 50)
        calibration.saw(claims, random.random(50) < honesty * claims)
    claims = np.array([0.1, 0.3, 0.6, 0.9])
    np.testing.assert_allclose(Calibration().chances(claims), claims)  # nothing known: believed
    assert np.abs(calibration.chances(claims) - honesty * claims).max() < 0.12


# ---- the budget


@st.composite
def forests(draw):
    made = []
    for _ in range(draw(st.integers(1, 5))):
        size = draw(st.integers(0, 9))
        if not size:
            made.append(None)
            continue
        parents = np.array([draw(st.integers(-1, node - 1)) for node in range(size)])
        chances = np.zeros(size)
        for node in range(size):
            chances[node] = draw(st.floats(0, 1)) * (chances[parents[node]] if parents[node] >= 0 else 1)
        made.append(Proposal(np.arange(size), parents, chances, heads=size))
    return made, np.array([draw(st.sampled_from([0.5, 1.0])) for _ in made])


@settings(deadline=None)
@given(forests(), st.integers(0, 30), st.integers(0, 40))
def test_the_budget_keeps_the_best_nodes_with_their_parents(forest, rows, room):
    proposals, worth = forest
    kept = ForestBudget(rows).choose(proposals, worth, room)
    count = sum(map(len, kept))
    assert count <= max(0, min(room, rows - len(proposals)))
    some = [(p.chances, w) for p, w in zip(proposals, worth, strict=True) if p is not None]
    gains = np.concatenate([[], *(np.where(chances > LEAST_CHANCE, chances * w, 0) for chances, w in some)])
    got = sum(float((p.chances[k] * w).sum()) for p, w, k in zip(proposals, worth, kept, strict=True) if p is not None)
    worthwhile = np.sort(gains[gains > 0])[::-1]
    assert got == pytest.approx(worthwhile[:count].sum())
    assert count == min(len(worthwhile), max(0, min(room, rows - len(proposals))))
    for proposal, nodes in zip(proposals, kept, strict=True):
        assert proposal is not None or not len(nodes)
        if proposal is not None:
            assert set(proposal.parents[nodes].tolist()) <= {-1, *nodes.tolist()}


@settings(deadline=None)
@given(forests(), st.floats(1, 20), st.floats(0.1, 5))
def test_the_budget_stops_where_nodes_cost_more_than_they_bring(forest, fixed, row):
    proposals, worth = forest
    assume(any(p is not None for p in proposals))
    budget = ForestBudget(64, StepCost(((1, fixed), (64, fixed + 63 * row))))
    rate = 1.5 / (fixed + row * (len(proposals) - 1))  # of a first step: what is assumed of it
    for proposal, nodes, weight in zip(proposals, budget.choose(proposals, worth, 99), worth, strict=True):
        if proposal is not None:
            likely = proposal.chances > LEAST_CHANCE
            pays = np.flatnonzero((proposal.chances * weight > rate * row + 1e-9) & likely)
            assert set(pays.tolist()) <= set(nodes.tolist())
            assert (proposal.chances[nodes] * weight > rate * row - 1e-9).all()


def test_no_thread_has_more_nodes_than_the_kernels_take():
    proposal = Proposal(np.arange(90), np.arange(90) - 1, 0.99 ** np.arange(90), heads=90)
    (kept,) = ForestBudget(500, most_nodes=64).choose([proposal], np.ones(1), 500)
    assert kept.tolist() == list(range(64))


def test_the_answer_waits_for_who_can_fork_then_for_who_wrote_least():
    tree = ParagraphTree([1, 2], fork_id=FORK, child_id=CHILD)
    tree.trunk.tokens += [5, FORK, 6, FORK]
    children = [tree.fork(tree.trunk, index, 0) for index in (3, 5)]
    children[0].tokens += [7] * 30
    assert worths([tree.trunk, *children]).tolist() == [0.5, 0.25, 0.25]
    np.testing.assert_allclose(worths(children), [1 / 3, 2 / 3])
    assert worths(children[:1]).tolist() == [1.0]


def test_nothing_is_looked_for_where_nothing_pays():
    """Alone a thread's guesses pay; beside forty others they cost more than they could bring (promise 7)."""
    tree = ParagraphTree([1, 2], fork_id=FORK, child_id=CHILD)
    for _ in range(40):
        tree.trunk.tokens += [5, FORK]
        tree.fork(tree.trunk, len(tree.trunk.tokens) - 1, 0)
    cost = StepCost(((1, 10.0), (64, 136.0)), ((1, 1.0),))
    budget = ForestBudget(64, cost)
    assert budget.paying([tree.trunk], 1, 1) == {tree.trunk}
    assert budget.paying(tree.threads, len(tree.threads), 1) == {tree.trunk}  # which they all wait for
    assert budget.paying(tree.threads[1:], len(tree.threads) - 1, 1) == set()
    assert budget.paying(tree.threads[:3], 3, 1) == set(tree.threads[:3])
    assert ForestBudget(64).paying(tree.threads, 41, 1) == set(tree.threads)  # rows to be filled, whatever they cost

    trunk, child, other = tree.threads[:3]
    assert budget.asking({trunk: 0.0, child: 0.0}) == {trunk}  # the answer waits for it
    assert budget.asking({trunk: 0.9}) == set()  # its sibling leads
    assert budget.asking({child: 0.0, other: 0.0}) == {child, other}
    assert 0.01 < budget.bar(1, 1, 1.0) < budget.bar(1, 1, 0.5) <= 0.5
    assert not budget.choose([Proposal(np.array([5]), np.array([-1]), np.array([budget.bar(1, 1, 1.0) * 0.9]))],
                             np.ones(1), 9)[0].size  # fmt: skip


def test_the_first_nodes_of_every_size_are_trees():
    """What is cut from a proposal is renumbered: a shape is known by its parents alone."""
    for parents in itertools.product([-1, 0], [-1, 0, 1], [-1, 0, 1, 2]):
        shape = medusa_apar.draft_tree.TreeShape.of(np.array([-1, *parents]))
        for node, parent in enumerate(shape.parents.tolist()):
            assert shape.depths[node] == (0 if parent < 0 else shape.depths[parent] + 1)
            assert shape.ancestors[node].sum() == shape.depths[node] + 1
