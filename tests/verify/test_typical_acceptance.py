"""Typical acceptance: medusa-llm's rule on the same logits, and nothing else changes where it is not asked for."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import medusa_apar
from medusa_apar import DraftTree, PresenceFrequencyLogitsProcessor, TypicalAcceptance
from medusa_apar.engine.commit import commit
from medusa_apar.heads import MedusaHeads
from medusa_apar.runtimes.cpu.choosing import CompiledChooser
from medusa_apar.threads.control_tokens import DEFAULT_MAX_DEPTH
from medusa_apar.triton_kernels import reference
from medusa_apar.triton_kernels.reference import sample
from medusa_apar.verify.control_processor import ControlTokensLogitsProcessor
from medusa_apar.verify.recipe import choices_of
from tests.support.drafters import RecallHeads
from tests.support.models import CHILD, CONTROL, FORK, forking_model, tiny_model
from tests.support.oracles import assert_threads_are_plain
from tests.support.prompts import prompts
from tests.support.verifying import request_of, segment_of, verified_on_host

SAMPLING = {"max_new_tokens": 24, "do_sample": True, "seed": 7, "top_k": 0, "return_dict_in_generate": True}
LENIENT = TypicalAcceptance(0.05, 0.3)
IMPOSSIBLE = TypicalAcceptance(1.0, 1e9)  # no probability is above 1
ANYTHING = TypicalAcceptance(0.0, 0.0)


def run(model, heads=None, acceptance="exact", **options):
    attached = medusa_apar.attach(model, heads, CONTROL, acceptance=acceptance, budget=24, runtime="torch")
    return attached.generate(**prompts(2, 6, seed=2, ragged=True), **(SAMPLING | options))


@st.composite
def drafts(draw):
    """A draft tree whose tokens are often likely, and logits [nodes + 1, vocab] of the root and its nodes."""
    tree = DraftTree.likeliest(draw(st.integers(1, 14)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    logits = draw(st.sampled_from([0.3, 1.0, 3.0])) * torch.randn(len(tree) + 1, 20, generator=generator)
    tokens = []
    for parent, rank in zip(tree.parents.tolist(), tree.ranks.tolist(), strict=True):
        tokens.append(int(logits[parent + 1].argsort(descending=True)[rank]))
    return tree, tokens, logits


@settings(deadline=None, max_examples=60)
@given(drafts(), st.sampled_from([(0.09, 0.3), (0.3, 1.0), (0.02, 0.1)]), st.sampled_from([0.5, 1.0, 1.4]))
def test_accepts_what_medusa_llm_accepts(drawn, thresholds, temperature):
    evaluate_posterior = pytest.importorskip("medusa.model.utils").evaluate_posterior
    tree, tokens, logits = drawn
    # medusa-llm adds 1e-5 inside the entropy's logarithm: leave out what lies between the two thresholds.
    chances = (logits / temperature).softmax(-1)
    for node, parent in enumerate(tree.parents.tolist()):
        row, chance = chances[parent + 1], chances[parent + 1, tokens[node]]
        limits = [thresholds[1] * (row * (row + extra).log()).sum().exp() for extra in (0, 1e-5)]
        both = [chance > min(thresholds[0], limit * (1 + hair)) for limit in limits for hair in (-1e-5, 1e-5)]
        assume(all(both) or not any(both))
    paths = [[0]] + [[0] + [n + 1 for n in range(len(tree)) if tree.ancestors[node][n]] for node in range(len(tree))]
    longest = max(map(len, paths))
    ids = [3, *tokens]
    # Padding must not count as a guess: behind a path comes a row that makes its token impossible.
    rows = torch.cat([logits, torch.full((1, 20), -1e9)])
    rows[-1, 1] = 0.0
    candidates = torch.tensor([[ids[n] for n in path] + [0] * (longest - len(path)) for path in paths])
    padded = torch.stack([rows[path + [-1] * (longest - len(path))] for path in paths])
    for row, path in enumerate(paths):
        padded[row, len(path) - 1] = rows[-1]
    best, length = evaluate_posterior(padded, candidates, temperature, *thresholds)
    expected = paths[int(best)][1 : int(length) + 1]

    typical = TypicalAcceptance(*thresholds)
    request = request_of([1, 2, 3], 5, seed=9, typical=typical, processors=[TemperatureLogitsWarper(temperature)])
    (result,) = verified_on_host([segment_of(request, None, tree, tokens)], logits)
    assert [node + 1 for node in result.nodes] == expected
    assert result.tokens[:-1] == [ids[row] for row in expected]
    assert result.row == (expected[-1] if expected else 0)
    assert result.tokens[-1] == sample(logits[result.row] / temperature, 9, 5, 3 + len(expected))


PROCESSORS = {
    "none": [],
    "hot": [TemperatureLogitsWarper(1.7)],
    "cold": [TemperatureLogitsWarper(0.6), TopKLogitsWarper(9)],
    "few": [TopPLogitsWarper(0.8)],
    "penalised": [RepetitionPenaltyLogitsProcessor(1.4), PresenceFrequencyLogitsProcessor(3, 0.4, 0.2)],
}


@settings(deadline=None, max_examples=150)
@given(drafts(), st.sampled_from([(0.09, 0.3), (0.3, 1.0), (0.02, 0.1), (0.0, 0.0)]), st.sampled_from(list(PROCESSORS)))
def test_compiled_code_accepts_what_the_reference_does(drawn, thresholds, name):
    """Left out is what a change of both thresholds by 1e-5 of theirs would change."""
    tree, tokens, logits = drawn

    def result(change=1.0, chooser=None):
        typical = TypicalAcceptance(*(value * change for value in thresholds))
        request = request_of([1, 2, 3], 5, seed=9, typical=typical, processors=PROCESSORS[name])
        assert request.sampler.recipe.judged
        (its,) = verified_on_host([segment_of(request, None, tree, tokens)], logits, chooser)
        return its.tokens, its.nodes, its.row

    expected = result()
    assume(expected == result(1 - 1e-5) == result(1 + 1e-5))
    assert result(chooser=CompiledChooser()) == expected


@pytest.mark.parametrize("width", [7, 300, 49152])
@pytest.mark.parametrize("name", PROCESSORS)
def test_what_compiled_code_says_of_drafts_is_float64s(name, width):
    """Log-probabilities and entropies of processed scores, to 1e-6; a token that was dropped is impossible."""
    generator = torch.Generator().manual_seed(width)
    logits = 3 * torch.randn(5, width, generator=generator)
    tokens = torch.randint(width, (4,), generator=generator).tolist()
    tokens[1] = int(logits[0].argmax())
    request = request_of([1, 2, 3], 5, seed=9, typical=LENIENT, processors=PROCESSORS[name])
    segment = segment_of(request, None, DraftTree([(0,), (1,), (0, 0), (0, 0, 0)]), tokens)
    choices = choices_of([(0, segment)], {0: [False] * 5}, {})
    chosen = CompiledChooser().choose(logits, choices)
    paths = {0: [1, 2, 3], 1: [1, 2, 3, tokens[0]], 3: [1, 2, 3, tokens[0], tokens[2]]}
    for row, parent in ((1, 0), (2, 0), (3, 1), (4, 3)):
        scores = request.sampler.processed(paths[parent], logits[parent].clone(), request, []).double()
        log_probs = scores.log_softmax(-1)
        chances = log_probs.exp()
        assert chosen.log_probs[row] == pytest.approx(float(log_probs[tokens[row - 1]]), abs=1e-6)
        entropy = -float(torch.special.xlogy(chances, chances).sum())
        assert chosen.entropies[parent] == pytest.approx(entropy, abs=1e-6)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), float("-inf")])
def test_compiled_code_accepts_nothing_behind_a_row_without_numbers(value):
    """Nor does the reference; what such a row chooses is another matter."""
    logits = torch.zeros(2, 20)
    logits[0, :2] = value
    if value != float("inf"):
        logits[0] = value
    for chooser in (None, CompiledChooser()):
        request = request_of([1, 2, 3], 5, seed=9, typical=ANYTHING)
        segment = segment_of(request, None, DraftTree([(0,)]), [1])
        if value == float("inf"):
            assert verified_on_host([segment], logits, chooser)[0].nodes == []
        else:
            with pytest.raises(ValueError, match="the model left no token"):
                verified_on_host([segment], logits, chooser)


@pytest.mark.parametrize("warp", [{}, {"temperature": 0.7, "top_p": 0.9}, {"repetition_penalty": 1.3}], ids=str)
def test_accepted_tokens_satisfy_the_criterion(monkeypatch, warp):
    results = []

    def spy(segment, result, *others):
        tree, thread = segment.request.tree, segment.thread
        results.append((tree, thread.depth, thread.ancestor_ids() + thread.tokens, result))
        return commit(segment, result, *others)

    model = forking_model(24)
    heads = RecallHeads(model, run(model, **warp).paragraph_tree, wrong_every=3)
    monkeypatch.setattr("medusa_apar.engine.engine.commit", spy)
    out = run(model, heads, LENIENT, **warp)
    assert out.stats.forks > 0 and out.stats.final_slots == 0
    checked = 0
    for tree, depth, path, result in results:
        start, path = len(path), path + result.tokens
        for place in range(start, len(path)):
            assert path[place] != CHILD
            assert path[place] != FORK or (path[place - 1] not in (FORK, CHILD) and depth < DEFAULT_MAX_DEPTH)
        for place in range(start, len(path) - 1):
            scores = processed(model, tree, depth, path[:place], warp)
            chances = scores.double().softmax(-1)
            entropy = -torch.special.xlogy(chances, chances).sum()
            assert chances[path[place]] > min(LENIENT.epsilon, LENIENT.delta * (-entropy).exp()) * (1 - 1e-3)
            checked += 1
    assert checked > 20


def processed(model, tree, depth, path, warp):
    """A path's scores under the fork rule and the processors of `warp`, as transformers has them, [vocab]."""
    with torch.no_grad():
        scores = model(torch.tensor([path])).logits[:, -1]
    rule = ControlTokensLogitsProcessor(CONTROL, tree.trunk.num_forced)
    ids = torch.tensor([path])
    scores = rule(ids, scores)
    if penalty := warp.get("repetition_penalty"):
        # The padding a processor is shown penalises only id 0, which no draft of these guesses.
        scores = RepetitionPenaltyLogitsProcessor(penalty)(ids, scores)
    if temperature := warp.get("temperature"):
        scores = scores / temperature
    if top_p := warp.get("top_p"):
        scores = TopPLogitsWarper(top_p)(ids, scores)
    return scores[0]


@pytest.mark.parametrize("warp", [{}, {"temperature": 0.7, "top_k": 12}], ids=str)
def test_one_launch_and_row_by_row_accept_the_same(warp):
    """`DeviceVerify` with the kernel's reference, as on a device, against verification on the host."""
    model = forking_model(24)
    remembered = run(model, **warp).paragraph_tree
    outs = []
    for launched in (False, True):
        # What is drafted shows, so both must draft alike: all of a small tree, by heads that count no calls.
        heads = RecallHeads(model, remembered, wrong_every=10**9)
        options = {"acceptance": LENIENT, "draft_tree": DraftTree.likeliest(8), "budget": 400, "runtime": "torch"}
        apar = medusa_apar.attach(model, heads, CONTROL, **options)
        apar.runtime.verify = reference.verify if launched else None
        outs.append(apar.generate(**prompts(2, 6, seed=2, ragged=True), **(SAMPLING | warp)))
    rowwise, launched = outs
    assert torch.equal(launched.sequences, rowwise.sequences)
    assert launched.stats.accepted_lengths == rowwise.stats.accepted_lengths
    assert max(rowwise.stats.accepted_lengths) > 1


def test_it_accepts_more_than_exact_sampling_does():
    model = tiny_model(seed=24, scale=2.0, eos=-50.0)  # not too sure of itself
    gained = {}
    for acceptance in ("exact", LENIENT, ANYTHING):
        lengths = run(model, MedusaHeads.random(model), acceptance).stats.accepted_lengths
        gained[acceptance] = sum(length * count for length, count in lengths.items()) / lengths.total()
    assert 1.5 * gained["exact"] < gained[LENIENT] <= gained[ANYTHING]


def test_thresholds_that_nothing_meets_and_no_drafts_are_exact_sampling():
    model = forking_model(24)
    exact = run(model)
    assert torch.equal(run(model, acceptance=ANYTHING).sequences, exact.sequences)
    for heads in (MedusaHeads.random(model), RecallHeads(model, exact.paragraph_tree)):
        out = run(model, heads, IMPOSSIBLE)
        assert torch.equal(out.sequences, exact.sequences)
        assert set(out.stats.accepted_lengths) == {1}


def test_thresholds_of_zero_accept_the_whole_tree_but_what_is_banned():
    model = forking_model(24)
    out = run(model, MedusaHeads.random(model, num_heads=3), ANYTHING, fork=False)
    assert max(out.stats.accepted_lengths) >= 4 and out.stats.forks == 0
    assert not {FORK, CHILD} & set(out.sequences[:, 6:].flatten().tolist())


def test_greedy_stays_exact():
    model = forking_model(24)
    plain = run(model, do_sample=False, seed=None)
    for heads in (MedusaHeads.random(model), RecallHeads(model, plain.paragraph_tree)):
        out = run(model, heads, ANYTHING, do_sample=False, seed=None)
        assert torch.equal(out.sequences, plain.sequences)
        assert_threads_are_plain(model, out.paragraph_tree)


def test_scores_and_logits_are_kept_for_every_token():
    model = forking_model(24)
    options = {"output_scores": True, "output_logits": True, "temperature": 0.5, "fork": False}
    out = run(model, MedusaHeads.random(model), LENIENT, **options)
    assert max(out.stats.accepted_lengths) > 1
    width = out.sequences.shape[1] - 6
    assert len(out.scores) == len(out.logits) == width
    for row in range(2):
        path = out.sequences[row, 2 * row :]  # prompts are padded by that many
        with torch.no_grad():
            logits = model(path[None]).logits[0, 5 - 2 * row : -1]
        for column in range(len(out.paragraph_tree[row].trunk.token_ids)):
            if column < width:
                torch.testing.assert_close(out.logits[column][row], logits[column], atol=1e-3, rtol=1e-3)
                kept = out.scores[column][row].isfinite()
                torch.testing.assert_close(
                    out.scores[column][row][kept], logits[column][kept] / 0.5, atol=1e-3, rtol=1e-3
                )


@pytest.mark.parametrize(
    ("acceptance", "sentence"),
    [
        ("lenient", "'lenient' is not 'exact', 'typical' or a TypicalAcceptance"),
        (None, "None is not"),
        ((0.09, 0.3), "is not"),
        (TypicalAcceptance(-0.1, 0.3), "0 or more"),
        (TypicalAcceptance(0.1, float("nan")), "0 or more"),
        (TypicalAcceptance("0.1"), "0 or more"),
    ],
    ids=str,
)
def test_what_is_no_acceptance_is_refused(acceptance, sentence):
    with pytest.raises(ValueError, match=sentence) as raised:
        medusa_apar.attach(forking_model(1), acceptance=acceptance)
    assert "\n" not in str(raised.value)
