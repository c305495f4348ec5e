"""Logits processors: the user's see what plain transformers shows them, bans come behind them, NaN never wins."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

import medusa_apar
from medusa_apar.heads import MedusaHeads
from medusa_apar.threads.fork_manager import ForkManager
from medusa_apar.threads.fork_policy import ControlTokenForks
from medusa_apar.threads.fork_rule import ForkRule
from medusa_apar.threads.request import Request, RequestOptions
from medusa_apar.triton_kernels import reference
from medusa_apar.verify.control_processor import ControlTokensLogitsProcessor
from tests.support.drafters import RecallHeads
from tests.support.models import CHILD, CONTROL, FORK, VOCAB, forking_model, tiny_model
from tests.support.oracles import assert_chosen_tokens_are_the_models
from tests.support.prompts import prompts

LIMIT = 24
GREEDY = {"do_sample": False, "max_new_tokens": LIMIT}

# Each makes NaN of a -inf, takes it for the least score, or makes it possible again.
FINITE = {
    "min": lambda ids, scores: scores - scores.min(-1, keepdim=True).values,
    "minmax": lambda ids, scores: (scores - scores.amin()) / (scores.amax() - scores.amin()),
    "blend": lambda ids, scores: scores + 0.5 * (scores - scores.roll(1, -1)),
    "zero": lambda ids, scores: scores * (torch.arange(VOCAB) % 2),
    "standard": lambda ids, scores: (scores - scores.mean(-1, keepdim=True)) / scores.std(-1, keepdim=True),
    "inverted": lambda ids, scores: -scores,
    "in place": lambda ids, scores: scores.sub_(scores.min(-1, keepdim=True).values),
}


def rule(fork=True):
    return ControlTokensLogitsProcessor(CONTROL, 6, fork)


def spec(processor, fork=True):
    """What plain transformers takes for the same scores."""
    return LogitsProcessorList([processor, rule(fork)])


@pytest.mark.parametrize("runtime", ["torch", "auto"])
@pytest.mark.parametrize("name", FINITE)
def test_one_thread_is_plain_transformers(name, runtime):
    model = forking_model(5, "wide_llama")
    inputs, given = prompts(2, 6, seed=3, ragged=True), LogitsProcessorList([FINITE[name]])
    expected = model.generate(**inputs, **GREEDY, logits_processor=spec(FINITE[name], fork=False))
    for heads in (None, MedusaHeads.random(model)):
        apar = medusa_apar.attach(model, heads, CONTROL, runtime=runtime)
        out = model.generate(**inputs, **GREEDY, logits_processor=given, fork=False, custom_generate=apar)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 7, "temperature": 0.8, "top_k": 9}], ids=str)
@pytest.mark.parametrize("name", FINITE)
def test_threads_are_plain_transformers(name, options):
    model = forking_model(24)
    inputs, processor = prompts(2, 6, seed=2), FINITE[name]
    options = GREEDY | options | {"return_dict_in_generate": True, "logits_processor": LogitsProcessorList([processor])}
    warpers = [TemperatureLogitsWarper(0.8), TopKLogitsWarper(9)] if options["do_sample"] else []
    process = LogitsProcessorList([processor, rule(), *warpers])
    first = medusa_apar.attach(model, None, CONTROL).generate(**inputs, **options)
    for heads in (None, RecallHeads(model, first.paragraph_tree)):
        out = medusa_apar.attach(model, heads, CONTROL).generate(**inputs, **options)
        assert torch.equal(out.sequences, first.sequences)
        assert_chosen_tokens_are_the_models(model, out.paragraph_tree, options.get("seed"), process)


class OnlyChildless(LogitsProcessor):
    """Makes the control tokens by far the likeliest, as no fork rule would have it."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, [FORK, CHILD]] = 100.0
        return scores


WAYS = {
    "greedy": ({}, {}),
    "sampled": ({}, {"do_sample": True, "seed": 3, "top_k": 2, "temperature": 0.1}),
    "typical": ({"acceptance": "typical"}, {"do_sample": True, "seed": 3, "top_k": 2}),
    "asked": ({}, {"fork_if": lambda point: False}),
    "scores kept": ({}, {"output_scores": True}),
    "rescored": ({}, {"rescore": True}),
}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_invisible_is_chosen_where_a_processor_wants_it(way):
    model = tiny_model(seed=5, eos=-50.0)
    attach, options = WAYS[way]
    apar = medusa_apar.attach(model, MedusaHeads.random(model), CONTROL, **attach)
    options = GREEDY | {"return_dict_in_generate": True} | options
    out = apar.generate(**prompts(2, 6), **options, logits_processor=LogitsProcessorList([OnlyChildless()]))
    assert out.sequences.shape == (2, 6 + LIMIT) and not torch.isin(out.sequences, torch.tensor([FORK, CHILD])).any()
    for tree in out.paragraph_tree:
        for thread in tree.threads:
            assert CHILD not in thread.token_ids
    if way in ("asked", "rescored"):
        alone = apar.generate(**prompts(2, 6), **GREEDY, fork=False, logits_processor=[OnlyChildless()])
        assert way != "asked" or torch.equal(out.sequences, alone)
    if way == "scores kept":
        assert all((scores[:, CHILD] == -torch.inf).all() for scores in out.scores)


class Table(LogitsProcessor):
    """Returns rows of what it keeps, control tokens among the likeliest."""

    def __init__(self, last):
        self.last = last  # of the rows, what the tokens that end an answer are worth
        self.rows = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(3))
        self.rows[:, [FORK, CHILD]] += 2
        self.rows[50] = last

    def __call__(self, input_ids, scores):
        return self.rows[int(input_ids[0, -1])].expand_as(scores)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 7, "top_k": 9}], ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_bans_are_not_written_to_what_a_processor_keeps(rows, options):
    model, process, untouched = forking_model(24), Table(0.0), Table(0.0)
    options = GREEDY | {"return_dict_in_generate": True} | options
    out = medusa_apar.attach(model, MedusaHeads.random(model), CONTROL).generate(
        **prompts(rows, 6), **options, logits_processor=[process]
    )
    assert torch.equal(process.rows, untouched.rows)
    warpers = [TopKLogitsWarper(9)] if "seed" in options else []
    expected = LogitsProcessorList([untouched, rule(), *warpers])
    assert_chosen_tokens_are_the_models(model, out.paragraph_tree, options.get("seed"), expected)
    assert sum(len(tree.threads) for tree in out.paragraph_tree) > rows


def test_nor_where_nothing_is_left_to_choose():
    process, kept = Table(-torch.inf), Table(-torch.inf).rows
    process.rows[:, :FORK] = process.rows[:, CHILD + 1 :] = -torch.inf
    kept[:, :FORK] = kept[:, CHILD + 1 :] = -torch.inf
    with pytest.raises(ValueError, match="Table left no token"):
        medusa_apar.attach(tiny_model(seed=5), None, CONTROL).generate(
            **prompts(1, 6), **GREEDY, fork=False, logits_processor=[process]
        )
    assert torch.equal(process.rows, kept)


@pytest.mark.parametrize("in_one_launch", [False, True])
def test_warpers_do_not_see_a_banned_token_as_possible(in_one_launch):
    """Were the ban behind them, nothing would be left of the one likeliest token."""
    model = tiny_model(seed=5, eos=-50.0, fork=60.0)
    apar = medusa_apar.attach(model, MedusaHeads.random(model), CONTROL)
    if in_one_launch:
        apar.runtime.verify = reference.verify
    expected = model.generate(**prompts(2, 6), **GREEDY, suppress_tokens=[FORK, CHILD])
    options = {"do_sample": True, "max_new_tokens": LIMIT, "fork": False, "seed": 1, "renormalize_logits": True}
    for warp in ({"top_k": 1}, {"top_k": 0, "top_p": 0.0001}, {"top_k": 0, "min_p": 1.0}, {"top_k": 0, "top_h": 1e-9}):
        assert torch.equal(apar.generate(**prompts(2, 6), **options, **warp), expected), warp


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 7, "top_k": 0}], ids=str)
def test_of_nan_and_numbers_a_number_wins(options):
    """Where plain transformers would choose NaN."""
    gone = [5, 9, 33]

    def some(ids, scores):
        return scores.index_fill(1, torch.tensor(gone), torch.nan)

    def none(ids, scores):
        return scores.index_fill(1, torch.tensor(gone), -torch.inf)

    apar = medusa_apar.attach(forking_model(24), None, CONTROL)
    outs = [apar.generate(**prompts(2, 6), **GREEDY | options, logits_processor=[way]) for way in (some, none)]
    assert torch.equal(*outs)


class Breaks(LogitsProcessor):
    """From the tenth token on."""

    def __init__(self, value):
        self.value = value

    def __call__(self, input_ids, scores):
        return scores if input_ids.shape[1] < 9 else torch.full_like(scores, self.value)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("way", WAYS)
def test_scores_without_a_token_are_an_error_that_names_the_processor(way, value):
    model = tiny_model(seed=5, eos=-50.0)
    attach, options = WAYS[way]
    options = GREEDY | {"return_dict_in_generate": True} | options
    apar = medusa_apar.attach(model, MedusaHeads.random(model), CONTROL, **attach)
    processors = LogitsProcessorList([OnlyChildless(), Breaks(value), FINITE["zero"]])
    with pytest.raises(ValueError, match=r"Breaks left no token to choose after \d+ tokens: ") as raised:
        apar.generate(**prompts(2, 6), **options, logits_processor=processors)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("in_one_launch", [False, True])
def test_a_ban_of_everything_names_who_left_control_tokens_alone(in_one_launch):
    model = tiny_model(seed=5)
    apar = medusa_apar.attach(model, None, CONTROL)
    if in_one_launch:
        apar.runtime.verify = reference.verify
    with pytest.raises(ValueError, match="SuppressTokensLogitsProcessor left no token"):
        apar.generate(**prompts(1, 6), **GREEDY, suppress_tokens=[i for i in range(VOCAB) if i not in (FORK, CHILD)])


@pytest.mark.parametrize("runtime", ["torch", "auto"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"repetition_penalty": 1.2}], ids=str)
def test_a_model_of_nan_is_an_error(runtime, options):
    model = tiny_model("wide_llama", seed=5)
    apar = medusa_apar.attach(model, MedusaHeads.random(model), CONTROL, runtime=runtime)
    in_one_launch = medusa_apar.attach(model, None, CONTROL, runtime="torch")
    in_one_launch.runtime.verify = reference.verify
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    for which in (apar, in_one_launch):
        with pytest.raises(ValueError, match="the model left no token"):
            which.generate(**prompts(2, 6), **GREEDY | options)


@pytest.mark.parametrize("token", [FORK, CHILD])
def test_a_thread_of_tokens_nobody_reads_ends(token):
    """Whatever is chosen, a path is not longer than an answer within the limit can make it, and no request is left
    without a thread."""
    rule = ForkRule.of(CONTROL, max_depth=1)
    options = RequestOptions(max_new_tokens=2, eos_ids=frozenset({2}), policy=ControlTokenForks(), rule=rule)
    request, manager = Request("0", [7, 8], options), ForkManager(None)
    for _ in range(9):  # a path can have two tokens that are read, a [Fork] before each, and what a child begins with
        for thread in list(request.tree.threads):
            manager.advance(request, thread, [token])
        request.publish()
        manager.trim(request)
        if request.done:
            break
        assert request.tree.live
    assert request.done and request.text == [] and not request.tree.live
