"""Training sees what drafting does: a round's row is that of a draft so many tokens behind its root."""

import pytest
import torch
from torch.nn import functional as F

from medusa_apar.finetune.packing import join, pack_threads
from medusa_apar.heads import Eagle3Heads
from medusa_apar.heads.eagle3.files import parse
from medusa_apar.heads.eagle3.fresh import fresh
from medusa_apar.heads.eagle3.losses import _Rounds, base_states, round_losses
from medusa_apar.runtimes.capture import Captured
from tests.support.eagle3_files import LAYOUTS, checkpoint
from tests.support.models import VOCAB, tiny_model

THREADS = [([7, 8, 9, 3, 10, 11, 3, 12, 2], -1, 0), ([4, 20, 21, 22, 2], 0, 3), ([4, 30, 31], 0, 6)]


def a_row():
    return join([pack_threads(THREADS, 2), pack_threads([([40, 41, 42, 43, 44], -1, 0)], 1)])


def chain(network, embedded, features, row, place, rounds):
    """The output behind a token, drafted so many rounds behind its root, row by row as decoding runs it."""
    lineage = [place]
    while row.parents[lineage[0]] >= 0:
        lineage.insert(0, int(row.parents[lineage[0]]))
    kept = {}
    for depth, token in enumerate(lineage):
        drafted = depth > len(lineage) - 1 - rounds

        def attend(index, q, k, v):
            keys, values = kept.get(index, (k[:0], v[:0]))
            keys, values = kept[index] = torch.cat([keys, k]), torch.cat([values, v])
            keys, values = (x[1:] if depth else x for x in (keys, values))  # noqa: B023
            q, keys, values = (x.transpose(0, 1) for x in (q, keys, values))
            return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True).transpose(0, 1)

        feature = out.features[0] if drafted else features[lineage[depth - 1]] if depth else features[0]  # noqa: F821
        out = network(embedded[token, None], feature[None], row.position_ids[token, None], attend)
    return out


@pytest.mark.parametrize("name", ["its authors'", "two layers", "norm before the residual"])
@torch.no_grad()
def test_a_round_is_a_draft_behind_its_root(name):
    file = parse(*checkpoint(LAYOUTS[name]))
    network = Eagle3Heads(file, 24, 40, (1, 1, 1)).network
    row = a_row()
    generator = torch.Generator().manual_seed(0)
    embedded, features = torch.randn(2, len(row), 24, generator=generator)
    before = row.parents.clamp(min=0)
    rounds, its, checked = _Rounds(row), features, 0
    for number in range(4):
        out = network(embedded, its[before], row.position_ids, rounds.attend(number))
        its = out.features
        for place in range(len(row)):
            if row.position_ids[place] > number:  # there is a root so far above, and a token before that
                expected = chain(network, embedded, features, row, place, number)
                torch.testing.assert_close(out.states[place], expected.states[0], rtol=1e-4, atol=1e-4)
                checked += 1
    assert checked > 30


def begun(token_map=None, scale=3.0):
    model = tiny_model(scale=scale)
    return Eagle3Heads(fresh(model, (1, 1, 2), token_map), 32, VOCAB, (1, 1, 2)).attach(model)


def test_rounds_lose_their_first_places_and_count_only_what_is_asked():
    heads, row = begun(torch.arange(50)), a_row()
    states = base_states(heads, row)
    found = round_losses(heads, row, *states, torch.ones(len(row), dtype=torch.bool), 3)
    assert found.counts.tolist() == [int((row.position_ids > number).sum()) for number in range(3)]
    some = round_losses(heads, row, *states, row.in_trunk, 3)
    assert (some.counts < found.counts).all() and (some.losses < found.losses).all()
    assert (found.hits.sum(1) <= found.counts).all()
    ranked = round_losses(heads, row, *states, row.in_trunk, 3, 50)
    assert ranked.hits.sum(1).tolist() == ranked.counts.tolist()  # somewhere among all


def test_states_of_a_packed_row_are_those_of_its_paths():
    heads, row = begun(), a_row()
    states, hidden = base_states(heads, row)
    trunk, prompt = THREADS[0][0], [*THREADS[0][0][:4], *THREADS[1][0]]
    for path, places in ((trunk, range(9)), (prompt, [0, 1, 2, 3, *range(9, 14)])):
        with torch.no_grad(), Captured(heads.base, (), heads.boundaries) as captured:
            out = heads.base.base_model(input_ids=torch.tensor([path]))
        torch.testing.assert_close(states[list(places)], captured.boundary_states())
        torch.testing.assert_close(hidden[list(places)], out.last_hidden_state[0])


def test_every_weight_learns():
    heads, row = begun(scale=20.0), a_row()  # a base that is sure of what follows
    assert heads.draft_vocab_size == VOCAB and heads.network.unembedding is None
    for parameter in heads.network.parameters():
        parameter.requires_grad_(True)
    optimizer, states = torch.optim.Adam(heads.network.parameters(), lr=3e-3), base_states(heads, row)
    seen = []
    for _ in range(60):
        losses = round_losses(heads, row, *states, row.trained, 3)
        mean = losses.losses.sum() / losses.counts.sum()
        optimizer.zero_grad()
        mean.backward()
        optimizer.step()
        seen.append(mean.item())
    assert seen[-1] < 0.7 * seen[0]
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in heads.network.parameters())


def test_only_layers_like_llamas_can_be_begun_with():
    with pytest.raises(NotImplementedError, match="only layers like Llama's can"):
        fresh(tiny_model("gpt2"), (1, 2), None)
