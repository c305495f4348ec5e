"""Losses, held-out figures and the ridge start, against their definitions."""

import random

import pytest
import torch
from torch.nn import functional as F

from medusa_apar.heads import HydraHeads, MedusaHeads
from medusa_apar.heads.answers import AnswerFile, Answers, Encoder, Store, encode, greedy
from medusa_apar.heads.losses import WINDOW, evaluate, ridge_start, window_losses
from tests.support.answers import EOS, FORK, RECORD, VOCABULARY, a_model_that_counts, counting_answers, small_model


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def counting_model():
    return a_model_that_counts()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return counting_answers(tmp_path_factory.mktemp("data") / "answers.jsonl")


@pytest.mark.parametrize(("hard", "temperature"), [(0.0, 1.0), (0.3, 0.5)])
@pytest.mark.parametrize("kind", [MedusaHeads, HydraHeads])
@pytest.mark.parametrize("token_map", [None, torch.tensor([5, 6, 7, 9, 11, 13, FORK, EOS])])
def test_losses_equal_the_definition(model, token_map, kind, hard, temperature):
    answers = encode(model, AnswerFile([RECORD]), 0, [EOS])
    heads = kind(3, 1, 32, VOCABULARY, token_map=token_map).attach(model)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    losses, counts = window_losses(heads, answers, hard, temperature)
    ids = torch.arange(VOCABULARY) if token_map is None else token_map
    hidden = answers.hidden.float()
    for head in range(3):
        loss = count = 0
        for i in range(len(answers)):
            j = i + 1 + head
            if j >= len(answers) or answers.threads[i] != answers.threads[j]:
                continue
            target = (1 - hard) * (model.lm_head(hidden[j])[ids] / temperature).softmax(-1)
            target = target + hard * (ids == answers.next_ids[j])
            drafted = answers.ids[i + 1 : j + 1]  # the thread's own tokens between
            drafted = torch.cat([drafted, drafted.new_zeros(2 - head)])[None]
            logits = model.lm_head(heads.states(hidden[i : i + 1], drafted)[head, 0])[ids]
            loss, count = loss - (target * logits.log_softmax(-1)).sum(), count + 1
        torch.testing.assert_close(losses[head], loss)
        assert counts[head] == count


def test_only_the_heads_learn(model):
    answers = encode(model, AnswerFile([RECORD]), 0, [EOS])
    heads = MedusaHeads(2, 2, 32, VOCABULARY, token_map=torch.arange(20)).attach(model)
    window_losses(heads, answers)[0].sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in heads.parameters())


def test_accuracy_counts_the_bases_greedy_tokens(counting_model, data):
    file = AnswerFile.read(data)
    answers = Answers.join([encode(counting_model, file, 0, [EOS])])
    heads = MedusaHeads(1, 1, 32, VOCABULARY).attach(counting_model)
    chosen = greedy(counting_model, file, answers)
    hits = count = 0
    for i in range(len(answers) - 1):
        if answers.threads[i] == answers.threads[i + 1]:
            count += 1
            hits += int(heads.logits(answers.hidden[i : i + 1].float())[0, 0].argmax() == chosen[i + 1])
    assert evaluate(heads, answers, chosen)["top1"][0] == pytest.approx(hits / count)


@pytest.mark.parametrize("aux_layers", [(), (0, 1)])
@pytest.mark.parametrize("sequential", [True, False])
def test_ridge_start_is_the_regression_of_the_future_state(model, tmp_path, aux_layers, sequential):
    draw = random.Random(1)
    threads = [{"parent": -1, "fork_index": 0, "token_ids": [draw.randrange(40) for _ in range(30)]}]
    file = AnswerFile([{"prompt_ids": [1 + i % 30, 2], "threads": threads} for i in range(60)])
    store = Store(Encoder(model, file, [EOS], tmp_path, aux_layers).run(range(60)))
    heads = HydraHeads(2, 1, 32, VOCABULARY, None, aux_layers, sequential).attach(model)
    answers = store[:]
    assert ridge_start(heads, store, positions=10**6) == int(answers.same_thread(2).sum())
    states = heads.states(answers.hidden, answers.drafted(2))
    for head in range(2):
        valid = answers.same_thread(2)
        wanted = answers.hidden[1 + head :, :32].float()[: len(valid)][valid]
        error = (states[head][: len(valid)][valid] - wanted).square().mean()
        assert error < 0.8 * wanted.var(dim=0, unbiased=False).mean()
        read = torch.cat([answers.hidden.float(), torch.ones(len(answers), 1)], dim=1)[: len(valid)][valid]
        if not sequential:  # the normal equations hold, but for the ridge
            solved = torch.linalg.lstsq(read, wanted).solution
            assert error < 1.2 * (read @ solved - wanted).square().mean() + 1e-3


def test_loss_of_zero_heads_is_that_of_the_next_token_distribution(model):
    answers = encode(model, AnswerFile([RECORD]), 0, [EOS])
    heads = MedusaHeads(1, 1, 32, VOCABULARY).attach(model)
    logits = model.lm_head(answers.hidden.float())
    same = answers.threads[:-1] == answers.threads[1:]
    expected = F.cross_entropy(logits[:-1][same], logits[1:][same].softmax(-1), reduction="sum")
    torch.testing.assert_close(window_losses(heads, answers)[0][0], expected)


def test_every_held_out_position_counts_once(model):
    length = 2 * WINDOW + 3
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (length,), generator=draw)
    hidden = torch.randn(length, 32, generator=draw).half()
    none = torch.zeros(length, dtype=torch.long)
    answers = Answers(hidden, ids, ids.roll(-1), none, none)
    heads = MedusaHeads.random(model, 4)
    chosen = torch.randint(0, 40, (length,), generator=draw)
    found = evaluate(heads, answers, chosen)
    losses, counts = window_losses(heads, answers)
    assert counts.tolist() == [length - 1 - head for head in range(4)]
    assert found["loss"] == pytest.approx((losses / counts).tolist(), rel=1e-4)
    guesses = heads.logits(hidden.float()).argmax(-1)
    for head in range(4):
        hits = (guesses[head, : -1 - head] == chosen[1 + head :]).float().mean()
        assert found["top1"][head] == pytest.approx(float(hits), abs=1e-6)
