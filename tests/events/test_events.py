"""Events tell the whole story: what they add up to is what the decoder did."""

import dataclasses
import json
import time
from collections import Counter
from itertools import pairwise

import pytest
import torch

import medusa_apar
from medusa_apar.events import (
    RequestStarted,
    StepFinished,
    StepStarted,
    ThreadContinuedParent,
    ThreadFinished,
    ThreadStarted,
    TokensAccepted,
    TokensInserted,
    TokensRejected,
)
from medusa_apar.events.recording import ReadingOrder, Recording
from tests.support.calls import CALLS, fork_freely, fork_lists
from tests.support.models import CONTROL, forking_model
from tests.support.prompts import prompts


@pytest.fixture(scope="module", params=CALLS)
def out(request):
    return CALLS[request.param]()


def told(thread):
    """All of a thread that reading and replaying need."""
    names = ("index", "fork_index", "tokens", "num_forced", "start", "depth", "finish_reason", "seen", "line_break")
    names += ("ends_line", "continues_parent", "inserted")
    return {name: getattr(thread, name) for name in names} | {"parent": thread.parent and thread.parent.index}


def test_a_recording_is_the_paragraph_tree(out):
    recording = out.recording
    assert len(recording.trees) == len(out.paragraph_tree)
    assert recording.rows == {str(row): row for row in range(len(recording.trees))}
    width = max(tree.trunk.num_forced for tree in recording.trees)  # of the padded prompts
    for row, (ours, theirs) in enumerate(zip(recording.trees, out.paragraph_tree, strict=True)):
        assert [told(thread) for thread in ours.threads] == [told(thread) for thread in theirs.threads]
        ids = [thread.tokens[index] for thread, index in recording.text(row)]
        assert ids == out.sequences[row, width : width + len(ids)].tolist()
        assert len(ids) == recording.readable(row)
        assert all(len(recording.origins[thread]) == len(thread.token_ids) for thread in ours.threads)


def test_figures_are_those_of_the_stats(out):
    steps, stats = out.recording.steps, out.stats
    assert [step.step for step in steps] == list(range(1, stats.steps + 1))
    assert sum(step.rows for step in steps) == stats.forward_tokens
    assert max(step.slots_used for step in steps) == stats.peak_slots
    assert steps[-1].slots_kept == stats.final_slots == 0
    assert all(a.seconds < b.seconds for a, b in pairwise(steps))
    lengths = dict.fromkeys(out.recording.rows, 0)
    for step in steps:
        changed = dict(step.text_lengths)
        assert len(changed) == len(step.text_lengths)
        assert all(length > lengths[name] for name, length in changed.items())  # of what changed, and no other
        lengths |= changed
    assert sum(lengths.values()) == stats.generated_tokens
    assert list(lengths.values()) == [out.recording.readable(row) for row in range(len(out.sequences))]
    forests = [event.drafted for event in out.events if isinstance(event, StepStarted)]
    sources = Counter(source for forest in forests for drafted in forest for source in drafted.sources)
    named = {"heads": "heads", "ngrams": "ngrams", "fork": "forks"}
    assert sources == Counter({source: stats.drafted[name] for source, name in named.items()})
    assert max(sum(drafted.verified for drafted in forest) for forest in forests) == stats.peak_threads


def test_every_guess_is_accepted_or_rejected(out):
    """Each node of a step's draft trees becomes a token, a child's `[Child]`, or is told to be wrong."""
    fed, by_step = {}, {}
    for event in out.events:
        by_step.setdefault(event.step, []).append(event)
    for events in by_step.values():
        guessed = {}
        for event in events:
            match event:
                case StepStarted():
                    for drafted in event.drafted:
                        key = drafted.request, drafted.thread
                        guessed[key] = dict(enumerate(drafted.token_ids))
                        assert len(drafted.token_ids) == len(drafted.parents) == len(drafted.sources)
                        assert all(parent < node for node, parent in enumerate(drafted.parents))
                        assert fed.get(key, 0) >= drafted.cached  # fewer after it had been evicted
                        fed[key] = drafted.cached + drafted.pending
                case TokensAccepted():
                    fed[event.request, event.thread] = fed.get((event.request, event.thread), 1) + len(event.nodes)
                    nodes = guessed.get((event.request, event.thread), {})
                    assert [nodes.pop(node) for node in event.nodes] == list(event.token_ids[: len(event.nodes)])
                case TokensRejected():
                    nodes = guessed[event.request, event.thread]
                    assert [nodes.pop(node) for node in event.nodes] == list(event.token_ids)
                case StepFinished():
                    left = [token for nodes in guessed.values() for token in nodes.values()]
                    assert set(left) <= {CONTROL.child_id}


def test_any_moment_can_be_replayed(out):
    recording = out.recording
    last = recording.steps[-1].step
    for step in {0, 1, last // 2, last}:
        then = recording.at(step)
        assert len(then.steps) == step and not then.checking
        for row, tree in enumerate(then.trees):
            for early, late in zip(tree.threads, recording.trees[row].threads, strict=False):
                assert late.tokens[: len(early.tokens)] == early.tokens
            assert all(origin.step <= step for thread in tree.threads for origin in then.origins[thread])
        if step:
            middle = recording.at(step, checking=True)
            assert middle.checking and len(middle.steps) == step - 1
            assert len(middle.drafted) == len(middle.events[-1].drafted)
    assert recording.at(last).events == recording.events == out.events


def test_events_are_plain_data(out):
    def plain(value):
        return sorted(value) if isinstance(value, frozenset) else value

    text = json.dumps([[type(event).__name__, dataclasses.asdict(event)] for event in out.events], default=plain)
    assert len(json.loads(text)) == len(out.events)
    for event in out.events:
        with pytest.raises(dataclasses.FrozenInstanceError):
            event.step = 0


def test_all_kinds_occur():
    """Or the tests above would show nothing."""
    kinds = {type(event) for out in (fork_freely(), fork_lists()) for event in out.events}
    assert kinds == {
        *(RequestStarted, ThreadStarted, StepStarted, TokensAccepted, TokensRejected, TokensInserted),
        *(ThreadContinuedParent, ThreadFinished, StepFinished),
    }
    origins = [own for out in (fork_freely(), fork_lists()) for own in out.recording.origins.values()]
    sources = {origin.source for own in origins for origin in own}
    assert sources == {"heads", "ngrams", "model", "rule"}
    recording = fork_freely().recording
    at_once = [thread for thread, own in recording.origins.items() if own and own[0].step == recording.started[thread]]
    assert at_once  # threads whose [Child] had been guessed


def test_what_is_fed_again_is_told():
    """Under memory pressure threads lose their slots, and later their ancestors run beside them."""
    out = CALLS["under memory pressure"]()
    assert out.stats.preemptions > 0 and out.stats.thread_preemptions > 0
    forests = [event.drafted for event in out.events if isinstance(event, StepStarted)]
    assert any(not drafted.verified for forest in forests for drafted in forest)
    cached, lost = {}, 0
    for drafted in (drafted for forest in forests for drafted in forest):
        key = drafted.request, drafted.thread
        lost += drafted.cached < cached.get(key, 0)
        cached[key] = drafted.cached
    assert lost >= 3


def test_those_who_wait_for_room_are_told_of_before_they_run():
    out = CALLS["one after the other"]()
    names = ["0", "1", "2"]
    assert [event.request for event in out.events if event.step == 0] == [name for name in names for _ in range(2)]
    begun, ended = {}, {}
    for event in out.events:
        if isinstance(event, StepStarted):
            for drafted in event.drafted:
                begun.setdefault(drafted.request, event.step)
                ended[drafted.request] = event.step
    assert list(begun) == names and out.stats.preemptions == 0
    assert begun["0"] == 1 and all(ended[first] < begun[second] for first, second in pairwise(names))


def test_what_is_written_anew_is_told_as_first_written():
    """That needs more than the limit, but what can be read ends there."""
    first, out = fork_freely(), fork_freely(generate={"rescore": True, "regenerate_below": 0.9})
    assert out.stats.regenerated and not torch.equal(out.sequences, first.sequences)
    for row in range(2):
        texts = [[thread.tokens[index] for thread, index in o.recording.text(row)] for o in (first, out)]
        assert texts[0] == texts[1]
        assert out.recording.readable(row) <= 40


@pytest.mark.parametrize("kind", [StepStarted, StepFinished])
def test_a_consumer_may_generate_or_fail_at_any_time(kind):
    model, done = forking_model(5), []
    apar = medusa_apar.attach(model, None, CONTROL, speculation="forest")
    options = {**prompts(1, 6), "max_new_tokens": 20, "do_sample": False}
    expected = apar.generate(**options)

    def generate(event):
        if isinstance(event, kind) and event.step == 2:
            done.append(apar.generate(**options))

    assert torch.equal(apar.generate(**options, events=generate), expected)
    assert torch.equal(done[0], expected)

    def fail(event):
        if isinstance(event, kind) and event.step == 2:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        apar.generate(**options, events=fail)
    assert torch.equal(apar.generate(**options), expected)


def test_a_consumer_of_several_calls_has_the_latest():
    apar = medusa_apar.attach(forking_model(5), None, CONTROL)
    recording, again = Recording(), Recording()
    for rows in (2, 1):
        sequences = apar.generate(**prompts(rows, 6), max_new_tokens=30, do_sample=False, events=recording)
    apar.generate(**prompts(1, 6), max_new_tokens=30, do_sample=False, events=again)
    assert len(recording.trees) == 1 and len(recording.steps) == len(again.steps)
    ids = [thread.tokens[index] for thread, index in recording.text()]
    assert ids == sequences[0, 6 : 6 + len(ids)].tolist()


def test_guesses_are_told_of_before_they_are_checked():
    """And a call whose output keeps nothing tells the same."""
    model, told, texts = forking_model(5), [], []
    apar = medusa_apar.attach(model, None, CONTROL, speculation="forest")
    inputs = prompts(1, 6)
    forward = apar.runtime.step

    def step(forest, *arguments):
        texts.append(told[-1])
        return forward(forest, *arguments)

    apar.runtime.step = step
    sequences = apar.generate(**inputs, max_new_tokens=30, do_sample=False, events=told.append)
    assert all(isinstance(event, StepStarted) for event in texts)
    assert [event.step for event in texts] == list(range(1, len(texts) + 1))
    apar.runtime.step = forward
    out = apar.generate(**inputs, max_new_tokens=30, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences, sequences)

    def timeless(events):
        return [dataclasses.replace(e, seconds=0.0) if isinstance(e, StepFinished) else e for e in events]

    assert timeless(told) == timeless(out.events)


def test_time_of_consumers_is_in_no_figure():
    apar = medusa_apar.attach(forking_model(5), None, CONTROL)
    started = time.perf_counter()
    out = apar.generate(
        **prompts(1, 6),
        max_new_tokens=12,
        do_sample=False,
        return_dict_in_generate=True,
        events=lambda event: time.sleep(0.01),
    )
    whole = time.perf_counter() - started
    slept = 0.01 * len(out.events)
    stats = out.stats
    assert out.recording.steps[-1].seconds <= whole - slept
    assert stats.prefill_seconds + stats.decode_seconds <= whole - slept
    assert sum(stats.phase_seconds.values()) <= whole - slept


def test_each_row_can_have_a_streamer_of_its_own():
    class Collector:
        def __init__(self):
            self.ids, self.ended = [], 0

        def put(self, value):
            assert not self.ended
            self.ids += value.flatten().tolist()

        def end(self):
            self.ended += 1

    apar = medusa_apar.attach(forking_model(24), None, CONTROL)
    inputs = prompts(3, 6)
    collectors = [Collector() for _ in range(3)]
    orders = [ReadingOrder(collector, row) for row, collector in enumerate(collectors)]
    arrived = []

    def consume(event):
        for order in orders:
            order(event)
        if isinstance(event, StepFinished):
            arrived.append(len(collectors[0].ids))

    sequences = apar.generate(**inputs, max_new_tokens=40, do_sample=False, events=consume)
    for row, collector in enumerate(collectors):
        assert collector.ended == 1
        assert collector.ids == sequences[row, : len(collector.ids)].tolist()
        assert set(sequences[row, len(collector.ids) :].tolist()) <= {0}
    assert len(set(arrived)) > 5


def test_a_recording_of_nothing():
    recording = Recording.of([])
    assert recording.step == 0 and not recording.trees and recording.at(3).events == []
