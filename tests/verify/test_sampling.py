"""Promise 2: the sample is a function of (seed, thread, position), and its distribution is the model's."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

import medusa_apar
from medusa_apar.heads import HydraHeads, MedusaHeads
from medusa_apar.triton_kernels.reference import gumbel_noise, philox, sample
from tests.support.drafters import RecallHeads
from tests.support.models import CONTROL, VOCAB, forking_model, tiny_model
from tests.support.prompts import prompts

OPTIONS = {"max_new_tokens": 20, "do_sample": True, "return_dict_in_generate": True}


@pytest.mark.parametrize(
    "warp", [{}, {"temperature": 0.7, "top_k": 12}, {"top_p": 0.8, "repetition_penalty": 1.2}], ids=str
)
def test_same_seed_same_tokens_with_heads_and_without(warp):
    model = forking_model(24)
    inputs = prompts(2, 6, ragged=True)
    plain = medusa_apar.attach(model, None, CONTROL).generate(**inputs, seed=11, **OPTIONS, **warp)
    assert plain.stats.forks > 0
    for heads in (MedusaHeads.random(model), HydraHeads.random(model), RecallHeads(model, plain.paragraph_tree)):
        for options in ({}, {"budget": 60}, {"max_threads": 1}):
            apar = medusa_apar.attach(model, heads, CONTROL, **options)
            out = apar.generate(**inputs, seed=11, **OPTIONS, **warp)
            assert torch.equal(out.sequences, plain.sequences), (options, warp)
    assert max(out.stats.accepted_lengths) > 1
    other = medusa_apar.attach(model, None, CONTROL).generate(**inputs, seed=12, **OPTIONS, **warp)
    assert other.sequences.tolist() != plain.sequences.tolist()


def test_memory_pressure_never_shows_in_a_sample(monkeypatch):
    """Rows wait for each other, and their threads are preempted."""
    monkeypatch.setattr("medusa_apar.engine.admission.check_fits", lambda *args: None)
    model = forking_model(24)
    inputs, options = prompts(3, 6, ragged=True), OPTIONS | {"max_new_tokens": 40, "seed": 11}
    plain = medusa_apar.attach(model, None, CONTROL).generate(**inputs, **options)
    for heads in (None, RecallHeads(model, plain.paragraph_tree)):
        out = medusa_apar.attach(model, heads, CONTROL, pool_slots=48).generate(**inputs, **options)
        assert torch.equal(out.sequences, plain.sequences)
        assert out.stats.peak_slots <= 48 < plain.stats.peak_slots and out.stats.final_slots == 0
        assert out.stats.thread_preemptions > 3 and out.stats.steps > 2 * plain.stats.steps


def test_torch_manual_seed_rules_where_no_seed_is_given():
    apar = medusa_apar.attach(tiny_model())
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        runs.append(apar.generate(**prompts(1, 6), **OPTIONS).sequences.tolist())
    assert runs[0] == runs[1] != runs[2]


def test_a_row_samples_alike_alone_and_in_a_batch():
    apar = medusa_apar.attach(tiny_model(eos=-50.0))
    inputs = prompts(3, 6)
    batch = apar.generate(**inputs, seed=3, **OPTIONS).sequences
    for row in range(3):
        alone = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        assert torch.equal(apar.generate(**alone, seed=3, **OPTIONS).sequences[0], batch[row])


def test_return_sequences_differ():
    apar = medusa_apar.attach(tiny_model(eos=-50.0))
    out = apar.generate(**prompts(1, 6), seed=3, num_return_sequences=4, **OPTIONS).sequences
    assert out.shape[0] == 4 and len({tuple(row) for row in out.tolist()}) == 4


def chi_squared(counts: torch.Tensor, probabilities: torch.Tensor) -> tuple[float, int]:
    """Statistic and degrees of freedom; cells expecting fewer than 5 are pooled."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = expected > 0
    return float(((observed - expected)[keep] ** 2 / expected[keep]).sum()), int(keep.sum()) - 1


def assert_fits(counts: torch.Tensor, probabilities: torch.Tensor) -> None:
    statistic, freedom = chi_squared(counts, probabilities)
    # Five standard deviations above the mean of chi-squared: seeds are fixed, so this is no coin toss.
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5, (statistic, freedom)


def test_first_and_second_tokens_have_the_models_frequencies():
    model = tiny_model(seed=3, scale=4.0, eos=-50.0)
    inputs = prompts(1, 4)
    reference = medusa_apar.attach(model).generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    apar = medusa_apar.attach(model, RecallHeads(model, reference.paragraph_tree))
    rows = 2000
    repeated = {name: tensor.repeat(200, 1) for name, tensor in inputs.items()}
    drawn = torch.cat(
        [
            apar.generate(**repeated, do_sample=True, max_new_tokens=2, top_k=0, temperature=0.3, seed=seed)[:, 4:]
            for seed in range(rows // 200)
        ]
    )
    with torch.no_grad():
        first = model(inputs["input_ids"]).logits[0, -1].double().div(0.3).softmax(-1)
        assert_fits(torch.bincount(drawn[:, 0], minlength=VOCAB).double(), first)
        token = int(torch.bincount(drawn[:, 0]).argmax())
        after = torch.cat([inputs["input_ids"], torch.tensor([[token]])], dim=1)
        second = model(after).logits[0, -1].double().div(0.3).softmax(-1)
    assert_fits(torch.bincount(drawn[drawn[:, 0] == token, 1], minlength=VOCAB).double(), second)


def test_the_chi_squared_test_catches_a_biased_rule():
    scores = torch.linspace(-2, 2, 12).double()
    fair, biased = torch.zeros(12).double(), torch.zeros(12).double()
    for position in range(1500):
        fair[sample(scores, 1, 2, position)] += 1
        # Noise a quarter too small is what a wrong temperature does.
        biased[int((scores + 0.75 * gumbel_noise(1, 2, position, 12)).argmax())] += 1
    assert_fits(fair, scores.softmax(0))
    with pytest.raises(AssertionError):
        assert_fits(biased, scores.softmax(0))


def test_philox_known_answers():
    """Random123's own vectors for philox4x32-10 (kat_vectors)."""
    assert philox(0, 0, 0, 4).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    words = philox(2**64 - 1, 2**64 - 1, 2**32 - 1, 4)
    assert words.tolist() != philox(0, 0, 0, 4).tolist() and (words >= 0).all() and (words < 2**32).all()


def test_noise_is_counter_based_and_independent():
    noise = torch.stack([gumbel_noise(9, thread, position, 64) for thread in (0, 1) for position in range(40)])
    assert torch.equal(noise[0], gumbel_noise(9, 0, 0, 64)) and torch.isfinite(noise).all()
    assert abs(float(noise.mean()) - 0.5772) < 0.06 and abs(float(noise.std()) - 1.2825) < 0.06
    correlation = torch.corrcoef(noise)
    assert float((correlation - torch.eye(len(noise))).abs().max()) < 0.6


def test_warpers_are_shown_one_row_however_large_the_batch(monkeypatch):
    """A batch of 32 once sorted 32 x 32 rows of logits a step: three quarters of the time went there."""
    shown = []
    warp = TopPLogitsWarper.__call__
    monkeypatch.setattr(
        TopPLogitsWarper, "__call__", lambda self, ids, scores: shown.append(scores.shape[0]) or warp(self, ids, scores)
    )
    apar = medusa_apar.attach(tiny_model(eos=-50.0))
    apar.generate(**prompts(4, 6), seed=3, top_p=0.8, top_k=0, **OPTIONS)
    assert shown == [1] * (4 * 20)


def test_processors_of_unknown_kinds_are_shown_the_whole_batch():
    """They may hold something per row, and are asked for the row in question only."""
    bias = torch.eye(VOCAB)[[20, 30, 40]] * 100.0

    class PerRow(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores + bias

    options = {"logits_processor": LogitsProcessorList([PerRow()]), "max_new_tokens": 3, "do_sample": True, "seed": 1}
    out = medusa_apar.attach(tiny_model(eos=-50.0)).generate(**prompts(3, 6), top_p=0.9, **options)
    assert out[:, 6:].tolist() == [[20] * 3, [30] * 3, [40] * 3]
