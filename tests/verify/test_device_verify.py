"""A step's verification on the device: what goes through its one buffer of inputs arrives, padded or not."""

from types import SimpleNamespace

import pytest
import torch

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.forest.forest import Stem
from medusa_apar.threads.paragraph_tree import ParagraphTree
from medusa_apar.triton_kernels import reference
from medusa_apar.triton_kernels.reference import TypicalAcceptance
from medusa_apar.verify.device_verify import Choice
from tests.support.models import CONTROL
from tests.support.random_requests import CHILD, FORK

VOCAB = max(FORK, CHILD) + 1
LENIENT = TypicalAcceptance(0.05, 0.3)


def stems():
    """Two threads, with draft trees of three nodes and of one."""
    made = []
    for key, nodes in ((5, 3), (2**64 - 7, 1)):
        tree = ParagraphTree([1, 2, 3], key=key)
        stem = Stem(tree.trunk, 3, draft_tree=DraftTree.likeliest(nodes), pending=[3])
        stem.draft_tokens = [4 + node for node in range(nodes)]
        made.append(stem)
    return made


@pytest.mark.parametrize("seed", [None, 3, 2**64 - 1])
@pytest.mark.parametrize("typical", [None, LENIENT, TypicalAcceptance(0.0, 1e-30)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (6, 3)], ids=str)
def test_modes_of_threads_arrive_padded_or_not(seed, typical, padding):
    received = {}

    def verify(*args, **options):
        received.update(options)
        return reference.verify(*args, **options)

    forest = SimpleNamespace(verified=stems())
    choice = Choice.of(verify, forest, CONTROL, [False] * 6, seed, 3, None, typical=typical)
    rows, threads = 6 + padding[0], 2 + padding[1]
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(1))
    verdicts = choice.read(choice.run(logits, logits, choice.inputs(rows, threads), threads))

    noise, thresholds = received["noise"], received["typical"]
    if seed is None:
        assert noise is None
    else:
        assert [word & (2**64 - 1) for word in noise.seeds.tolist()] == [seed] * threads
        assert [word & (2**64 - 1) for word in noise.keys[:2].tolist()] == [stem.thread.key for stem in forest.verified]
        depths = [int(depth) for stem in forest.verified for depth in [-1, *stem.draft_tree.depths]]
        assert noise.positions[:6].tolist() == [4 + depth for depth in depths] and len(noise.positions) == rows
        assert noise.sampled.dtype == torch.int32 and noise.sampled.tolist() == [1] * threads
    if typical is None:
        assert thresholds is None
    else:
        assert torch.equal(thresholds, torch.tensor([typical] * threads))
    alone = choice.read(choice.run(logits[:6], logits[:6], choice.inputs()))
    assert [(verdict.tokens, verdict.nodes, verdict.row) for verdict in verdicts] == [
        (verdict.tokens, verdict.nodes, verdict.row) for verdict in alone
    ]


def test_a_captured_step_serves_all_thresholds_and_no_other_modes():
    def operations(seed, typical):
        return Choice.of(
            reference.verify, SimpleNamespace(verified=stems()), CONTROL, [False] * 6, seed, 3, None, typical=typical
        ).operations

    assert operations(1, LENIENT) == operations(2, TypicalAcceptance(0.5, 0.9))
    assert len({operations(*modes) for modes in ((None, None), (1, None), (1, LENIENT))}) == 3
