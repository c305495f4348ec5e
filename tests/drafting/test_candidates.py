"""What is proposed: what siblings said, what heads claim, and the chances of both."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_apar.drafting.candidates import Calibration, CandidateScorer, MatchAcceptance
from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.drafting.ngram_index import LONGEST, MAX_RECALLED, SHORTEST, NgramIndex, NgramMatch
from medusa_apar.threads.fork_rule import ForkRule
from medusa_apar.threads.paragraph_tree import ParagraphTree
from tests.support.models import CHILD, FORK

# ---- sibling memory


@settings(deadline=None)
@given(st.data())
def test_recall_is_what_followed_the_longest_match(data):
    tree = ParagraphTree(data.draw(st.lists(st.integers(5, 8), min_size=1, max_size=12)), fork_id=FORK, child_id=CHILD)
    memory = NgramIndex(CHILD)
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
        tokens, recall = thread.tokens, memory.lookup(thread)
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
            assert recall.tokens == other.tokens[index : index + MAX_RECALLED]
            assert recall.length >= length
            assert other.tokens[index - recall.length : index] == tokens[-recall.length :]


# ---- proposals


@st.composite
def guesses(draw):
    """A tree of heads' guesses with its tokens and claims; siblings differ, and claim no more than one together."""
    tree = DraftTree.likeliest(draw(st.integers(1, 20)))
    tokens, head_probs = np.zeros(len(tree), dtype=np.int64), np.zeros(len(tree))
    for children in tree.children:
        if children:
            tokens[children] = draw(st.permutations(range(2, 14)))[: len(children)]
            shares = np.array([draw(st.floats(0.01, 1)) for _ in range(len(children) + 1)])
            head_probs[children] = np.sort(shares[:-1] / shares.sum())[::-1]
    return tree, tokens, head_probs


@settings(deadline=None)
@given(guesses(), st.lists(st.integers(2, 14), min_size=1, max_size=8), st.integers(1, 14), st.booleans())
def test_proposals_are_trees_whose_chances_are_chances(guessed, recalled, match, may_fork):
    tree, tokens, head_probs = guessed
    proposer = CandidateScorer()
    (alone,) = proposer.of_heads(tree, tokens[None], np.log(head_probs)[None])
    proposal = proposer.with_match(alone, tree, NgramMatch(recalled, match))
    assert [int(proposal.tokens[node]) for node in proposal.chain] == recalled
    assert proposal.parents[proposal.chain].tolist() == [-1, *proposal.chain[:-1]]
    # The recalled token is likelier than either source makes it; whatever else hangs there is less likely than before.
    first = proposal.chain[0]
    trust = proposer.match_acceptance.of(match)
    assert proposal.chances[first] >= trust - 1e-9
    others = [node for node in tree.children[-1] if node != first]
    assert (proposal.chances[others] <= alone.chances[others] + 1e-9).all()
    np.testing.assert_allclose(proposal.chances[others], (1 - trust) * alone.chances[others])

    proposal = proposer.with_children(proposal, ForkRule(FORK, CHILD, 1), depth=0 if may_fork else 1, root=5)
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
    random, trust = np.random.default_rng(seed), MatchAcceptance()
    for draw in random.random(4000) < share + (1 - share) * other:
        trust.saw(5, other, bool(draw))
    assert abs(trust.of(5) + (1 - trust.of(5)) * other - (share + (1 - share) * other)) < 0.05
    assert trust.of(6) == MatchAcceptance().of(6)


@given(st.floats(0.1, 1.0), st.integers(0, 10_000))
def test_claims_are_corrected_by_what_became_of_them(honesty, seed):
    random, calibration = np.random.default_rng(seed), Calibration()
    for _ in range(60):
        head_probs = random.uniform(0.05, 0.95, 50)
        calibration.saw(head_probs, random.random(50) < honesty * head_probs)
    head_probs = np.array([0.1, 0.3, 0.6, 0.9])
    np.testing.assert_allclose(Calibration().chances(head_probs), head_probs)  # nothing known: believed
    assert np.abs(calibration.chances(head_probs) - honesty * head_probs).max() < 0.12
