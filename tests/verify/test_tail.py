"""What happens behind a forward pass: each segment of a mixture is verified as it would be alone, and fails alone."""

from functools import cache, partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.forest.forest import Forest, Segment
from medusa_apar.kv.pool import KVPool
from medusa_apar.kv.slot_ledger import SlotLedger
from medusa_apar.runtimes.cpu.choosing import CompiledChooser
from medusa_apar.threads.fork_policy import ControlTokenForks
from medusa_apar.threads.fork_rule import ForkRule
from medusa_apar.triton_kernels import reference
from medusa_apar.triton_kernels.reference import TypicalAcceptance
from medusa_apar.verify.guides import Guide, GuideLogitsProcessor, compiled
from medusa_apar.verify.min_tokens import MinTokensLogitsProcessor
from medusa_apar.verify.penalties import PresenceFrequencyLogitsProcessor
from medusa_apar.verify.tail import StepOutput, Tail
from tests.support.models import CHILD, CONTROL, FORK
from tests.support.verifying import drafted_forks, request_of, segment_of, verified_on_host

VOCAB, DEPTH = 14, 8
argmax = partial(torch.argmax, dim=-1)


def breaks(input_ids, scores):
    raise RuntimeError("this one breaks")


def impossible(input_ids, scores):
    return torch.full_like(scores, torch.nan)


@cache
def tokenizer_of_14():
    pieces = ["<pad>", "<s>", "</s>", "<fork>", "<child>", "[", "]", ",", "0", "1", "2", "11", "[[", "],"]
    inner = Tokenizer(models.BPE({piece: id for id, piece in enumerate(pieces)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens(pieces[:5])
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def guide():
    """Arrays of numbers and arrays, to which random tokens keep now and then."""
    schema = {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"$ref": "#"}]}}
    return GuideLogitsProcessor(compiled(Guide.json_schema(schema), tokenizer_of_14(), VOCAB, [2]), 4)


# One rule of acceptance for all: on the device in one launch, or on the host path by path.
MODES = {
    "greedy": lambda: {},
    "greedy, not forking": lambda: {"rule": ForkRule.of(CONTROL, fork=False)},
    "greedy, thresholds unused": lambda: {"typical": TypicalAcceptance(0.0, 0.0)},
    "sampled": lambda: {"seed": 3},
    "sampled, all 64 bits": lambda: {"seed": 2**64 - 1},
    "warped": lambda: {"seed": 5, "processors": [TemperatureLogitsWarper(0.5), TopKLogitsWarper(4)]},
    "suppressed": lambda: {"processors": [SuppressTokensLogitsProcessor([7, 9], device="cpu")]},
    "typical": lambda: {"seed": 4, "typical": TypicalAcceptance(0.05, 0.3)},
    "typical, warped": lambda: {
        **{"seed": 4, "typical": TypicalAcceptance(0.3, 1.0)},
        **{"processors": [TemperatureLogitsWarper(1.4), TopPLogitsWarper(0.9)]},
    },
    "penalised": lambda: {"processors": [RepetitionPenaltyLogitsProcessor(1.5)]},
    "penalised, sampled": lambda: {
        "seed": 8,
        "processors": [RepetitionPenaltyLogitsProcessor(1.5), TemperatureLogitsWarper(0.7)],
    },
    "penalised by counts": lambda: {"processors": [PresenceFrequencyLogitsProcessor(4, 0.7, 0.4)]},
    "biased, held off": lambda: {
        **{"seed": 7, "rule": ForkRule.of(CONTROL)},
        "processors": [
            MinLengthLogitsProcessor(6, torch.tensor([-1, 7, 9]), device="cpu"),
            SequenceBiasLogitsProcessor({(8,): 2.5, (10,): -1.0}),
            MinNewTokensLengthLogitsProcessor(4, 2, torch.tensor([10, 99]), device="cpu"),
            PresenceFrequencyLogitsProcessor(6, -0.5, 0.3),
            MinPLogitsWarper(0.05),
            TypicalLogitsWarper(0.9),
        ],
    },
    "held back": lambda: {
        "processors": [
            MinTokensLogitsProcessor(4, 2, (2, 7, 9, 99), CONTROL),
            MinTokensLogitsProcessor(2, 4, (10, 11), CONTROL, in_children=True),
        ]
    },
    "penalised, typical": lambda: {
        **{"seed": 8, "typical": TypicalAcceptance(0.05, 0.3)},
        **{"processors": [RepetitionPenaltyLogitsProcessor(1.2)]},
    },
    "scores kept": lambda: {"scores": True},
    "logits kept, sampled": lambda: {"seed": 2, "scores": True, "logits": True, "processors": [TopKLogitsWarper(3)]},
    "logprobs kept": lambda: {"logprobs": 2},
    "logprobs kept, typical": lambda: {"seed": 2, "logprobs": 3, "typical": TypicalAcceptance(0.05, 0.3)},
    "asked": lambda: {"fork_if": lambda point: point.forks > 0},
    "no control tokens": lambda: {"rule": None},
    "no control tokens, warped": lambda: {"rule": None, "seed": 6, "processors": [TemperatureLogitsWarper(0.8)]},
    "guided, no control tokens": lambda: {"rule": None, "processors": [guide()]},
    "guided, warped, no control tokens": lambda: {
        **{"rule": None, "seed": 6, "typical": TypicalAcceptance(0.05, 0.3)},
        "processors": [SequenceBiasLogitsProcessor({(8,): 2.5}), guide(), TopKLogitsWarper(3)],
    },
    "biased to nothing": lambda: {"processors": [SequenceBiasLogitsProcessor({(99,): 1.0})]},
    "broken": lambda: {"processors": [breaks]},
    "impossible": lambda: {"processors": [impossible]},
}
if find_spec("llguidance") is None:  # without the extra `structured`
    MODES = {mode: make for mode, make in MODES.items() if "guided" not in mode}
FAILURES = {
    "biased to nothing": "the following tokens were being biased: [99]",
    "broken": "this one breaks",
    "impossible": "impossible left no token",
}
ON_HOST = {"scores kept", "logits kept, sampled", "logprobs kept", "logprobs kept, typical", "asked"}


def request_in(mode):
    options = {"rule": ForkRule.of(CONTROL), "policy": ControlTokenForks()} | MODES[mode]()
    return request_of([5, 6, 7, 8], 11, **options)


@st.composite
def parts(draw):
    """A part of a forest: a mode, and for one thread or two a draft tree whose tokens are often likely, with the logits
    of its rows."""
    mode, members = draw(st.sampled_from(list(MODES))), []
    forking = "no control tokens" not in mode
    for _ in range(draw(st.integers(1, 2)) if forking else 1):
        tree = DraftTree.likeliest(draw(st.integers(0, 8)))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
        logits = draw(st.sampled_from([0.5, 2.0])) * torch.randn(2 * len(tree) + 1, VOCAB, generator=generator)
        logits[:, [FORK, CHILD]] += draw(st.sampled_from([0.0, 3.0]))
        tokens = []
        for parent, rank in zip(tree.parents.tolist(), tree.ranks.tolist(), strict=True):
            tokens.append(int(logits[parent + 1].argsort(descending=True)[rank]))
        shape, tokens, forks = drafted_forks(tree, tokens) if forking else (tree, tokens, {})
        members.append(({"draft_tree": shape, "draft_tokens": tokens, "forks": forks}, logits[: len(tokens) + 1]))
    return mode, members


def segments_of(request, members):
    """The trunk's, and that of a child whose `[Fork]` the trunk ends with."""
    tree, segments = request.tree, []
    if len(members) > 1:
        tree.trunk.tokens += [9, FORK]
        tree.fork(tree.trunk, len(tree.trunk.tokens) - 1, 13)
    for thread, (drafts, _) in zip(tree.threads, members, strict=True):
        segments.append(segment_of(request, thread, **drafts))
    return segments


def run(groups, logits, verify, chooser=None):
    """A step of these segments, request by request, with such logits of their rows."""
    forest = Forest(groups, SlotLedger(KVPool()), torch.device("cpu"))
    assert len(logits) == len(forest.verified_rows)
    tail, logits = Tail(forest, verify, argmax, chooser, None, DEPTH), logits.clone()
    chosen = None if tail.device is None else tail.device.run(logits, logits, tail.device.inputs())
    return tail, tail.read(StepOutput(logits, logits, chosen))


def same_logprobs(ours, expected):
    """To 1e-5, and the same ids."""
    pairs = zip(ours.top, expected.top, strict=True)
    return ours.logprob == pytest.approx(expected.logprob, abs=1e-5) and all(
        a == b and mine == pytest.approx(theirs, abs=1e-5) for (a, mine), (b, theirs) in pairs
    )


def same(ours, expected, first):
    """Whether results are equal, the first one's rows counted from another place."""
    kept = [(ours.scores, expected.scores), (ours.logits, expected.logits)]
    return (
        (ours.tokens, ours.nodes, ours.row - first) == (expected.tokens, expected.nodes, expected.row)
        and len(ours.logprobs) == len(expected.logprobs)
        and all(map(same_logprobs, ours.logprobs, expected.logprobs))
        and all(len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in kept)
        # A launch chooses for every drafted child, the host for those whose [Fork] was accepted.
        and expected.children.keys() == {fork for fork in ours.children if fork in ours.nodes}
        and all(same(ours.children[fork], child, first) for fork, child in expected.children.items())
    )


@settings(deadline=None, max_examples=150)
@given(st.lists(parts(), min_size=1, max_size=6), st.sampled_from(["python", "compiled", "launch"]))
def test_each_is_verified_as_it_is_alone(drawn, where):
    """Whatever else is in the forest: what one does, raises or keeps is nothing to the others. Python chooses alone."""
    on_host, chooser = where != "launch", CompiledChooser() if where == "compiled" else None
    requests = [request_in(mode) for mode, _ in drawn]
    groups = [segments_of(request, members) for request, (_, members) in zip(requests, drawn, strict=True)]
    logits = torch.cat([rows for _, members in drawn for _, rows in members])
    tail, results = run(groups, logits, None if on_host else reference.verify, chooser)
    free = {request.sampler.on_device for request in requests}
    assert (tail.device is not None) == (not on_host and True in free)

    first, results = 0, iter(results)
    for request, (mode, members) in zip(requests, drawn, strict=True):
        assert (request.error is not None) == (mode in FAILURES)
        if request.error is not None:
            assert FAILURES[mode] in str(request.error)
        for place, (_, rows) in enumerate(members):
            result = next(results)
            if mode in FAILURES:
                assert result is None
            else:
                alone = verified_on_host([segments_of(request_in(mode), members)[place]], rows)
                assert same(result, alone[0], first), mode
            first += len(rows)
    assert next(results, None) is None


def test_compiled_code_is_asked_once_for_all(monkeypatch):
    """And torch for no row of a whole distribution."""
    asked = []

    class Counting(CompiledChooser):
        def choose(self, logits, choices):
            asked.append(("choose", len(choices.rows)))
            return super().choose(logits, choices)

        def top(self, logits, rows, count):
            asked.append(("top", len(rows), count))
            return super().top(logits, rows, count)

    monkeypatch.setattr("medusa_apar.verify.sampler.Sampler._warped", None)
    modes = ["logprobs kept", "sampled", "typical", "penalised by counts", "logprobs kept, typical", "greedy"]
    tree = DraftTree.likeliest(3)
    groups = [[segment_of(request_in(mode), None, tree, [9, 10, 11])] for mode in modes]
    logits = torch.randn(4 * len(modes), VOCAB, generator=torch.Generator().manual_seed(2))
    _, results = run(groups, logits, None, Counting())
    assert None not in results and asked == [("top", 8, 3), ("choose", 16)]


def test_a_launch_takes_all_modes_but_those_that_need_the_host():
    """Or the test above might never have had them together."""
    modes = [mode for mode in MODES if mode not in FAILURES]
    unruled = [mode for mode in modes if "no control tokens" in mode]
    for some, taken in ((modes, [mode for mode in modes if mode not in {*ON_HOST, *unruled}]), (unruled, unruled)):
        requests = [request_in(mode) for mode in some]
        logits = torch.randn(len(some), VOCAB, generator=torch.Generator().manual_seed(2))
        logits[:, [FORK, CHILD]] += 2.0
        tail, results = run([[segment_of(request)] for request in requests], logits, reference.verify)
        assert [mode for mode, here in zip(some, tail.device.served, strict=True) if here] == taken
        assert tail.device.modes == ((FORK, CHILD), True, True) if some is modes else (None, True, False)
        for place, (mode, result) in enumerate(zip(some, results, strict=True)):
            assert same(result, verified_on_host([segment_of(request_in(mode))], logits[place, None])[0], place)


@pytest.mark.parametrize("verify", [None, reference.verify])
def test_whose_fault_it_is_that_nothing_is_possible(verify):
    every = [token for token in range(VOCAB) if token not in (FORK, CHILD)]
    requests = {
        "the model": request_in("greedy"),
        "SuppressTokensLogitsProcessor": request_of(
            [5, 6], rule=ForkRule.of(CONTROL), processors=[SuppressTokensLogitsProcessor(every, device="cpu")]
        ),
        None: request_in("sampled"),
    }
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(2))
    logits[0], logits[1, FORK] = torch.nan, -torch.inf
    _, results = run([[segment_of(request)] for request in requests.values()], logits, verify)
    for (blamed, request), result in zip(requests.items(), results, strict=True):
        assert (result is None) == (blamed is not None)
        if blamed is None:
            assert request.error is None
        else:
            assert isinstance(request.error, ValueError)
            assert str(request.error).startswith(f"{blamed} left no token to choose after")


@pytest.mark.parametrize("verify", [None, reference.verify])
def test_what_is_not_accepted_is_no_failure(verify):
    """Rows of NaN behind guesses that prove wrong, a child's among them."""
    request = request_in("greedy")
    shape, tokens, forks = drafted_forks(DraftTree([(0,), (1,)]), [9, FORK])
    logits = torch.randn(len(tokens) + 1, VOCAB, generator=torch.Generator().manual_seed(2))
    logits[0, 9], logits[2:] = 99.0, torch.nan
    _, (result,) = run([[segment_of(request, None, shape, tokens, forks=forks)]], logits, verify)
    assert request.error is None and result.tokens[0] == 9 and result.nodes == [0]
    # And where they prove right it is.
    logits[0, FORK] = 999.0
    request = request_in("greedy")
    assert run([[segment_of(request, None, shape, tokens, forks=forks)]], logits, verify)[1] == [None]
    assert "the model left no token" in str(request.error)


@pytest.mark.parametrize("verify", [None, reference.verify])
def test_of_a_request_that_has_failed_nothing_is_asked(verify):
    """A consumer of its events may have raised before the pass; that is what is told."""
    asked = []
    requests = [request_of([5, 6], processors=[lambda ids, scores: asked.append(0) or scores]), request_in("greedy")]
    errors = [RuntimeError("of a consumer"), RuntimeError("of another")]
    for request, error in zip(requests, errors, strict=True):
        request.error = error
    _, results = run([[segment_of(request)] for request in requests], torch.zeros(2, VOCAB), verify)
    assert results == [None, None] and not asked and [request.error for request in requests] == errors


# Scores of a given text.

TEXT = [9, 5, 12, 7, 7, 10, 6]


def scoring(first, **options):
    return request_of([*TEXT], score_from=first, rule=ForkRule.of(CONTROL, fork=False), **options)


def scored_segment(request, cached=0):
    """As the scheduler has it: what precedes the text's last token, of which the last rows are scored."""
    stop, first = len(TEXT) - 1, request.options.score_from
    return Segment(request.tree.trunk, stop, scored=stop - max(cached, first - 1), request=request)


WAYS = {
    "greedy": ({"logprobs": 2}, lambda path, scores: scores),
    "sampled": ({"seed": 3, "processors": [TopKLogitsWarper(2)]}, None),
    "penalised": (
        {"processors": [RepetitionPenaltyLogitsProcessor(1.8)]},
        lambda path, scores: RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor([path]), scores[None].clone())[0],
    ),
}


@pytest.mark.parametrize("first", [1, 4])
@pytest.mark.parametrize("verify", [None, reference.verify])
def test_texts_are_scored_beside_what_decodes(verify, first):
    requests = {way: scoring(first, **options) for way, (options, _) in WAYS.items()}
    requests["broken"] = scoring(first, processors=[breaks])
    others = [request_in("greedy"), request_in("penalised"), request_in("typical")]
    rows = len(TEXT) - first
    logits = torch.randn(4 * rows + 3, VOCAB, generator=torch.Generator().manual_seed(first))
    logits[:, [FORK, CHILD]] += 9.0
    for place in range(0, rows, 2):  # so that some tokens are those that are chosen
        logits[place : 4 * rows : rows, TEXT[first + place]] += 5.0
    groups = [[scored_segment(request)] for request in requests.values()] + [
        [segment_of(request)] for request in others
    ]
    _, results = run(groups, logits, verify)

    assert results[:4] == [None] * 4
    for place, (request, mode) in enumerate(zip(others, ("greedy", "penalised", "typical"), strict=True), 4 * rows):
        expected = verified_on_host([segment_of(request_in(mode))], logits[place, None])[0]
        assert same(results[place - 4 * rows + 4], expected, place) and request.error is None
    assert str(requests.pop("broken").error) == "this one breaks"
    for place, (way, request) in enumerate(requests.items()):
        own, scores = logits[place * rows :][:rows].clone(), request.text_scores
        told = own.log_softmax(-1)  # of the model's own distribution, control tokens included
        assert len(scores.told) == (rows if request.options.logprobs else 0)
        for row, its in enumerate(scores.told):
            assert its.logprob == pytest.approx(float(told[row, TEXT[first + row]]), abs=1e-5)
            values, ids = told[row].topk(2)
            assert [token for token, _ in its.top] == ids.tolist()
            assert [value for _, value in its.top] == pytest.approx(values.tolist(), abs=1e-5)
        own[:, [FORK, CHILD]] = -torch.inf
        expected = own.log_softmax(-1)[torch.arange(rows), torch.tensor(TEXT[first:])]
        torch.testing.assert_close(torch.tensor(scores.logprobs), expected)
        process = WAYS[way][1]
        if process is None:
            assert scores.chosen == []  # a sample need not be the likeliest
        else:
            likeliest = [int(process(TEXT[: first + row], own[row]).argmax()) for row in range(rows)]
            assert scores.chosen == [token == TEXT[first + row] for row, token in enumerate(likeliest)]
            assert True in scores.chosen and False in scores.chosen


@pytest.mark.parametrize("verify", [None, reference.verify])
def test_what_is_seen_is_what_the_model_says_behind_every_row(verify):
    """Of requests that are guessed for, before bans are written."""
    tree = DraftTree([(0,), (0, 0), (1,)])
    child = request_in("greedy")
    child.tree.trunk.tokens += [9, FORK]
    thread = child.tree.fork(child.tree.trunk, len(child.tree.trunk.tokens) - 1, 13)
    groups = [
        [segment_of(request_in("greedy"), None, tree, [9, 10, 11])],
        [segment_of(request_of([5], rule=ForkRule.of(CONTROL), speculation=False))],
        [segment_of(child, thread)],
        [segment_of(request_of([5], seed=3))],
        [scored_segment(scoring(6))],
    ]
    logits = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(2))
    logits[:, [FORK, CHILD]] += 9.0

    def top(logits, rows, count):
        values, ids = logits[torch.from_numpy(rows)].topk(count)
        return ids, values

    forest = Forest(groups, SlotLedger(KVPool()), torch.device("cpu"))
    tail, given = Tail(forest, verify, argmax, None, None, DEPTH, top), logits.clone()
    chosen = None if tail.device is None else tail.device.run(given, given, tail.device.inputs())
    tail.read(StepOutput(given, given, chosen))
    root = groups[0][0].extend_tokens[-1]
    last = groups[0][0].thread.tokens[-2]
    expected = {
        0: ([last, root, 9, root], [root, 9, 10, 11], [0, 1, 2, 3]),
        2: ([FORK], [CHILD], [5]),
        3: ([-1], [5], [6]),
    }
    assert [request for request, _ in tail.seen] == [groups[place][0].request for place in expected]
    for (_, seen), (before, tokens, rows) in zip(tail.seen, expected.values(), strict=True):
        assert (seen.before.tolist(), seen.tokens.tolist()) == (before, tokens)
        values, ids = logits[rows].topk(8)
        assert seen.ids.tolist() == ids.tolist()
        np.testing.assert_allclose(seen.shares, values.softmax(-1).numpy(), atol=1e-6)
