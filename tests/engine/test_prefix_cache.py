"""An engine with a prefix cache writes what a cold one writes, to the bit, and says what it found."""

import os

import pytest
import torch
from transformers import LlamaConfig

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.drafting.options import Speculation
from medusa_apar.engine.engine import Engine
from medusa_apar.engine.options import EngineOptions
from medusa_apar.runtimes.pick import pick_runtime
from medusa_apar.threads.request import Status
from tests.support.drafters import RecallHeads
from tests.support.models import CONTROL, EOS, VOCAB, WIDE, random_model
from tests.support.warm_engines import COST, backend, checked, cold, prompt, request, run, shared


def same_bits(one, other):
    """The text, and of every thread that both have the tokens and the logits that they were chosen by. What nobody can
    read any more was cut off sooner or later."""
    assert one.text_ids == other.text_ids
    its = {thread.key: thread for thread in other.tree.threads}
    for thread in one.tree.threads:
        twin = its.get(thread.key, thread)
        length = min(len(thread.tokens), len(twin.tokens))
        assert thread.tokens[:length] == twin.tokens[:length]
        ours, theirs = one.logits.get(thread, []), other.logits.get(twin, [])
        assert all(map(torch.equal, ours, theirs))
    for each in (one, other):
        assert all(index - thread.num_forced < len(each.logits.get(thread, [])) for thread, index in each.text)


def common(first, second) -> int:
    return len(os.path.commonprefix([list(first), list(second)]))


def paths(one):
    """What a request that has ended leaves in the cache: each thread's last token was never fed."""
    return [thread.ancestor_ids() + thread.tokens[:-1] for thread in one.tree.threads]


@pytest.mark.parametrize("name", ["cpu", "int8", "one launch"])
def test_prompts_that_begin_as_another_did_are_answered_as_cold_ones(name):
    """By one token, one less than all, all, one more; and as another's answer goes on."""
    first = prompt(1)
    with shared(name) as engine:
        before = run(engine, request("first", first, logits=True))
        assert before.stats.cached_tokens == 0
        other = next(token for token in range(5, VOCAB) if token not in {path[40] for path in paths(before)[:1]})
        for ids in ([first[0], 9, 8], first[:-1], first, [*first, other], paths(before)[-1][:-2], [8, 9]):
            again = run(engine, request("again", ids, logits=True))
            alone = cold(name, ids, logits=True)
            hit = min(max(common(ids, path) for path in paths(before)), len(ids) - 1)
            assert again.stats.cached_tokens >= hit and (again.stats.cached_tokens == hit or len(ids) > 3)
            if name in ("cpu", "int8"):
                same_bits(again, alone)
            assert again.text_ids == alone.text_ids
        assert engine.stats.prefix_cache_hits > 100
        assert engine.stats.prefix_cache_queries == 40 + 3 + 39 + 40 + 41 + len(paths(before)[-1]) - 2 + 2
    assert engine.ledger.pool.in_use == 0 and engine.stats.cached_slots == 0


@pytest.mark.parametrize("length", [1, 2, 39, 40, 41])
def test_the_length_of_a_hit_is_what_is_common_but_for_the_last_token(length):
    first = prompt(1)
    ids = first[:length] if length <= 40 else [*first, 5]
    with shared() as engine:
        run(engine, request("first", first, limit=1))
        whole, differs = (run(engine, request(n, x, limit=1)) for n, x in (("a", ids), ("b", [*ids[:-1], EOS, 9])))
    assert whole.stats.cached_tokens == differs.stats.cached_tokens == length - 1


def test_outputs_say_it_from_the_first_on():
    with shared() as engine:
        run(engine, request("first", prompt(1)))
        engine.add(request("second", [*prompt(1), 7]))
        outputs = []
        while engine.unfinished:
            outputs += engine.step()
    assert len(outputs) > 1 and {output.cached_tokens for output in outputs} == {40}


@pytest.mark.parametrize(("name", "fork"), [("cpu", True), ("cpu", False), ("torch", True)])
def test_a_chats_second_turn_finds_the_first_up_to_its_first_fork(name, fork):
    with shared(name) as engine:
        first = run(engine, request("first", prompt(1), fork, limit=30))
        ids = [*prompt(1), *first.text_ids, 9, 8, 7]
        second = run(engine, request("second", ids, fork))
    forks = [place for place, token in enumerate(first.tree.trunk.tokens) if token == CONTROL.fork_id]
    assert fork == bool(forks)
    assert second.stats.cached_tokens == max(common(ids, path) for path in paths(first))
    assert second.stats.cached_tokens >= min([*forks, len(ids) - 4])
    assert second.text_ids == cold(name, ids, fork=fork).text_ids


@pytest.mark.parametrize("name", ["cpu", "one launch"])
def test_a_request_finds_what_one_that_still_runs_has_fed(name):
    running, warm = request("running", prompt(1), limit=60), request("warm", [*prompt(1), 7])
    with shared(name) as engine:
        engine.add(running)
        for _ in range(3):
            engine.step()
        engine.add(warm)
        engine.step()
        checked(engine)
        assert running.status is warm.status is Status.DECODING and warm.stats.cached_tokens == 40
        assert engine.ledger.pool.live < 80
        engine.abort("running")
        checked(engine)
        run(engine)
    assert warm.text_ids == cold(name, warm.prompt_ids).text_ids


def test_what_a_step_feeds_is_not_taken_from_what_the_same_step_preempts():
    """A request is fed again: a thread, and the trunk up to its fork. Then a thread of another that wrote the same
    is preempted, and leaves the trunk up to the next fork in the cache. What was planned goes on where it was."""
    never = {"eos_ids": frozenset(), "limit": 60}
    with shared(pool_slots=600, max_prefill_rows=500, budget=24) as engine:  # every thread is worth its row
        ledger, pool, scheduler = engine.ledger, engine.ledger.pool, engine.scheduler
        twin, first = (request(name, prompt(4), priority=rank, **never) for name, rank in (("twin", 2), ("first", 0)))
        beside = request("beside", prompt(2, 5), fork=False, priority=1, **never)
        for ahead, one in ((0, twin), (7, beside), (0, first)):
            for _ in range(ahead):
                engine.step()
            engine.add(one)
        while ledger.cached(first.tree.trunk) < 56:
            engine.step()
        earlier, later = first.tree.threads[1:3]
        assert earlier.parent is later.parent is first.tree.trunk and earlier.seen + 4 < later.seen < 56
        scheduler._preempt(first)
        ledger.reset_prefix_cache()
        scheduler.needs.share = 0.0  # that it is let in where it only just fits
        scheduler.needs._peaks.clear()
        pool.max_slots = pool.live + earlier.seen + len(earlier.tokens)  # no room for a row of the others
        engine.step()
        checked(engine)
        assert engine.stats.thread_preemptions > 0 and ledger.cached(first.tree.trunk) == earlier.seen
        ((member, slots), *_) = ledger.found(later)
        assert member is first.tree.trunk and len(slots) == later.seen - earlier.seen
        pool.max_slots = 600
        run(engine)
    assert first.text_ids == cold("cpu", first.prompt_ids, **never).text_ids


@pytest.mark.parametrize(("rows", "length"), [(None, 500), (7, 500), (7, 504)])  # the last: a piece of one row
def test_requests_that_arrive_together_feed_what_is_common_once(rows, length):
    config = LlamaConfig(**WIDE | {"max_position_embeddings": 2048, "num_hidden_layers": 1}, eos_token_id=EOS)
    model = random_model(config, 3, scale=3.0)
    parts, ids = (model, pick_runtime(model, "auto", None, "auto")), prompt(2, length)
    plain = {"fork": False, "eos_ids": frozenset(), "limit": 20}
    its = [request(str(n), [*ids, 5 + n], **plain) for n in range(4)]
    with Engine(*parts, options=EngineOptions(prefix_cache=True, max_prefill_rows=rows)) as engine:
        if rows:  # somebody decodes beside them, so that prompts go in pieces
            engine.add(request("beside", prompt(3, 5), **plain | {"limit": 250}))
            engine.step()
        before = engine.stats.forward_tokens
        run(engine, *its)
        assert its[0].stats.cached_tokens == 0
        assert all(one.stats.cached_tokens >= length - 5 * bool(rows) for one in its[1:])
        assert engine.stats.forward_tokens - before <= length + 1 + 3 * (6 if rows else 1) + 4 * 20 + 250 * bool(rows)
    for one in its:
        with Engine(*parts) as engine:
            assert one.text_ids == run(engine, request("cold", one.prompt_ids, **plain)).text_ids


def test_salts_are_kept_apart():
    with shared() as engine:
        its = [run(engine, request(str(n), prompt(1), cache_salt=salt)) for n, salt in enumerate(["", "a", "a", ""])]
        assert [one.stats.cached_tokens for one in its] == [0, 0, 39, 39]
        together = [request(f"{salt} together", prompt(5), cache_salt=salt) for salt in ("", "a")]
        assert [one.stats.cached_tokens for one in run(engine, *together)] == [0, 0]


def test_a_text_that_is_scored_takes_no_row_that_scores_from_the_cache():
    text = prompt(4, 60)
    with Engine(*backend("cpu")) as engine:
        plain = run(engine, request("plain", text, score_from=21)).text_scores
    with shared() as engine:
        run(engine, request("first", text))
        scored = [run(engine, request(str(first), text, score_from=first)) for first in (1, 21, 59)]
    assert [one.stats.cached_tokens for one in scored] == [0, 20, 58]
    assert scored[1].text_scores.logprobs == plain.logprobs and scored[1].text_scores.chosen == plain.chosen
    assert scored[0].text_scores.logprobs[20:] == plain.logprobs
    assert scored[2].text_scores.logprobs == plain.logprobs[-1:]


@pytest.mark.parametrize("plan", ["even", "forest"])
def test_the_first_step_behind_a_hit_drafts_as_a_cold_start_does(plan):
    """Heads guess from the hidden state of a prompt's last token, which is fed whatever is found."""
    model, runtime = backend("cpu")
    plain = cold("cpu", prompt(1))
    heads = RecallHeads(model, [plain.tree], wrong_every=10**9)
    speculation = Speculation.even() if plan == "even" else Speculation()
    options = {"speculation": speculation, "draft_tree": DraftTree.likeliest(8), "step_cost": COST}
    drafted = []
    for warm in (False, True):
        with Engine(model, runtime, heads, EngineOptions(prefix_cache=True, **options)) as engine:
            if warm:
                run(engine, request("scored", prompt(1), score_from=39))  # feeds it, and teaches nobody anything
            one = request("one", prompt(1))
            engine.add(one)
            nodes = []
            while engine.unfinished:
                engine.step()
                nodes.append((engine.stats.forward_tokens, sum(engine.stats.drafted.values()), len(one.text_ids)))
            assert one.stats.cached_tokens == (39 if warm else 0) and one.text_ids == plain.text_ids
            drafted.append([(rows - nodes[0][0], *its) for rows, *its in nodes])
    assert drafted[0] == drafted[1] and drafted[0][-1][1] > 0
