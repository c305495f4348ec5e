"""An engine with a prefix cache writes what a cold one writes, to the bit, and says what it found."""

import os
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, TemperatureLogitsWarper

from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.drafting.options import Speculation
from medusa_apar.drafting.step_cost import StepCost
from medusa_apar.engine.engine import Engine
from medusa_apar.engine.options import EngineOptions
from medusa_apar.kv import prefix_cache
from medusa_apar.runtimes.capture import Captured
from medusa_apar.runtimes.model_state import ModelState
from medusa_apar.runtimes.pick import pick_runtime
from medusa_apar.threads.fork_policy import ControlTokenForks, NoForks
from medusa_apar.threads.fork_rule import ForkRule
from medusa_apar.threads.request import Request, RequestOptions, Status
from medusa_apar.triton_kernels import reference
from tests.support.drafters import RecallHeads
from tests.support.models import CONTROL, EOS, VOCAB, WIDE, forking_model, random_model

COST = StepCost(((1, 10.0), (8, 14.0), (64, 70.0)), ((1, 0.5), (8, 1.0)))
BACKENDS = ("cpu", "int8", "torch", "one launch")  # the last: paths in tables, verified by the kernel's twin
LIMIT = 24


@cache
def backend(name):
    model = forking_model(13, "wide_llama")  # some of its answers have dozens of threads
    compiled = name in ("cpu", "int8")
    runtime = pick_runtime(model, "cpu" if compiled else "torch", "int8" if name == "int8" else None, "auto")
    if name == "one launch":
        runtime.verify = reference.verify
    return model, runtime


def prompt(n, length=40):
    return [5 + (7 * n + 3 * k + k * k * n) % (VOCAB - 6) for k in range(length)]


def request(name, ids, fork=True, limit=LIMIT, **changes):
    how = {"eos_ids": frozenset({EOS}), "policy": ControlTokenForks() if fork else NoForks()}
    how["rule"] = ForkRule.of(CONTROL, fork=fork)
    return Request(name, ids, RequestOptions(max_new_tokens=limit, **how | changes))


def shared(name="cpu", heads=None, **options):
    return Engine(*backend(name), heads, EngineOptions(prefix_cache=True, **options))


def run(engine, *its):
    for one in its:
        engine.add(one)
    while engine.unfinished:
        engine.step()
        checked(engine)
    return its[0] if len(its) == 1 else its


def checked(engine):
    engine.ledger.check()
    stats, pool = engine.stats, engine.ledger.pool
    assert (stats.live_slots, stats.cached_slots) == (pool.live, pool.cached)
    assert stats.live_slots + stats.cached_slots + stats.free_slots == (pool.max_slots or pool.capacity)
    if not engine.unfinished:
        assert pool.live == 0 and not engine.ledger._salts


def cold(name, ids, **changes):
    with Engine(*backend(name)) as engine:
        return run(engine, request("cold", ids, **changes))


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


def negated(model):
    model.lm_head.weight.data.neg_()  # which torch does not count


def swapped(model):
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


@pytest.mark.parametrize("name", ["cpu", "torch"])
@pytest.mark.parametrize("change", [negated, swapped])
def test_what_other_weights_have_made_is_dropped(name, change):
    model = forking_model(9, "wide_llama")
    runtime = pick_runtime(model, name, None, "auto")
    with Engine(model, runtime, options=EngineOptions(prefix_cache=True)) as engine:
        run(engine, request("first", prompt(0), fork=False, limit=8))
        assert run(engine, request("again", prompt(0), fork=False, limit=8)).stats.cached_tokens == 39
        change(model)
        after = run(engine, request("after", prompt(0), fork=False, limit=8))
        assert after.stats.cached_tokens == 0
        assert run(engine, request("again", prompt(0), fork=False, limit=8)).stats.cached_tokens == 39
    with Engine(model, runtime) as engine:
        assert after.text_ids == run(engine, request("cold", prompt(0), fork=False, limit=8)).text_ids


def test_an_adapter_that_is_switched_off_makes_other_keys():
    model = forking_model(9, "wide_llama")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["k_proj", "v_proj"], init_lora_weights=False))
    runtime = pick_runtime(model, "torch", None, "auto")
    texts = []
    with Engine(model, runtime, options=EngineOptions(prefix_cache=True)) as engine:
        for switch in (adapted.base_model.enable_adapter_layers, adapted.base_model.disable_adapter_layers) * 2:
            switch()
            one = run(engine, request("a", prompt(0), fork=False, limit=8))
            assert one.stats.cached_tokens == 0
            texts.append(one.text_ids)
    assert texts[0] == texts[2] != texts[1] == texts[3]


def scaled(factor):
    return lambda module, args, output: output * factor


def forward_replaced(model):
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: -forward(x)


def class_changed(model):
    """As a patch of a library does."""
    kind = type(model.model.layers[0].mlp)
    forward = kind.forward
    kind.forward = lambda self, x: -forward(self, x)
    return lambda: setattr(kind, "forward", forward)


def hook_swapped(model):
    """One for another at the same place, so that as many are there as were."""
    model.hook.remove()
    model.hook = model.model.layers[0].mlp.register_forward_hook(scaled(-3.0))


def hook_replaced(model):
    hooks = model.model.layers[0].mlp._forward_hooks
    hooks[model.hook.id] = scaled(-3.0)


def hook_on_all(model):
    def turned(module, args, output):
        return -output if isinstance(module, type(model.model.layers[0].mlp)) else None

    return torch.nn.modules.module.register_module_forward_hook(turned).remove


def window_narrowed(model):
    """What masks are made by, in every pass anew."""
    model.config.sliding_window = 2


CODE = [forward_replaced, class_changed, hook_swapped, hook_replaced, hook_on_all, window_narrowed]


@pytest.mark.parametrize("change", CODE)
def test_what_other_code_and_other_settings_have_made_is_dropped(change):
    model = forking_model(9, "mistral")
    object.__setattr__(model, "hook", model.model.layers[0].mlp.register_forward_hook(scaled(1.5)))
    runtime = pick_runtime(model, "torch", None, "auto")
    undo = None

    def asked(engine):
        return run(engine, request("a", prompt(0), fork=False, limit=8))

    try:
        with Engine(model, runtime, options=EngineOptions(prefix_cache=True)) as engine:
            first = asked(engine)
            assert asked(engine).stats.cached_tokens == 39
            undo = change(model)
            after = asked(engine)
            assert after.stats.cached_tokens == 0 and asked(engine).stats.cached_tokens == 39
        with Engine(model, runtime) as engine:
            assert first.text_ids != after.text_ids == asked(engine).text_ids
    finally:
        if undo is not None:
            undo()


def test_passes_beside_it_change_nothing():
    """Another engine's passes leave hooks of ours in the model, which only look on."""
    model = forking_model(9, "wide_llama")
    runtime = pick_runtime(model, "torch", None, "auto")
    before = ModelState(model)
    with runtime.session(), Captured(model, (0,)):
        assert before.is_of(model)
        handle = model.lm_head.register_forward_pre_hook(lambda *_: None)
        assert not before.is_of(model)
        handle.remove()
    assert before.is_of(model)


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


def test_it_is_warm_again_after_eviction():
    with shared(pool_slots=130) as engine:
        first = run(engine, request("first", prompt(1), fork=False))
        for n in range(2, 6):
            run(engine, request("other", prompt(n), fork=False))
        again = run(engine, request("again", prompt(1), fork=False))
        assert again.stats.cached_tokens < 39 and again.text_ids == first.text_ids
        assert run(engine, request("warm", prompt(1), fork=False)).stats.cached_tokens == 39
        assert engine.stats.preemptions == 0 and engine.stats.cached_slots > 30


def test_a_full_cache_keeps_nobody_waiting():
    """What is cached counts as free: as many run at once as in an engine without."""
    peaks = []
    for on in (True, False):
        with Engine(*backend("cpu"), options=EngineOptions(pool_slots=200, prefix_cache=on)) as engine:
            for n in range(8):
                run(engine, request(str(n), prompt(n), fork=False, cache_salt="other"))
            assert engine.stats.cached_slots > 100 or not on
            its = [request(f"{n} again", prompt(n), fork=False) for n in range(4)]
            run(engine, *its)
            peaks.append((engine.stats.steps, engine.stats.peak_threads, engine.stats.peak_slots))
    assert peaks[0] == peaks[1]


def test_a_long_beginning_that_many_share_is_held_once_and_lets_more_in():
    """Each needs what it adds, so that a pool for two prompts serves eight at once."""
    ids = prompt(2, 120)
    its = [request(str(n), [*ids, 5 + n], fork=False, eos_ids=frozenset()) for n in range(8)]
    with shared(pool_slots=120 + 8 * 25 + 40) as engine:
        run(engine, request("first", ids, fork=False))
        run(engine, *its)
        assert engine.stats.peak_threads == 8 and engine.stats.preemptions == 0
    for one in its:
        assert one.text_ids == cold("cpu", one.prompt_ids, fork=False, eos_ids=frozenset()).text_ids


@cache
def alone(name, ids, how, seed, fork, limit):
    return tuple(cold(name, list(ids), fork=fork, limit=limit, seed=seed, processors=PROCESSORS[how]).text_ids)


PROCESSORS = {"greedy": (), "warm": (TemperatureLogitsWarper(0.8),)}
LONGEST = 70  # tokens of a prompt
MOST = LONGEST + LIMIT + LIMIT + 2 * 3


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_every_text_is_a_cold_engines(data):
    """Prompts that begin as earlier ones and their threads do, forks, aborts, preemptions, small pools, salts."""
    draw = data.draw
    name = draw(st.sampled_from(BACKENDS))
    model, runtime = backend(name)
    options = EngineOptions(
        speculation=draw(st.sampled_from([None, Speculation()])),
        step_cost=COST,
        budget=draw(st.sampled_from([None, 6])),
        pool_slots=draw(st.none() | st.integers(MOST, MOST + 60)),
        max_prefill_rows=draw(st.sampled_from([None, 1, 5, 30])),
        max_requests=draw(st.sampled_from([None, 2])),
        prefix_cache=True,
    )
    count = draw(st.integers(1, 7))
    asked = [
        {
            "of": draw(st.integers(0, 6)),  # which of the earlier ones it begins as, and which thread
            "thread": draw(st.integers(0, 9)),
            "until": draw(st.floats(0, 1)),
            "more": draw(st.lists(st.integers(5, 8), max_size=6)),
            "how": draw(st.sampled_from(sorted(PROCESSORS))),
            "fork": draw(st.booleans()),
            "limit": draw(st.sampled_from([1, 5, LIMIT])),
            "salt": draw(st.sampled_from(["", "a"])),
            "steps": draw(st.integers(0, 30)),  # before the next joins
            "aborted": draw(st.integers(0, 5)) == 0,
        }
        for _ in range(count)
    ]
    its = []
    with pytest.MonkeyPatch.context() as patch, Engine(model, runtime, None, options) as engine:
        patch.setattr(prefix_cache, "_AT_ONCE", draw(st.sampled_from([1, 64])))
        engine.scheduler.needs.share = draw(st.sampled_from([1.0, 0.05]))  # of little an engine lets in too many
        for number, how in enumerate(asked):
            ids = prompt(number, 20)
            if its:
                earlier = its[how["of"] % len(its)][0]
                thread = earlier.tree.threads[how["thread"] % len(earlier.tree.threads)]
                path = thread.ancestor_ids() + thread.tokens
                ids = path[: round(how["until"] * len(path))]
            ids = [*ids[: LONGEST - 7], *how["more"]] or [9]
            sampled = {"seed": None if how["how"] == "greedy" else 3, "processors": PROCESSORS[how["how"]]}
            one = request(str(number), ids, how["fork"], how["limit"], cache_salt=how["salt"], **sampled)
            engine.add(one)
            its.append((one, (name, tuple(ids), how["how"], sampled["seed"], how["fork"], how["limit"])))
            for _ in range(how["steps"]):
                if engine.unfinished:
                    engine.step()
                    checked(engine)
            if how["aborted"]:
                engine.abort(one.id)
                checked(engine)
        run(engine)
    assert engine.ledger.pool.in_use == 0
    for one, known in its:
        expected = list(alone(*known))
        assert one.error is None and one.stats.cached_tokens < len(one.prompt_ids)
        if one.status is Status.ABORTED:
            expected = expected[: len(one.text_ids)]
        assert one.text_ids == expected


def test_an_engine_that_broke_or_is_closed_in_mid_run_keeps_nothing(monkeypatch):
    model, runtime = backend("cpu")
    step = type(runtime).step
    for breaks in (False, True):
        engine = shared()
        run(engine, request("before", prompt(1)))
        for n in range(3):
            engine.add(request(str(n), [*prompt(1), n], cache_salt=str(n // 2)))
        engine.step()
        assert engine.stats.cached_slots > 0
        if breaks:
            monkeypatch.setattr(type(runtime), "step", lambda *arguments: step(*arguments) and 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.step()
            engine.ledger.check()
        engine.close()
        assert engine.ledger.pool.in_use == engine.stats.cached_slots == engine.stats.final_slots == 0
