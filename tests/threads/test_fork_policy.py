"""Where answers fork: by rule at list items, by what a caller says of each fork, within a call's own limits."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import medusa_apar
from medusa_apar import DraftTree
from medusa_apar.heads import HydraHeads, MedusaHeads
from medusa_apar.threads.fork_policy import ListForks, NoForks, Turn
from medusa_apar.threads.paragraph_tree import Fork, ParagraphTree, ReadingCursor
from medusa_apar.triton_kernels.reference import verify
from medusa_apar.verify.control_processor import ControlTokensLogitsProcessor
from tests.support import random_requests
from tests.support.drafters import RecallHeads
from tests.support.list_writer import list_prompts, list_writer
from tests.support.models import CONTROL, FORK, forking_model
from tests.support.oracles import assert_chosen_tokens_are_the_models
from tests.support.prompts import prompts
from tests.support.tokenizers import ID, PIECES, ListTokenizer

LIMIT, ROWS = 64, 3
SEEDED = {"do_sample": True, "seed": 3, "top_k": 0}
GREEDY = {"do_sample": False, "repetition_penalty": 1.1}  # without it the tiny model repeats its titles


def run(heads=None, limit=LIMIT, model=None, rows=None, sampling=SEEDED, fork="lists", generate=None, **options):
    apar = medusa_apar.attach(model or list_writer(), heads, tokenizer=ListTokenizer(), **options)
    inputs = list_prompts(ROWS)
    if rows is not None:
        inputs = {name: tensor[rows] for name, tensor in inputs.items()}
    return apar.generate(
        **inputs, max_new_tokens=limit, fork=fork, return_dict_in_generate=True, **sampling, **(generate or {})
    )


@pytest.fixture(scope="module")
def listed():
    with pytest.MonkeyPatch.context() as patched:  # every thread has a row, so that much can be compared
        patched.setattr("medusa_apar.engine.scheduler.worth", lambda likely, *_: len(likely))
        out = run()
    kinds = {(t.continues_parent, t.finish_reason) for tree in out.paragraph_tree for t in tree.threads[1:]}
    assert (False, "stop") in kinds and any(continues_parent for continues_parent, _ in kinds) and out.stats.forks >= 8
    return out


def text(ids) -> str:
    return "".join(PIECES[token] for token in ids)


# Its consequences for paragraph trees, in random ones.


class RandomRule(NoForks):
    """Forks, ends and takes over like `ListForks`, but where the tokens happen to say so."""

    def fork(self, tree, thread):
        size = len(thread.tokens)
        if thread.parent is not None or thread.tokens[-1] != random_requests.FORK:
            return None
        return Fork((8, 8), 1 + size // 2, (7, 6), 1) if size % 4 else Fork((8,), size // 2, continues_parent=True)

    def turn(self, tree, thread):
        number = thread.tokens[-1] + len(thread.tokens)
        return Turn.RETURN if number % 5 == 0 else Turn.CONTINUE_PARENT if number % 7 == 0 else None

    def ends_line(self, thread):
        return len(thread.tokens) % 2 == 0


def spliced(tree, thread=None) -> list[int]:
    """The reading order as `Fork` and `Turn` define it."""
    thread = thread or tree.trunk
    shown, children, skip = [], {child.fork_index: child for child in thread.children}, 0
    for index in range(thread.num_forced, len(thread.tokens)):
        ends_child = thread.parent and not thread.continues_parent and thread.finish_reason == "stop"
        skip -= 1
        if skip < 0 and not (ends_child and index == len(thread.tokens) - 1):
            shown.append(thread.tokens[index])
        if (child := children.get(index)) is not None:
            shown += spliced(tree, child)
            if child.continues_parent:
                break
            skip = child.line_break if child.live or child.ends_line else 0
    return shown


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_reading_order_and_slots_where_a_rule_forks(data):
    """`Script` checks after every step that each slot is booked once, to a thread that some live path needs it of."""
    cursors, shown, before = {}, {}, {}

    def after_step(forest, all_trees):
        for tree in all_trees:
            cursor = cursors.setdefault(tree, ReadingCursor(tree))
            shown.setdefault(tree, []).extend(thread.tokens[index] for thread, index in cursor.advance())
            assert spliced(tree)[: len(shown[tree])] == shown[tree]  # what was shown is never taken back
            for thread, count in tree.live_in_reading_order():
                assert before.get(thread, 0) <= count <= len(spliced(tree))
                before[thread] = count

    for tree in random_requests.Script(data, steps=10, policy=RandomRule(), fork_id=None).run(after_step):
        assert [thread.tokens[index] for thread, index in tree.reading_order()] == spliced(tree)
        for child in tree.threads[1:]:
            assert child.path_ids == [*child.parent.tokens[: child.seen], *child.tokens[: child.num_forced]]
            assert child.start == len(child.ancestor_ids())


# What comes of it.


def test_chosen_tokens_are_the_models(listed):
    assert assert_chosen_tokens_are_the_models(list_writer(), listed.paragraph_tree, seed=3) > 150


def test_greedy_tokens_are_those_of_plain_generate():
    """Segment by segment: what transformers' generate writes from each insertion to the next."""
    model = list_writer()
    out = run(model=model, sampling={"do_sample": False}, limit=100)
    assert out.stats.forks >= 3
    compared = 0
    for tree in out.paragraph_tree:
        for thread in tree.threads:
            own = thread.ancestor_ids() + thread.tokens
            cuts = [*sorted(thread.inserted), len(thread.tokens)]
            start = thread.num_forced
            for cut in cuts:
                if cut > start:
                    path = torch.tensor([own[: thread.start + start]])
                    mask = torch.ones_like(path)
                    plain = model.generate(path, attention_mask=mask, max_new_tokens=cut - start, do_sample=False)
                    assert plain[0].tolist() == own[: thread.start + cut]
                    compared += cut - start
                start = cut + 1
    assert compared > 150


def slow_reading_order(tree: ParagraphTree, thread=None) -> tuple[list[int], bool]:
    """Word for word what `ListForks` says; and whether the thread took its parent's text over."""
    thread = thread or tree.trunk
    shown, children, skip = [], {child.fork_index: child for child in thread.children}, 0
    for index in range(thread.num_forced, len(thread.tokens)):
        last = thread.parent is not None and thread.finish_reason == "stop" and index == len(thread.tokens) - 1
        if skip:
            assert index in thread.inserted and not PIECES[thread.tokens[index]].strip()
            skip -= 1
        elif not last or thread.continues_parent:
            shown.append(thread.tokens[index])
        if index in children:
            child, before = slow_reading_order(tree, children[index])
            shown += child
            if children[index].continues_parent:
                return shown, True
            skip = children[index].line_break if text(child).endswith("\n") else 0
    return shown, False


def test_the_text_is_the_threads_stitched_together(listed):
    for row, tree in enumerate(listed.paragraph_tree):
        written, _ = slow_reading_order(tree)
        shown = listed.sequences[row, 3 + ROWS + 2 :].tolist()
        assert written[:LIMIT] == shown[: len(written)]
        for thread in tree.threads[1:]:
            if thread.finish_reason == "stop" and not thread.continues_parent:  # it ends as the next item begins
                assert thread.ends_line and text(thread.token_ids[-1:]) in ("-", *"0123456789")
        assert "\n\n\n" not in text(written) and ".2." not in text(written)


def test_children_that_take_over_drop_the_rest(listed):
    """No item of the trunk shows behind a child that went on with something else than an item."""
    dropped = 0
    for tree in listed.paragraph_tree:
        over = next((thread for thread in tree.threads if thread.continues_parent), None)
        if over is not None:
            shown = {thread for thread, _ in tree.reading_order()}
            later = [t for t in tree.threads if t.parent and t.fork_index > over.fork_index]
            assert not shown & set(later)
            order = [(t, i) for t, i in tree.reading_order() if t is tree.trunk]
            assert max(index for _, index in order) <= over.fork_index
            assert tree.trunk.ended
            dropped += len(later)
    assert dropped > 0


def drafters(out):
    model = list_writer()
    return RecallHeads(model, out.paragraph_tree), HydraHeads.random(model), MedusaHeads.random(model)


@pytest.mark.parametrize(
    "options",
    [
        {"max_threads": 1},
        {"max_threads": 2},
        {"budget": 1},
        {"budget": 200},
        {"budget": 60, "draft_tree": DraftTree([(0,), (0, 0), (0, 0, 0)])},
        {"pool_slots": 3 + ROWS + 2 + 2 * LIMIT + 16},
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_drafts_and_schedules_never_show(listed, options):
    for heads in (None, *drafters(listed)):
        if heads is None and "draft_tree" in options:
            continue
        out = run(heads, **options)
        assert torch.equal(out.sequences, listed.sequences)
        assert out.stats.final_slots == 0
        if isinstance(heads, RecallHeads) and options.get("budget") == 200:
            assert max(out.stats.accepted_lengths) == 4 and out.stats.steps < listed.stats.steps


def test_memory_pressure_never_shows(listed, monkeypatch):
    monkeypatch.setattr("medusa_apar.engine.admission.check_fits", lambda *args: None)
    for heads in (None, *drafters(listed)):
        out = run(heads, pool_slots=80)
        assert torch.equal(out.sequences, listed.sequences)
        assert out.stats.peak_slots <= 80 < listed.stats.peak_slots and out.stats.final_slots == 0


def test_verification_in_one_launch_never_shows(listed):
    """What the Triton runtime does: drafts of the same launch are stale behind an insertion."""
    model, inputs = list_writer(), list_prompts(ROWS)
    for heads in drafters(listed):
        apar = medusa_apar.attach(model, heads, tokenizer=ListTokenizer())
        apar.runtime.verify = verify
        for kind, expected in ((SEEDED, listed), ({"do_sample": False}, run(sampling={"do_sample": False}))):
            options = {"max_new_tokens": LIMIT, "fork": "lists", **kind}
            assert torch.equal(apar.generate(**inputs, **options), expected.sequences)


def test_the_cpu_runtime_forks_by_rule_too():
    model = list_writer(family="wide_llama")
    plain = run(model=model, runtime="torch", sampling=GREEDY)
    out = run(MedusaHeads.random(model), model=model, runtime="cpu", sampling=GREEDY)
    assert plain.stats.forks >= 3
    assert torch.equal(out.sequences, plain.sequences)


def test_a_row_alone_is_the_row_in_a_batch(listed):
    for row in range(ROWS):
        alone = run(rows=slice(row, row + 1)).sequences[0].tolist()
        assert listed.sequences[row].tolist()[: len(alone)] == alone


def test_every_limit_is_the_unlimited_run_cut_short(listed):
    heads = RecallHeads(list_writer(), listed.paragraph_tree)
    for limit in range(1, LIMIT, 3):
        out = run(random.Random(limit).choice([None, heads]), limit=limit)
        assert torch.equal(out.sequences, listed.sequences[:, : 3 + ROWS + 2 + limit])
        assert out.stats.final_slots == 0


def test_streams_stops_and_scores_go_by_the_reading_order(listed):
    class Collector:
        def __init__(self):
            self.columns = []

        def put(self, value):
            self.columns.append(value)

        def end(self): ...

    collector = Collector()
    out = run(generate={"streamer": collector, "output_scores": True, "output_logits": True})
    assert torch.equal(torch.stack(collector.columns[1:], dim=1), listed.sequences[:, 3 + ROWS + 2 :])
    assert torch.equal(out.sequences, listed.sequences)
    inserted = 0
    for column, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        for row, tree in enumerate(out.paragraph_tree):
            order = list(tree.reading_order())[:LIMIT]
            if column < len(order) and order[column][1] in order[column][0].inserted:
                token = int(listed.sequences[row, 3 + ROWS + 2 + column])
                assert scores[row, token] == logits[row, token] == 0
                assert scores[row].isneginf().sum() == len(scores[row]) - 1
                inserted += 1
    assert inserted >= 4
    stopped = run(generate={"stopping_criteria": [lambda ids, _: torch.tensor([ids.shape[1] >= 3 + ROWS + 2 + 20])]})
    assert torch.equal(stopped.sequences, listed.sequences[:, : 3 + ROWS + 2 + 20])


def test_the_context_ends_in_mid_insertion():
    model = list_writer()
    for length in range(20, 60, 3):
        model.config.max_position_embeddings, rope = length, model.config.rope_parameters
        model.config.rope_parameters = None  # as models with learned positions, whose paths end there
        try:
            out = run(model=model, limit=200)
        finally:
            model.config.max_position_embeddings, model.config.rope_parameters = 256, rope
        assert out.stats.final_slots == 0
        assert all(thread.end <= length for tree in out.paragraph_tree for thread in tree.threads)


def test_tokens_are_read_as_text_behind_others():
    """SentencePiece drops a leading space from whatever it decodes or adds one to what it encodes."""

    class Leading(ListTokenizer):
        def encode(self, text, add_special_tokens=True):
            return [*([] if text.startswith("a") else [ID[" -"]]), *super().encode(text)]

        def decode(self, ids, **options):
            return super().decode(ids).lstrip(" ")

    policy = ListForks(Leading())
    assert policy._text(ID[" -"]) == " -" and policy._encode("3.", "\n") == [ID["3"], ID["."]]


# What callers say.


def test_lists_are_off_by_default_and_forking_is_the_only_difference():
    plain = list_writer()
    off, default = run(fork="off"), run(fork="auto")
    assert torch.equal(off.sequences, default.sequences) and off.stats.forks == 0
    torch.manual_seed(0)
    assert torch.equal(off.sequences, run(fork="lists", generate={"max_depth": 0}).sequences)
    assert torch.equal(off.sequences, run(fork="lists", generate={"fork_if": lambda point: False}).sequences)
    options = {"max_new_tokens": LIMIT, "do_sample": False}
    apar = medusa_apar.attach(plain, tokenizer=ListTokenizer())
    ours = plain.generate(**list_prompts(ROWS), **options, custom_generate=apar, fork="off")
    assert torch.equal(ours, plain.generate(**list_prompts(ROWS), **options))


def test_fork_if_is_asked_at_every_title(listed):
    points = []

    def few(point):
        points.append(point)
        return point.forks < 1

    out = run(generate={"fork_if": few})
    assert all(len(tree.threads) <= 2 for tree in out.paragraph_tree) and out.stats.forks >= 2
    assert all(text(point.path_ids).endswith(text(point.token_ids)) for point in points)
    assert all(text(point.token_ids).rstrip().endswith(":") and point.depth == 0 for point in points)
    assert_chosen_tokens_are_the_models(list_writer(), out.paragraph_tree, seed=3)
    heads = RecallHeads(list_writer(), out.paragraph_tree)
    assert torch.equal(run(heads, budget=100, generate={"fork_if": few}).sequences, out.sequences)


@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "seed": 11, "top_k": 0}], ids=str)
def test_fork_if_is_asked_at_every_fork_token(sampling):
    """A fork it refuses is banned in the logits there: the rule as a logits processor on a plain path."""
    model, asked = forking_model(24), []

    def odd(point):
        asked.append(tuple(point.path_ids))
        return len(point.path_ids) % 2 == 1 and point.forks < 2 and point.depth < 2

    def answer(heads, **options):
        apar = medusa_apar.attach(model, heads, CONTROL, **options)
        inputs = prompts(2, 6, seed=2, ragged=True)
        return apar.generate(**inputs, max_new_tokens=40, fork_if=odd, return_dict_in_generate=True, **sampling)

    def process(ids, scores):
        rule = ControlTokensLogitsProcessor(CONTROL, prompt, max_depth=3)
        scores = rule(ids, scores)
        path = ids[0].tolist()
        own = path[len(thread_path) :]
        if len(path) % 2 == 0 or own.count(FORK) >= 2 or depth >= 2:
            scores[:, FORK] = -torch.inf
        return scores

    out = answer(None)
    assert 3 <= out.stats.forks < len(set(asked)) == len(asked)  # once each
    for tree in out.paragraph_tree:
        for thread in tree.threads:
            prompt, thread_path, depth = tree.trunk.num_forced, thread.path_ids, thread.depth
            lonely = ParagraphTree(tree.trunk.tokens[:prompt])
            lonely.threads = [thread]
            assert_chosen_tokens_are_the_models(model, [lonely], sampling.get("seed"), process)
    for heads in (RecallHeads(model, out.paragraph_tree), HydraHeads.random(model)):
        assert torch.equal(answer(heads, budget=200).sequences, out.sequences)
        assert torch.equal(answer(heads, max_threads=1).sequences, out.sequences)


def test_limits_of_a_call_are_those_of_attach():
    model, inputs = forking_model(24), prompts(1, 6)
    options = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    apar = medusa_apar.attach(model, None, CONTROL)
    for limits in ({"max_depth": 1}, {"max_depth": 0}, {"max_threads": 1}):
        attached = medusa_apar.attach(model, None, CONTROL, **limits).generate(**inputs, **options)
        called = apar.generate(**inputs, **options, **limits)
        assert torch.equal(called.sequences, attached.sequences)
        assert called.stats.peak_threads == attached.stats.peak_threads
        hooked = model.generate(**inputs, **options, custom_generate=apar, **limits)
        assert torch.equal(hooked.sequences, attached.sequences)
    unlimited = apar.generate(**inputs, **options)
    assert unlimited.stats.peak_threads > 1
    assert max(thread.depth for thread in unlimited.paragraph_tree[0].threads) > 1


def test_true_and_false_still_mean_auto_and_off():
    model, inputs = forking_model(24), prompts(1, 6)
    apar = medusa_apar.attach(model, None, CONTROL)
    answers = [
        apar.generate(**inputs, max_new_tokens=30, do_sample=False, fork=fork)
        for fork in (True, "auto", False, "off", "lists")
        if fork != "lists"
    ]
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[2], answers[3])
    assert not torch.equal(answers[0], answers[2])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"fork": "always"}, "'auto', 'off', 'lists'"),
        ({"fork": 2}, "'auto', 'off', 'lists'"),
        ({"fork": "lists"}, "tokenizer"),
        ({"max_threads": 0}, "max_threads must be positive, got 0"),
        ({"max_depth": -1}, "max_depth"),
    ],
    ids=str,
)
def test_nonsense_is_refused_in_a_sentence(options, sentence):
    apar = medusa_apar.attach(forking_model(24), None, CONTROL)
    with pytest.raises(ValueError, match=sentence) as raised:
        apar.generate(**prompts(1, 6), max_new_tokens=4, **options)
    assert "\n" not in str(raised.value)
