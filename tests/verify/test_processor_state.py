"""Logits processors that keep state between calls: who they are, where they work and where they are refused."""

import io
import itertools
import logging
import math
import random
import re
import threading
from array import array
from collections import deque
from datetime import datetime
from decimal import Decimal
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import medusa_apar
from medusa_apar.heads import MedusaHeads
from medusa_apar.verify import processor_state
from medusa_apar.verify.control_processor import ControlTokensLogitsProcessor
from medusa_apar.verify.processor_state import StateWatch
from tests.support.drafters import RecallHeads
from tests.support.models import CONTROL, FORK, VOCAB, forking_model, tiny_model
from tests.support.oracles import assert_chosen_tokens_are_the_models
from tests.support.prompts import prompts
from tests.support.tokenizers import tiny_tokenizer

LIMIT = 24
GREEDY = {"do_sample": False, "max_new_tokens": LIMIT}


class Counting(LogitsProcessor):
    """Another shift at every call, whatever the ids."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores.roll(self.calls % 5, -1)


class Remembering(LogitsProcessor):
    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(int(input_ids[0, -1]))
        return scores.roll(sum(self.seen) % 5, -1)


class Drawing(LogitsProcessor):
    def __init__(self):
        self.generator = torch.Generator().manual_seed(4)

    def __call__(self, input_ids, scores):
        return scores + torch.randn(scores.shape[-1], generator=self.generator)


class Nested(LogitsProcessor):
    def __init__(self):
        self.inner = {"count": Counting()}

    def __call__(self, input_ids, scores):
        return self.inner["count"](input_ids, scores)


class Buffered(LogitsProcessor):
    def __init__(self):
        self.total = torch.zeros(VOCAB)

    def __call__(self, input_ids, scores):
        self.total += scores[0] / 10
        return scores - self.total


class Window(LogitsProcessor):
    """The last few tokens that were seen."""

    def __init__(self):
        self.seen = deque([0] * 4, maxlen=4)

    def __call__(self, input_ids, scores):
        self.seen.append(int(input_ids[0, -1]))
        return scores.roll(sum(self.seen) % 5, -1)


class Words(LogitsProcessor):
    """Holds compiled code, which cannot be looked into."""

    def __init__(self):
        self.shifts = itertools.cycle(range(5))

    def __call__(self, input_ids, scores):
        return scores.roll(next(self.shifts), -1)


def enclosed():
    calls = 0

    def count(input_ids, scores):
        nonlocal calls
        calls += 1
        return scores.roll(calls % 5, -1)

    return count


STATEFUL = [Counting, Remembering, Drawing, Nested, Buffered, Window, Words, enclosed]


@pytest.mark.parametrize("make", STATEFUL)
def test_a_stateful_processor_works_where_one_thread_calls_it_in_order(make):
    """Twice with the same one, so that nobody may have called it more often than transformers does."""
    model = tiny_model(seed=5, eos=2.0)
    plain, ours = make(), make()
    for seed in (1, 2, 3):
        inputs = prompts(1, 6, seed=seed)
        expected = model.generate(**inputs, **GREEDY, logits_processor=[plain])
        tree = (
            medusa_apar.attach(model)
            .generate(**inputs, **GREEDY, logits_processor=[make()], return_dict_in_generate=True)
            .paragraph_tree
        )
        apar = medusa_apar.attach(model, RecallHeads(model, tree))
        assert torch.equal(apar.generate(**inputs, **GREEDY, logits_processor=[ours]), expected)


@pytest.mark.parametrize("how", ["rows", "threads", "typical acceptance"])
@pytest.mark.parametrize("make", STATEFUL)
def test_a_stateful_processor_is_refused_where_its_state_would_be_mixed(make, how):
    rows = 2 if how == "rows" else 1
    attach = {"acceptance": "typical"} if how.startswith("typical") else {}
    options = GREEDY | ({"do_sample": True} if attach else {})
    model = forking_model(24)
    apar = medusa_apar.attach(model, MedusaHeads.random(model), CONTROL, **attach)
    with pytest.raises(ValueError, match="keeps? state .*between its calls"):
        apar.generate(**prompts(rows, 6), **options, fork=how == "threads", logits_processor=[Wants(make())])


class Wants(LogitsProcessor):
    """Another's scores, and `[Fork]` now and then."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, input_ids, scores):
        scores = self.inner(input_ids, scores).clone()
        scores[:, FORK] = torch.where(input_ids[:, -1] % 3 == 0, 1000.0, scores[:, FORK])
        return scores


class Lazy(LogitsProcessor):
    """Keeps what it makes once, and results by what they are results of."""

    def __init__(self):
        self.shift, self.known, self.lengths = None, {}, set()

    def __call__(self, input_ids, scores):
        if self.shift is None:
            self.shift = torch.linspace(0, 3, scores.shape[-1])
        self.lengths.add(input_ids.shape[1])
        shifts = [self.known.setdefault(tuple(ids), ids[-1] % 5) for ids in input_ids.tolist()]
        return torch.stack([row.roll(shift) for row, shift in zip(scores, shifts, strict=True)]) + self.shift


@pytest.mark.parametrize("fork", [False, True])
def test_a_cache_is_no_state(fork):
    model = forking_model(24)
    options = GREEDY | {"return_dict_in_generate": True}
    apar = medusa_apar.attach(model, MedusaHeads.random(model), CONTROL)
    out = apar.generate(**prompts(2, 6), **options, fork=fork, logits_processor=[Lazy()])
    process = LogitsProcessorList([Lazy(), ControlTokensLogitsProcessor(CONTROL, 6, fork)])
    assert assert_chosen_tokens_are_the_models(model, out.paragraph_tree, None, process) >= LIMIT


class Thing:
    __slots__ = ("value",)


class Registered(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
        self.register_buffer("count", torch.zeros(1))


def remembering(seen=[]):  # noqa: B006
    seen.append(0)


# What is kept, and what a call does to it.
STATES = {
    "a deque": (lambda: deque([0] * 4, maxlen=4), lambda kept: kept.append(kept[-1] + 1)),
    "a bytearray": (lambda: bytearray(8), lambda kept: kept.__setitem__(3, kept[3] + 1)),
    "an array": (lambda: array("q", [0] * 9), lambda kept: kept.__setitem__(3, kept[3] + 1)),
    "a numpy array": (lambda: np.zeros(VOCAB), lambda kept: kept.__setitem__(7, kept[7] + 1)),
    "numpy of no dimension": (lambda: np.zeros(()), lambda kept: kept.__iadd__(1)),
    "a large numpy array": (lambda: np.zeros((1000, 1000)), lambda kept: kept.__iadd__(1)),
    "a strided numpy array": (lambda: np.zeros((9, 9))[:, ::2], lambda kept: kept.__iadd__(1)),
    "numpy's generator": (lambda: np.random.default_rng(3), lambda kept: kept.random()),
    "numpy's old generator": (lambda: np.random.RandomState(3), lambda kept: kept.rand()),
    "python's generator": (lambda: random.Random(3), lambda kept: kept.random()),
    "torch's generator": (lambda: torch.Generator(), lambda kept: torch.rand(1, generator=kept)),
    "an iterator": (lambda: iter(range(9)), lambda kept: next(kept)),
    "an iterator's method": (lambda: itertools.count().__next__, lambda kept: kept()),
    "a generator": (lambda: (index for index in range(9)), lambda kept: next(kept)),
    "a buffer of a module": (Registered, lambda kept: kept.count.add_(1)),
    "a buffer of a module's module": (Registered, lambda kept: kept.inner(torch.ones(2, 2))),
    "an attribute of a module": (Registered, lambda kept: setattr(kept, "calls", getattr(kept, "calls", 0) + 1)),
    "a default argument": (lambda: remembering, lambda kept: kept()),
    "an argument of a partial": (lambda: partial(list.append, []), lambda kept: kept(0)),
    "a method of a list": (lambda: [].append, lambda kept: kept(0)),
    "behind a large trie": (
        lambda: [{first: {second: {} for second in range(64)} for first in range(64)}] * 3 + [[0]],
        lambda kept: kept[-1].__setitem__(0, kept[-1][0] + 1),
    ),
    "a large set": (lambda: set(range(500)), lambda kept: kept.pop()),
}
NO_STATES = {
    "a large set that grows": (lambda: set(range(40)), lambda kept: kept.update(range(len(kept) + 40))),
    "a large dict that grows": (lambda: {-1: 0}, lambda kept: kept.update(dict.fromkeys(range(len(kept) + 40), 0))),
    "a numpy array": (lambda: np.zeros(VOCAB), lambda kept: kept.sum()),
    "an array of objects": (lambda: np.array([None, "a"], dtype=object), lambda kept: kept.tolist()),
    "a module": (Registered, lambda kept: kept.eval().inner(torch.ones(2, 2))),
    "a model": (lambda: tiny_model(), lambda kept: kept(torch.ones(1, 3, dtype=torch.long))),
    "a tokenizer": (tiny_tokenizer, lambda kept: kept("ab")),
    "a backend of a tokenizer": (lambda: tiny_tokenizer().backend_tokenizer, lambda kept: kept.encode("ab")),
    "a compiled regex": (lambda: re.compile("a"), lambda kept: kept.match("a")),
    "a lock": (threading.Lock, lambda kept: kept.locked()),
    "a lock of an owner": (threading.RLock, lambda kept: kept.acquire()),
    "a logger": (lambda: logging.getLogger("tests"), lambda kept: kept.debug("a call")),
    "a stream": (io.StringIO, lambda kept: kept.write("a call")),
    "functions": (lambda: [len, torch.softmax, np.mean, np.exp, str.upper, math.sqrt, partial(max, 1)], len),
    "a cached function": (lambda: lru_cache(lambda value: value), lambda kept: kept(len(str(kept.cache_info())))),
    "values": (lambda: [1j, b"", np.float32(2), range(3), datetime.now(), Decimal(1), ..., object()], len),
    "of torch": (lambda: [torch.device("cpu"), torch.float16, torch.Size([2])], len),
    "a path": (lambda: Path("a"), str),
}


@pytest.mark.parametrize("which", [*STATES, *(f"no state: {name}" for name in NO_STATES)])
def test_what_a_call_changes_counts_as_state_unless_it_is_a_cache(which):
    make, call = STATES[which] if which in STATES else NO_STATES[which.removeprefix("no state: ")]
    thing = Thing()
    thing.value = make()
    watch = StateWatch([thing])
    for _ in range(3):
        call(thing.value)
        watch.called()
    assert (watch.stateful is not None) == (which in STATES), watch.stateful


def test_state_that_begins_late_is_found():
    thing = Thing()
    watch = StateWatch([thing])
    for thing.value in [0] * 300 + list(range(32)):
        watch.called()
    assert watch.stateful == "Thing keeps state"


@pytest.mark.parametrize("branches", [8, 64])
def test_a_look_takes_no_longer_for_a_large_trie(branches):
    trie = {first: {second: dict.fromkeys(range(branches)) for second in range(branches)} for first in range(branches)}
    picture = processor_state._picture(lambda row, ids: list(trie))
    assert processor_state._ENTRIES < len(picture) <= processor_state._NODES


@pytest.mark.parametrize(
    ("states", "stateful"),
    [
        ([1, 2], True),
        ([2, 2, 2], False),
        ([2, 2, 3, 3], True),
        (["a", "b"], True),
        ([[1], [1, 2]], True),
        ([[1], [1]], False),
        ([{1: 2}, {1: 2, 3: 4}], False),
        ([{1: 2}, {1: 3}], True),
        ([{1, 2}, {1, 2, 3}], False),
        ([{1, 2}, {1}], True),
        ([torch.zeros(2), torch.zeros(2)], True),
        ([torch.Tensor, torch.Tensor], False),
        ([float("nan"), float("nan")], False),
        ([float("nan"), 1.0], True),
        ([1.0, 1], True),
    ],
    ids=str,
)
def test_what_counts_as_state(states, stateful):
    thing = Thing()
    watch = StateWatch([thing])
    for thing.value in states:
        watch.called()
    assert (watch.stateful == "Thing keeps state") == stateful
