"""What a forest asks of the pool for its requests."""

import torch

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.forest.forest import Forest, Stem
from medusa_apar.kv.pool import KVPool
from medusa_apar.kv.slot_ledger import SlotLedger
from medusa_apar.threads.paragraph_tree import ParagraphTree

FORK, CHILD, EOS = 1, 2, 0
DRAFTED = 3


def test_requests_that_decode_side_by_side_are_views_of_the_pool():
    """Of two threads each, with draft nodes of which one is accepted: nobody's slots have to be gathered."""
    trees = [ParagraphTree([9] * (4 + row), row, {EOS}, FORK, CHILD) for row in range(6)]
    ledger, tree = SlotLedger(KVPool(max_slots=1024)), DraftTree.likeliest(8)
    for step in range(30):
        stems = [
            [Stem(thread, len(thread.tokens), draft_tree=tree, draft_tokens=[9] * DRAFTED) for thread in each.threads]
            for each in trees
        ]
        forest = Forest(stems, ledger, torch.device("cpu"))
        assert all(isinstance(group.columns, slice) for group in forest.groups)
        for stem in forest.stems:
            accepted, *rejected = stem.drafted_slots.tolist()
            ledger.book(stem.thread, [accepted])
            ledger.pool.release(rejected)
            stem.thread.tokens += [9, 9]
        ledger.check()
        if step == 5:
            for each in trees:
                each.trunk.tokens[-1] = FORK
                each.fork(each.trunk, len(each.trunk.tokens) - 1, 0)
    assert forest.stems[-1].cached > 60
