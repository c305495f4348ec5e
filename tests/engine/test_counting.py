"""Tokens that threads write, beside those that are read."""

import pytest

import medusa_apar
from tests.support.drafters import RecallHeads
from tests.support.models import CONTROL, forking_model
from tests.support.tokenizers import tiny_tokenizer

PROMPTS = {str(number): [7, 8, 9 + number] for number in range(3)}


def answered(fork, heads=None, limit=24):
    """(stats, requests) after every step, for three requests."""
    guesses = "off" if heads is None else "even"
    apar = medusa_apar.attach(forking_model(24), heads, CONTROL, tokenizer=tiny_tokenizer(), speculation=guesses)
    with apar.engine() as engine:
        requests = [apar.request(name, ids, max_new_tokens=limit, fork=fork) for name, ids in PROMPTS.items()]
        for request in requests:
            engine.add(request)
        while engine.unfinished:
            engine.step()
            yield engine.snapshot(), requests


def chosen(request):
    return sum(len(thread.token_ids) - len(thread.inserted) for thread in request.tree.threads)


@pytest.mark.parametrize("guessed", [False, True])
def test_what_threads_write_is_counted_whoever_reads_it(guessed):
    heads = None
    if guessed:
        *_, (_, requests) = answered("auto")
        heads = RecallHeads(forking_model(24), [request.tree for request in requests])
    seen = []
    for stats, requests in answered("auto", heads):
        running = [request for request in requests if not request.status.ended]
        assert stats.written_tokens == sum(map(chosen, requests))
        assert stats.unread_tokens == sum(chosen(request) - len(request.text) for request in running)
        seen.append(stats)
    assert max(stats.unread_tokens for stats in seen) > 8 and seen[-1].unread_tokens == 0
    assert seen[-1].written_tokens > seen[-1].generated_tokens == sum(len(request.text) for request in requests)
    assert len(seen) < 24 or not guessed  # what was guessed was written


def test_one_thread_writes_what_is_read_and_its_end():
    *_, (stats, requests) = answered("off", limit=40)
    ends = sum(request.finish_reason == "stop" for request in requests)
    assert stats.written_tokens == stats.generated_tokens + ends


@pytest.mark.parametrize("guessed", [False, True])
def test_printed_counts_are_a_few_lines_without_what_was_not_done(guessed):
    heads = None
    *_, (stats, requests) = answered("auto")
    if guessed:
        heads = RecallHeads(forking_model(24), [request.tree for request in requests])
        *_, (stats, _) = answered("auto", heads)
    first, second, *rest = str(stats).splitlines()
    assert first.startswith(f"{stats.generated_tokens} tokens in {stats.steps} steps, {stats.tokens_per_step:.2f} a")
    assert second.startswith(f"{stats.forks} forks, {stats.peak_threads} threads") and stats.forks > 0
    assert len(rest) == int(guessed)
    for line in rest:
        assert f"{stats.accepted['heads']} of {stats.drafted['heads']} by heads" in line
