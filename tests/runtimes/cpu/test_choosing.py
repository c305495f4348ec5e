"""Tokens chosen in compiled code against transformers' processors and the torch reference of the noise."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_apar.runtimes.cpu.choosing import CompiledChooser
from medusa_apar.runtimes.cpu.weights import argmax
from medusa_apar.threads.control_tokens import ControlTokens
from medusa_apar.threads.fork_rule import ForkRule
from medusa_apar.triton_kernels.reference import likeliest, noisy
from medusa_apar.verify import logprobs
from medusa_apar.verify.min_tokens import MinTokensLogitsProcessor
from medusa_apar.verify.penalties import PresenceFrequencyLogitsProcessor
from medusa_apar.verify.recipe import Choices, Operation, recipe_of

FORK, CHILD = 3, 4
CONTROL = ControlTokens(FORK, CHILD)
RULE = ForkRule(FORK, CHILD, 2, True)
EOS = [0, 7]
choose, top = CompiledChooser().choose, CompiledChooser().top


@st.composite
def before(draw):
    """Processors that come before the bans; the prompt has five tokens."""
    made = [
        transformers.RepetitionPenaltyLogitsProcessor(draw(st.sampled_from([0.7, 1.3, 4.0]))),
        transformers.RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=draw(st.integers(0, 9))),
        PresenceFrequencyLogitsProcessor(
            *(draw(st.integers(0, 9)), draw(st.sampled_from([0.0, 1.3, -2.0]))),
            *(draw(st.sampled_from([0.0, 0.3, -0.1])), draw(st.sampled_from([(), (2, 5, 999)]))),
        ),
        transformers.SequenceBiasLogitsProcessor({(5,): -3.0, (2,): 4.5, (0,): 1.25}),
        transformers.MinLengthLogitsProcessor(draw(st.integers(0, 9)), EOS),
        transformers.MinNewTokensLengthLogitsProcessor(5, draw(st.integers(0, 4)), EOS),
        transformers.SuppressTokensLogitsProcessor([1, 6]),
        MinTokensLogitsProcessor(5, draw(st.integers(0, 5)), (0, 7), CONTROL),
        MinTokensLogitsProcessor(5, draw(st.integers(0, 5)), (1, 2), CONTROL, in_children=True),
    ]
    return [processor for processor in made if draw(st.booleans())]


@st.composite
def warpers(draw):
    keep = draw(st.integers(1, 3))
    made = [
        transformers.TemperatureLogitsWarper(draw(st.sampled_from([0.1, 0.7, 1.3, 5.0]))),
        transformers.TopKLogitsWarper(draw(st.sampled_from([1, 2, 5, 50, 200])), min_tokens_to_keep=keep),
        transformers.TopPLogitsWarper(draw(st.sampled_from([0.05, 0.5, 0.9, 0.999])), min_tokens_to_keep=keep),
        transformers.MinPLogitsWarper(draw(st.sampled_from([0.01, 0.2, 1.0]))),
        transformers.TypicalLogitsWarper(draw(st.sampled_from([0.2, 0.9])), min_tokens_to_keep=keep),
    ]
    return [processor for processor in made if draw(st.booleans())]


def scores_of(processors, num_before, path, logits, fork_banned, allowed=None):
    """float32 [vocab], by transformers; allowed: bool [vocab], of a grammar."""
    scores, ids = logits[None].clone(), torch.tensor([path])
    if allowed is not None:
        scores[0, ~allowed] = -math.inf
    for processor in [*processors[:num_before], None, *processors[num_before:]]:
        if processor is not None:
            scores = processor(ids, scores)
        else:
            scores = scores.clone()
            scores[0, [FORK, CHILD] if fork_banned else [CHILD]] = -math.inf
    return scores[0]


def row(place, path, recipe=0, parent=-1, token=0, start=0, length=None, key=9, position=4, fork_banned=0, **others):
    length, others = len(path) if length is None else length, {"held": 0, "mask": -1} | others
    return [place, recipe, parent, token, start, length, key, position, fork_banned, others["held"], others["mask"]]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_tokens_are_those_of_transformers_processors(data):
    draw = data.draw
    width, seed = draw(st.sampled_from([9, 33, 64, 300, 5003])), draw(st.integers(0, 10**6))
    first, last = draw(before()), draw(warpers())
    if width == 5003:  # where so many are nearly alike, the order of a float32 sum settles which is dropped
        last = [warper for warper in last if not isinstance(warper, transformers.TypicalLogitsWarper)]
    sampled = draw(st.one_of(st.none(), st.sampled_from([0, 5, 2**64 - 1])))
    recipe = recipe_of([*first, *last], len(first), RULE, sampled)
    assert recipe is not None
    logits = torch.randn(4, width, generator=torch.Generator().manual_seed(seed)) * draw(st.sampled_from([0.1, 2, 9]))
    if draw(st.booleans()):
        logits[torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed)) < 0.3] = -math.inf
    # A root, a child and a grandchild of it behind one path, and a row by itself.
    path, other = draw(st.lists(st.integers(0, 8), min_size=5, max_size=12)), [1, 2, 3, 4, 5, 6]
    keys, positions = draw(st.lists(st.integers(0, 2**63 - 1), min_size=4, max_size=4)), [7, 8, 9, 2**31]
    tokens = draw(st.lists(st.integers(0, 8), min_size=2, max_size=2))
    banned = draw(st.lists(st.integers(0, 1), min_size=4, max_size=4))
    paths = [path, [*path, tokens[0]], [*path, *tokens], other]
    held_back = [processor for processor in first if isinstance(processor, MinTokensLogitsProcessor)]
    held = [sum(its.held(behind)[0] << bit for bit, its in enumerate(held_back)) for behind in paths]
    # A grammar allows very little or very much.
    shares = draw(st.lists(st.sampled_from([0.02, 0.5, 0.99]), min_size=4, max_size=4))
    allowed = np.random.default_rng(seed).random((4, -(-width // 32) * 32)) < np.array(shares)[:, None]
    masks, masked = np.packbits(allowed, axis=1, bitorder="little").view(np.int32), [-1] * 4
    if draw(st.booleans()):
        masked = draw(st.lists(st.sampled_from([-1, 0, 1, 2, 3]), min_size=4, max_size=4))
        operations = list(recipe.operations)
        operations.insert(draw(st.integers(0, len(first))), Operation("mask"))
        recipe = replace(recipe, operations=tuple(operations))
    named = {"key": keys, "position": positions, "fork_banned": banned, "held": held, "mask": masked}
    own = [{name: values[i] for name, values in named.items()} for i in range(4)]
    rows = [
        row(2, path, **own[0]),
        row(0, path, parent=0, token=tokens[0], **own[1]),
        row(3, path, parent=1, token=tokens[1], **own[2]),
        row(1, other, start=len(path), **own[3]),
    ]
    chosen = choose(logits, Choices([recipe], np.array(rows), np.array([*path, *other]), masks)).tokens
    for i, token in enumerate(chosen):
        its = None if masked[i] < 0 else torch.from_numpy(allowed[masked[i], :width])
        scores = scores_of([*first, *last], len(first), paths[i], logits[rows[i][0]], banned[i], its)
        final = scores if sampled is None else noisy(scores, sampled, keys[i], positions[i])
        assert token == likeliest(final), (first, last)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.sampled_from([0.05, 1.0, 30.0]), st.sampled_from([31, 32, 77, 49152]))
def test_pure_noise_is_the_references(seed, scale, width):
    logits = torch.randn(2, width, generator=torch.Generator().manual_seed(seed)) * scale
    recipe = recipe_of([], 0, None, seed)
    rows = [row(i, [], key=seed * 77, position=seed + i) for i in range(2)]
    chosen = choose(logits, Choices([recipe], np.array(rows), np.zeros(0, dtype=np.int64))).tokens
    assert chosen == [likeliest(noisy(logits[i], seed, seed * 77, seed + i)) for i in range(2)]


def test_samples_follow_the_distribution():
    """Top-p and temperature over 20,000 draws, against their own probabilities."""
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(3)).repeat(20_000, 1)
    processors = [transformers.TemperatureLogitsWarper(0.8), transformers.TopPLogitsWarper(0.9)]
    recipe = recipe_of(processors, 0, None, 11)
    rows = np.array([row(i, [], position=i) for i in range(len(logits))])
    chosen = choose(logits, Choices([recipe], rows, np.zeros(0, dtype=np.int64))).tokens
    expected = logits[:1]
    for processor in processors:
        expected = processor(None, expected)
    share = np.bincount(chosen, minlength=40) / len(chosen)
    assert np.abs(share - expected.softmax(-1)[0].numpy()).max() < 0.012


def test_what_is_impossible_is_said_and_nan_is_nothing():
    logits = torch.full((3, 64), -math.inf)
    logits[1], logits[2] = math.nan, math.nan
    logits[2, 40] = -1e30
    for seed in (None, 4):
        for processors in ([], [transformers.TopPLogitsWarper(0.5)], [transformers.TopKLogitsWarper(3)]):
            recipe = recipe_of(processors, 0, None, seed)
            rows = np.array([row(i, []) for i in range(3)])
            assert choose(logits, Choices([recipe], rows, np.zeros(0, dtype=np.int64))).tokens == [-1, -1, 40]


@pytest.mark.parametrize("seed", range(20))
def test_equals_of_the_last_that_stays_stay(seed):
    """With logits that are often equal, each warper leaves what transformers leaves: every token of it is drawn."""
    logits = (torch.randn(1, 12, generator=torch.Generator().manual_seed(seed)) * 2).round()
    for warper in (
        transformers.TopKLogitsWarper(3),
        transformers.MinPLogitsWarper(0.3),
        transformers.TypicalLogitsWarper(0.3),
        transformers.TypicalLogitsWarper(0.8),
    ):
        recipe = recipe_of([warper], 0, None, 5)
        rows = np.array([row(i, [], position=i) for i in range(600)])
        chosen = choose(logits.repeat(600, 1), Choices([recipe], rows, np.zeros(0, dtype=np.int64))).tokens
        left = warper(None, logits)[0]
        for place, token in enumerate(chosen):
            assert token == likeliest(noisy(left, 5, 9, place))


def test_numbers_beyond_compiled_codes_are_taken_as_the_largest():
    logits, nothing = torch.randn(1, 40), np.zeros(0, dtype=np.int64)
    for processor in (transformers.TopKLogitsWarper(2**31), transformers.TopKLogitsWarper(2**40)):
        recipe = recipe_of([processor], 0, None, None)
        assert choose(logits, Choices([recipe], np.array([row(0, [])]), nothing)).tokens == [int(logits.argmax())]
    best = int(logits.argmax())
    recipe = recipe_of([transformers.MinLengthLogitsProcessor(2**33, torch.tensor(best))], 1, None, None)
    assert choose(logits, Choices([recipe], np.array([row(0, [])]), nothing)).tokens != [best]


def test_what_compiled_code_does_not_know_has_no_recipe():
    class Own(transformers.TemperatureLogitsWarper):
        pass

    for processor in (
        Own(2.0),
        transformers.TopKLogitsWarper(4, filter_value=-5.0),
        transformers.SequenceBiasLogitsProcessor({(1, 2): 3.0}),
        transformers.NoBadWordsLogitsProcessor([[5]], eos_token_id=0),
        transformers.NoRepeatNGramLogitsProcessor(2),
        transformers.MinPLogitsWarper(0.5, min_tokens_to_keep=2),
    ):
        assert recipe_of([processor], 1, None, None) is None


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_top_is_a_sort_and_the_first_of_equals(data):
    draw = data.draw
    width, seed = draw(st.sampled_from([1, 7, 33, 300, 5003])), draw(st.integers(0, 999))
    count = min(draw(st.sampled_from([1, 2, 20, 128, 129, 5003])), width)
    logits = torch.randn(4, width, generator=torch.Generator().manual_seed(seed)) * 5
    if draw(st.booleans()):
        logits = logits.round()
    for value in draw(st.lists(st.sampled_from([math.nan, -math.inf]), max_size=2)):
        logits[torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.4] = value
    rows = np.array(draw(st.lists(st.integers(0, 3), min_size=1, max_size=6)))
    found = top(logits, rows, count)
    own = logits[torch.from_numpy(rows)].nan_to_num(nan=-math.inf, neginf=-math.inf)
    values, ids = own.sort(dim=-1, descending=True, stable=True)
    possible = values[:, :count] > -math.inf
    assert np.array_equal(found.values, values[:, :count])
    assert torch.equal(torch.from_numpy(found.ids)[possible], ids[:, :count][possible])
    assert found.log_sums == pytest.approx(own.double().logsumexp(-1).numpy(), abs=1e-6)
    assert np.array_equal(argmax(own), top(own, np.arange(len(own)), 1).ids[:, 0])
    likeliest_of = logprobs.top(logits, rows, count)
    assert np.array_equal(likeliest_of.values, found.values) and likeliest_of.log_sums == pytest.approx(found.log_sums)


@pytest.mark.parametrize("scale", [0.05, 3.0, 30.0])
def test_log_probabilities_are_torchs_over_a_whole_vocabulary(scale):
    """To 1e-5, and the same ids; whatever is banned in the rows later."""
    logits = torch.randn(3, 49152, generator=torch.Generator().manual_seed(1)) * scale
    expected, told = logits.log_softmax(-1), logprobs.RowLogprobs(logits, [2, 0], 20, top)
    kept = logits.clone()
    logits[:, FORK] = -math.inf
    for row in (0, 2):
        values, ids = kept[row].topk(20)
        for token in (int(ids[0]), 77, 40_000):
            its = told(row, token, 20)
            assert its.logprob == pytest.approx(float(expected[row, token]), abs=1e-5)
            assert [id for id, _ in its.top] == ids.tolist()
            assert [value for _, value in its.top] == pytest.approx(expected[row, ids].tolist(), abs=1e-5)
        assert told(row, 77, 0).top == () and len(told(row, 77, 3).top) == 3


def test_impossible_tokens_are_not_among_the_likeliest():
    logits = torch.full((1, 40), -math.inf)
    logits[0, [5, 9]], logits[0, 3] = torch.tensor([1.0, 2.0]), math.nan
    for way in (top, logprobs.top):
        told = logprobs.RowLogprobs(logits, [0], 6, way)(0, 9, 6)
        assert [id for id, _ in told.top] == [9, 5] and told.logprob == pytest.approx(-math.log1p(math.exp(-1)))
