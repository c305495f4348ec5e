"""Recycled tokens: what the table keeps, what is made of it beside heads and n-grams, and the chances of that."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_apar.drafting import recycling
from medusa_apar.drafting.candidates import MAX_DEPTH, CandidateScorer
from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.drafting.ngram_index import NgramMatch
from medusa_apar.drafting.recycled_candidates import RecycledScorer
from medusa_apar.drafting.recycling import TOP_K, RecyclingTable, SeenRows

TOKENS = st.integers(0, 6)
SCORES = st.floats(-30, 30, width=32) | st.sampled_from([-math.inf, math.inf, math.nan])


@st.composite
def steps(draw):
    """What some steps have seen, with widths of a step's own."""
    found = []
    for _ in range(draw(st.integers(1, 5))):
        rows, width = draw(st.integers(1, 9)), draw(st.integers(1, TOP_K))
        before = draw(st.lists(st.integers(-1, 6), min_size=rows, max_size=rows))
        tokens = draw(st.lists(TOKENS, min_size=rows, max_size=rows))
        ids = [draw(st.permutations(range(20)))[:width] for _ in range(rows)]
        scores = [
            sorted(draw(st.lists(SCORES, min_size=width, max_size=width)), key=lambda score: (score != score, -score))
            for _ in range(rows)
        ]
        shares = recycling.shares_of(np.array(scores, dtype=np.float32))
        np.testing.assert_allclose(shares, [shares_of(row) for row in scores], atol=1e-6)
        found.append(SeenRows(*map(np.array, (before, tokens, ids)), shares))
    return found


def shares_of(scores):
    finite = [math.exp(score) if math.isfinite(score) else 0.0 for score in scores]
    return [power / sum(finite) if sum(finite) else 0.0 for power in finite]


# ---- the table


@settings(deadline=None)
@given(steps(), st.sampled_from([3, 8, recycling.MOST_ROWS]))
def test_the_table_has_what_was_last_seen_behind_the_same_tokens(seen, most):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(recycling, "MOST_ROWS", most)
        patched.setattr(recycling, "_FIRST_ROWS", 1)
        table = RecyclingTable()
        table._ids, table._shares = table._ids[:1], table._shares[:1]
        written = []  # in the order in which it counts, the latest last: a step's earlier rows count for more
        for step in seen:
            table.learn(step)
            written += [[part[row] for part in step] for row in reversed(range(len(step.tokens[:most])))]
        written = written[-most:]
        for before in range(-1, 8):
            for token in range(8):
                both = [row for row in written if before >= 0 and (row[0], row[1]) == (before, token)]
                one = [row for row in written if row[1] == token]
                behind = table.behind(before, token)
                if not one:
                    assert behind is None
                    continue
                _, _, ids, shares = (both or one)[-1]
                assert behind.length == (2 if both else 1)
                assert behind.tokens[: len(ids)] == ids.tolist()
                np.testing.assert_allclose(behind.shares[: len(ids)], shares, atol=1e-6)
                assert not any(behind.shares[len(ids) :])


def test_a_table_stays_small():
    table = RecyclingTable()
    random = np.random.default_rng(0)
    for _ in range(200):
        tokens = random.integers(0, 50_000, (2, 1000))
        table.learn(SeenRows(*tokens, random.integers(0, 50_000, (1000, TOP_K)), np.zeros((1000, TOP_K))))
    assert len(table._ids) == recycling.MOST_ROWS and len(table._rows) <= 4 * recycling.MOST_ROWS + 2000


# ---- candidates


def table_of(random, tokens, rows=40):
    table = RecyclingTable()
    ids = np.stack([random.permutation(tokens)[:TOP_K] for _ in range(rows)])
    shares = recycling.shares_of(-np.sort(random.gamma(1.0, 3.0, (rows, TOP_K)), axis=1))
    table.learn(SeenRows(*random.integers(0, tokens, (2, rows)), ids, shares))
    return table


@st.composite
def situations(draw):
    """A table, and what heads and n-grams propose: any of them, none or both."""
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    table = table_of(random, 14, draw(st.integers(1, 60)))
    scorer, proposal, tree = CandidateScorer(), None, None
    if draw(st.booleans()):
        tree = DraftTree.likeliest(draw(st.integers(1, 20)))
        tokens, log_probs = np.zeros(len(tree), dtype=np.int64), np.zeros(len(tree))
        for children in tree.children:
            tokens[children] = random.permutation(14)[: len(children)]
            log_probs[children] = np.log(random.dirichlet(np.ones(len(children) + 1))[:-1])
        if draw(st.booleans()):
            log_probs[draw(st.integers(0, len(tree) - 1))], tokens[-1] = -np.inf, -1  # as drafters may leave nodes
        (proposal,) = scorer.of_heads(tree, tokens[None], log_probs[None])
    if draw(st.booleans()):
        recalled = draw(st.lists(st.integers(0, 13), min_size=1, max_size=MAX_DEPTH))
        proposal = scorer.with_match(proposal, tree, NgramMatch(recalled, draw(st.integers(1, 14))))
    path = draw(st.integers(-1, 13)), draw(st.integers(0, 13))
    return scorer, proposal, table, path


@settings(deadline=None)
@given(situations(), st.sampled_from([0.01, 0.05, 0.3]), st.integers(1, 60))
def test_proposals_grow_into_trees_whose_chances_are_chances(situation, least, most):
    scorer, before, table, path = situation
    after = RecycledScorer(scorer.match_acceptance).extend(before, table, path, least, most)
    if after is None:
        assert before is None
        return
    size = 0 if before is None else len(before.tokens)
    assert after.recycled == len(after.tokens) - size <= most
    if before is not None:
        assert after.tokens[:size].tolist() == before.tokens.tolist()
        assert after.parents[:size].tolist() == before.parents.tolist()
        assert (after.heads, after.chain, after.matches) == (before.heads, before.chain, before.matches)
    parents, chances = after.parents.tolist(), after.chances
    depths = []
    for node, parent in enumerate(parents):
        depths.append(depths[parent] + 1 if parent >= 0 else 1)
        assert parent < node and 0 <= chances[node] <= (chances[parent] if parent >= 0 else 1) + 1e-9
        last = after.tokens[parent] if parent >= 0 else path[1]
        ahead = (after.tokens[parents[parent]] if parents[parent] >= 0 else path[1]) if parent >= 0 else path[0]
        if node >= size:
            behind = table.behind(int(ahead), int(last))
            assert after.tokens[node] in behind.tokens and chances[node] >= least - 1e-9 and depths[node] <= MAX_DEPTH
    for parent in range(-1, len(parents)):
        below = [node for node, its in enumerate(parents) if its == parent]
        new = [node for node in below if node >= size]
        assert len({int(after.tokens[node]) for node in new}) == len(new)
        known = [int(after.tokens[node]) for node in below if node < size]
        assert not set(known).intersection(after.tokens[new].tolist())
        if new:
            total = chances[parent] if parent >= 0 else 1.0
            unlikely = [node for node in below if node < size and after.tokens[node] < 0]
            assert chances[[node for node in below if node not in unlikely]].sum() <= total + 1e-9
    sources = after.sources(np.arange(len(parents)))
    assert list(sources) == ["heads", "ngrams", "recycled"] and sources["recycled"] == after.recycled
    assert sources["heads"] == after.heads and sum(sources.values()) == len(parents)


@settings(deadline=None)
@given(situations(), st.integers(1, 40))
def test_what_is_found_are_the_likeliest(situation, most):
    """Whoever wants few gets the first of those whom many would get."""
    scorer, before, table, path = situation
    few, many = (
        RecycledScorer(scorer.match_acceptance).extend(before, table, path, 0.01, count) for count in (most, 400)
    )
    if many is None:
        assert few is None
        return
    sizes = min(most, len(many.tokens))
    best = [np.sort(proposal.chances)[::-1][:sizes] for proposal in (few, many)]
    np.testing.assert_allclose(*best)


@settings(deadline=None)
@given(situations())
def test_what_the_heads_alone_bring_is_what_would_not_be_there_without_them(situation):
    scorer, before, table, path = situation
    after = RecycledScorer(scorer.match_acceptance).extend(before, table, path, 0.01, 60)
    if after is None or not after.heads:
        assert after is None or not after.from_heads.any()
        return
    for node, parent in enumerate(after.parents.tolist()):
        if parent >= 0 and after.from_heads[parent]:
            assert after.from_heads[node]
        elif after.from_heads[node]:
            assert node < after.heads and node not in after.chain


def test_a_token_that_heads_and_table_propose_is_likelier_than_by_either_alone_if_both_are_as_sure():
    table = RecyclingTable()
    table.learn(SeenRows(np.array([4]), np.array([5]), np.array([[7, 8]]), np.array([[0.5, 0.5]])))
    (heads,) = CandidateScorer().of_heads(DraftTree([(0,), (1,)]), np.array([[7, 9]]), np.log([[0.4, 0.4]]))
    found = RecycledScorer(CandidateScorer().match_acceptance).extend(heads, table, (4, 5), 0.01, 10)
    chances = dict(zip(found.tokens.tolist(), found.chances.tolist(), strict=True))
    assert chances[7] > chances[9] and chances[7] > chances[8]
    assert found.from_heads.tolist()[:2] == [False, True] and found.recycled == 1


@pytest.mark.parametrize("has_heads", [False, True])
def test_chances_become_what_happens(has_heads):
    """Tokens come as the table says a third of the time, as the heads say another, else from nowhere."""
    random, scorer, recycled = np.random.default_rng(3), CandidateScorer(), None
    recycled = RecycledScorer(scorer.match_acceptance)
    promised = happened = 0.0
    shares, tree = np.array([0.6, 0.3, 0.1]), DraftTree([(0,), (1,)])
    for step in range(6000):
        table = RecyclingTable()
        ids = random.permutation(12)
        table.learn(SeenRows(np.array([4]), np.array([5]), ids[None, :3], shares[None]))
        proposal, guesses = None, random.permutation(12)[:2]
        if has_heads:
            (proposal,) = scorer.of_heads(tree, guesses[None], np.log([[0.5, 0.25]]))
        proposal = recycled.extend(proposal, table, (4, 5), 0.01, 10)
        draw = random.random()
        true = random.choice(ids[:3], p=shares) if draw < 1 / 3 else 99
        if has_heads and draw > 2 / 3:
            true = random.choice([*guesses, 98], p=[0.5, 0.25, 0.25])
        kept = np.arange(len(proposal.tokens))
        right = {node for node in kept.tolist() if proposal.tokens[node] == true and proposal.parents[node] < 0}
        if step >= 3000:
            promised += proposal.chances[proposal.parents < 0].sum()
            happened += len(right)
        scorer.learn(proposal, kept, right)
        recycled.learn(proposal, kept, right)
    assert promised / happened == pytest.approx(1, abs=0.1)
