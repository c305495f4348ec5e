"""Random requests written step by step through the real forest and fork manager, as hypothesis draws them."""

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.engine.commit import commit
from medusa_apar.forest.forest import Forest, Segment
from medusa_apar.kv.pool import KVPool
from medusa_apar.kv.slot_ledger import SlotLedger
from medusa_apar.threads.fork_manager import ForkManager
from medusa_apar.threads.fork_policy import ControlTokenForks, NoForks
from medusa_apar.threads.fork_rule import ForkRule
from medusa_apar.threads.paragraph_tree import ParagraphTree
from medusa_apar.threads.request import Request, RequestOptions
from medusa_apar.verify.verify_result import VerifyResult

FORK, CHILD, EOS = 1, 2, 0


@dataclass
class Script:
    """A random request written step by step through the real forest and fork manager, tokens drawn by hypothesis."""

    data: st.DataObject
    ledger: SlotLedger = field(default_factory=lambda: SlotLedger(KVPool()))
    steps: int = 6
    policy: NoForks = field(default_factory=ControlTokenForks)
    fork_id: int | None = FORK

    def run(self, after_step=lambda forest, trees: None) -> list[ParagraphTree]:
        draw = self.data.draw
        lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
        rule = None if self.fork_id is None else ForkRule(self.fork_id, CHILD, 3)
        options = RequestOptions(eos_ids=frozenset({EOS}), policy=self.policy, rule=rule)
        requests = [Request(str(row), [9] * length, options, key=7) for row, length in enumerate(lengths)]
        trees, manager = [request.tree for request in requests], ForkManager(None)
        for tree in trees:
            self.ledger.share(tree.trunk, "")
        for _ in range(self.steps):
            running = [segments for request in requests if (segments := self._segments(request))]
            if not running:
                break
            forest = Forest(running, self.ledger, torch.device("cpu"))
            after_step(forest, trees)
            for segment in forest.verified:
                commit(segment, self._verify_result(segment), manager, self.ledger)
            self.ledger.check()
        return trees

    def cached_path(self, thread) -> list[int]:
        """Slots of what is cached on the path; a `[Fork]` just accepted is not."""
        booked = self.ledger._slots
        return [slot for t, stop in [*thread.ancestors(), (thread, None)] for slot in booked.get(t, [])[:stop]]

    def _segments(self, request: Request) -> list[Segment]:
        segments = []
        for thread in request.tree.depth_first():
            if thread.live:
                size = self.data.draw(st.integers(0, 6))
                draft_tree = DraftTree.likeliest(8)
                tokens = [20 + node for node in range(size)]
                segment = Segment(
                    thread, len(thread.tokens), draft_tree=draft_tree, draft_tokens=tokens, request=request
                )
                segments.append(segment)
        return segments

    def _verify_result(self, segment: Segment) -> VerifyResult:
        """Walks a random way down the draft tree, then one more token; any token may turn out to be any other."""
        nodes, node = [], -1
        parents = segment.draft_tree.parents[: len(segment.draft_tokens)].tolist()
        while (below := [n for n, p in enumerate(parents) if p == node]) and self.data.draw(st.booleans()):
            node = self.data.draw(st.sampled_from(below))
            nodes.append(node)
        tokens = []
        previous = segment.thread.tokens[-1]
        for _ in range(len(nodes) + 1):
            choice = self.data.draw(st.sampled_from([5, 6, FORK, FORK, EOS]))
            previous = 5 if choice == FORK and previous in (FORK, CHILD) else choice
            tokens.append(previous)
        return VerifyResult(tokens, nodes, 0)


class Evicting(Script):
    """Threads wait, are evicted, and are fed again with what they and their ancestors have lost, but for what a prefix
    cache has."""

    def _segments(self, request) -> list[Segment]:
        draw, tree = self.data.draw, request.tree
        live = [thread for thread in tree.depth_first() if thread.live]
        for thread in live:
            if draw(st.integers(0, 3)) == 0:
                self.ledger.evict(thread)
        self.ledger.check()
        chosen: dict = {}
        for thread in live:
            parent = thread.parent
            pending = parent is not None and parent.live and thread.fork_index == len(parent.tokens) - 1
            if draw(st.integers(0, 3)) and not (pending and parent not in chosen):
                chosen[thread] = draw(st.integers(0, 6))
                self.ledger.resume(thread)
                for found in self.ledger.found(thread):
                    self.ledger.assign(*found)
        fed: dict = {}
        for thread in chosen:
            for member, stop in self.ledger.missing(thread):
                fed[member] = max(fed.get(member, 0), stop)
        segments = [
            Segment(thread, len(thread.tokens), True, DraftTree.likeliest(8), [20 + n for n in range(chosen[thread])])
            if thread in chosen
            else Segment(thread, fed[thread], verified=False)
            for thread in tree.depth_first()
            if thread in fed
        ]
        for segment in segments:
            segment.request = request
        return segments
