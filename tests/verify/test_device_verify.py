"""A step's verification on the device: what goes through its one buffer of inputs arrives, padded or not."""

from types import SimpleNamespace

import pytest
import torch

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.threads.fork_rule import ForkRule
from medusa_apar.triton_kernels import reference
from medusa_apar.triton_kernels.reference import TypicalAcceptance
from medusa_apar.verify.device_verify import DeviceVerify
from tests.support.models import CHILD, CONTROL, FORK
from tests.support.verifying import request_of, segment_of, verified_on_host

VOCAB = 9
LENIENT = TypicalAcceptance(0.05, 0.3)
STRICT = TypicalAcceptance(0.0, 1e-30)
SEEDS = (None, 3, 2**64 - 1)
TYPICALS = (None, LENIENT, STRICT)
# Of two threads: each mode for both, then one beside another.
MODES = [((seed, typical), (seed, typical)) for seed in SEEDS for typical in TYPICALS]
MODES += [((None, LENIENT), (3, None)), ((3, STRICT), (2**64 - 1, None)), ((5, LENIENT), (None, None))]


def segments(modes):
    """Two threads, with draft trees of three nodes and of one."""
    made = []
    for (seed, typical), key, nodes in zip(modes, (5, 2**64 - 7), (3, 1), strict=True):
        request = request_of([1, 2, 3], key, seed=seed, typical=typical, rule=ForkRule.of(CONTROL))
        made.append(segment_of(request, None, DraftTree.likeliest(nodes), [5 + node for node in range(nodes)]))
    return made


def told(results):
    return [(result.tokens, result.nodes, result.row) for result in results]


@pytest.mark.parametrize("modes", MODES, ids=str)
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (6, 3)], ids=str)
def test_modes_of_threads_arrive_padded_or_not(modes, padding):
    received = {}

    def verify(*args, **options):
        received.update(options)
        return reference.verify(*args, **options)

    seeds = tuple(seed for seed, _ in modes)
    typicals = [None if seed is None else typical for seed, typical in modes]  # the likeliest token needs no thresholds
    forest = SimpleNamespace(verified=segments(modes))
    verification = DeviceVerify.of(verify, forest, 3, None)
    rows, threads = 6 + padding[0], 2 + padding[1]
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(1))
    results = verification.read(verification.run(logits, logits, verification.inputs(rows, threads), threads))

    noise, thresholds = received["noise"], received["typical"]
    assert received["control"] == (FORK, CHILD)
    if seeds == (None, None):
        assert noise is None
    else:
        sampled = [seed is not None for seed in seeds]
        assert noise.sampled.dtype == torch.int32 and noise.sampled[:2].tolist() == sampled
        assert len(noise.seeds) == len(noise.keys) == len(noise.sampled) == threads
        for seed, word in zip(seeds, noise.seeds.tolist(), strict=False):
            assert seed is None or seed == word & (2**64 - 1)
        assert [word & (2**64 - 1) for word in noise.keys[:2].tolist()] == [
            segment.thread.key for segment in forest.verified
        ]
        depths = [int(depth) for segment in forest.verified for depth in [-1, *segment.draft_tree.depths]]
        assert noise.positions[:6].tolist() == [4 + depth for depth in depths] and len(noise.positions) == rows
    if typicals == [None, None]:
        assert thresholds is None
    else:
        assert len(thresholds) == threads
        for typical, row in zip(typicals, thresholds, strict=False):
            assert row[0] < 0 if typical is None else torch.equal(row, torch.tensor(typical))
    assert told(results) == told(verification.read(verification.run(logits[:6], logits[:6], verification.inputs())))
    for result, expected in zip(results, verified_on_host(forest.verified, logits[:6]), strict=True):
        assert told([result]) == told([expected])


def test_a_captured_step_serves_all_seeds_and_thresholds_and_no_other_modes():
    def operations(*modes):
        return DeviceVerify.of(reference.verify, SimpleNamespace(verified=segments(modes)), 3, None).operations

    greedy, sampled, typical = (None, None), (1, None), (1, LENIENT)
    assert operations(typical, typical) == operations((2, TypicalAcceptance(0.5, 0.9)), typical)
    # Whichever thread it is that needs a mode.
    assert operations(typical, sampled) == operations(greedy, typical) == operations(typical, typical)
    assert operations(greedy, sampled) == operations(sampled, sampled)
    assert len({operations(mode, mode) for mode in (greedy, sampled, typical)}) == 3
