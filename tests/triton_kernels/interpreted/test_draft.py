"""The drafting kernels and their torch references against float64 and against each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_apar.triton_kernels import reference
from medusa_apar.triton_kernels.draft import medusa_draft
from medusa_apar.triton_kernels.residual_blocks import residual_blocks
from medusa_apar.triton_kernels.top_logits import top_logits

few = settings(deadline=None, max_examples=5)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
SEEDS = st.integers(0, 2**32)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """What a kernel leaves unwritten is NaN or far outside of any vocabulary."""
    empty = torch.empty

    def poisoned(*shape, **options):
        tensor = empty(*shape, **options)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    monkeypatch.setattr(torch, "empty", poisoned)


def normal(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def one_ulp(x):
    """The next greater magnitude less x: what rounding to x's dtype may cost, towards zero even."""
    return (torch.finfo(x.dtype).eps * x.double().abs()).clamp(min=torch.finfo(x.dtype).smallest_normal)


@few
@given(DTYPES, st.integers(1, 70), st.integers(1, 40), st.integers(1, 3), SEEDS)
def test_a_residual_block_is_float64s_rounded_once(dtype, rows, hidden, heads, seed):
    x = normal(seed, rows, hidden, dtype=dtype)
    weight, bias = (
        normal(seed + 1, heads, hidden, hidden, dtype=dtype) / hidden,
        normal(seed + 2, heads, hidden, dtype=dtype),
    )
    out = residual_blocks(x, [weight], [bias])
    assert out.dtype == dtype and out.shape == (heads, rows, hidden)
    y = torch.baddbmm(bias.double()[:, None], x.double().expand(heads, -1, -1), weight.double().mT)
    exact = x.double() + torch.nn.functional.silu(y)
    # The interpreter truncates to bfloat16, a GPU rounds.
    rounding = 0 if dtype == torch.float32 else one_ulp(out)
    assert ((out.double() - exact).abs() <= 1e-5 + rounding).all()


@few
@given(st.integers(1, 20), st.integers(0, 3), SEEDS)
def test_residual_blocks_follow_one_another(rows, layers, seed):
    hidden, heads = 24, 2
    x = normal(seed, rows, hidden)
    weights = [normal(seed + n, heads, hidden, hidden) / hidden for n in range(layers + 1)]
    biases = [normal(seed - n, heads, hidden) for n in range(layers + 1)]
    out, expected = residual_blocks(x, weights, biases), reference.residual_blocks(x, weights, biases)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def assert_tops(out, logits, k):
    """The values are the greatest logits to 1e-5, each index has its value, none is there twice."""
    values, indices, sums = out
    logits = logits.double()
    best = logits.sort(dim=-1, descending=True).values[..., :k]
    assert values.dtype == sums.dtype == torch.float32 and indices.dtype == torch.int32
    torch.testing.assert_close(values.double(), best, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits.gather(-1, indices.long()), best, rtol=0, atol=1e-5)
    torch.testing.assert_close(sums.double(), logits.logsumexp(-1), rtol=0, atol=1e-5)
    assert all(len(set(row)) == k for row in indices.view(-1, k).tolist())


@few
@given(st.data(), DTYPES, st.integers(1, 70), st.integers(1, 40), st.integers(1, 300), SEEDS)
def test_top_logits(data, dtype, rows, hidden, vocab, seed):
    k = data.draw(st.integers(1, min(16, vocab)))
    states = normal(seed, rows, hidden, dtype=dtype) / hidden**0.5
    unembedding = normal(seed + 1, vocab, hidden, dtype=dtype)
    bias = data.draw(st.none() | st.just(normal(seed + 2, vocab, dtype=dtype)))
    scale, softcap = data.draw(st.sampled_from([1.0, 0.25])), data.draw(st.sampled_from([None, 3.0]))
    logits = states.double() @ unembedding.double().mT + (0 if bias is None else bias.double())
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    assert_tops(top_logits(states, unembedding, bias, k, scale, softcap), logits, k)
    assert_tops(reference.top_logits(states, unembedding, bias, k, scale, softcap), logits, k)


@few
@given(st.data(), st.integers(1, 40), st.integers(1, 200), SEEDS)
def test_of_equals_the_lowest_index_comes_first(data, rows, vocab, seed):
    """Small whole numbers: every product is exact, and most logits have equals."""
    k = data.draw(st.integers(1, min(16, vocab)))
    generator = torch.Generator().manual_seed(seed)
    states = torch.randint(-1, 2, (2, rows, 8), generator=generator).float()
    unembedding = torch.randint(-1, 2, (2, vocab, 8), generator=generator).float()
    bias = torch.zeros(2, vocab)
    bias[0, : data.draw(st.integers(0, vocab))] = -torch.inf
    values, indices, _ = top_logits(states, unembedding, bias, k)
    expected = reference.top_logits(states, unembedding, bias, k)
    assert torch.equal(values, expected[0]) and torch.equal(indices, expected[1])


def test_more_partial_results_than_are_merged_at_once(monkeypatch):
    monkeypatch.setattr("medusa_apar.triton_kernels.top_logits._MERGED", 32)
    states, unembedding = normal(1, 3, 8), normal(2, 1500, 8)
    assert_tops(top_logits(states, unembedding, None, 5), states.double() @ unembedding.double().mT, 5)


def test_nan_never_wins_and_does_not_hide_the_rest():
    states, unembedding = normal(1, 2, 8), normal(2, 140, 8)
    unembedding[130] = torch.nan
    found = top_logits(states, unembedding, None, 3)
    logits = states @ unembedding.mT
    logits[:, 130] = -torch.inf
    assert torch.equal(found[1].long(), logits.topk(3).indices)
    torch.testing.assert_close(found[2], logits.logsumexp(-1))
    for ours, theirs in zip(found, reference.top_logits(states, unembedding, None, 3), strict=True):
        torch.testing.assert_close(ours, theirs)


@few
@given(st.data(), st.integers(1, 20), st.integers(1, 3), st.booleans(), st.booleans(), SEEDS)
def test_medusa_draft(data, threads, heads, own, mapped, seed):
    hidden, vocab = 20, 150
    layers = data.draw(st.integers(0 if own else 1, 2))
    k = data.draw(st.integers(1, 5))
    x = normal(seed, threads, hidden)
    weights = [normal(seed + 1 + n, heads, hidden, hidden) / hidden for n in range(layers)]
    biases = [normal(seed + 11 + n, heads, hidden) for n in range(layers)]
    unembedding = normal(seed + 21, *((heads,) if own else ()), vocab, hidden)
    token_map = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))[:vocab] if mapped else None
    tokens, log_probs = medusa_draft(x, weights, biases, unembedding, None, token_map, k)
    expected, chances = reference.medusa_draft(x, weights, biases, unembedding, None, token_map, k)
    assert tokens.shape == log_probs.shape == (threads, heads, k) and tokens.dtype == torch.int32
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(log_probs, chances, rtol=0, atol=1e-5)


def test_the_order_of_programs_does_not_show(shuffled_programs):
    x, weight, bias, unembedding = normal(1, 40, 24), normal(2, 2, 24, 24), normal(3, 2, 24), normal(4, 300, 24)
    plain = medusa_draft(x, [weight], [bias], unembedding, k=4)
    shuffled_programs(5)
    for ours, theirs in zip(medusa_draft(x, [weight], [bias], unembedding, k=4), plain, strict=True):
        assert torch.equal(ours, theirs)


def test_a_row_does_not_depend_on_its_neighbours():
    """Within a row of the tile table: another tile sums in another order."""
    states, unembedding = normal(1, 16, 40), normal(2, 200, 40)
    together = top_logits(states, unembedding, None, 4)
    alone = top_logits(states[3:4].contiguous(), unembedding, None, 4)
    for ours, theirs in zip(alone, together, strict=True):
        assert torch.equal(ours[0], theirs[3])


@pytest.mark.parametrize("wrong", [{"k": 0}, {"k": 17}, {"bias": torch.zeros(3)}, {"unembedding": torch.zeros(40, 7)}])
def test_what_does_not_fit_is_refused(wrong):
    arguments = {"states": torch.zeros(2, 8), "unembedding": torch.zeros(40, 8)} | wrong
    with pytest.raises(AssertionError):
        top_logits(**arguments)
