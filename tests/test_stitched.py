"""Verified mode: every figure is that of a plain transformers pass, every rewritten thread a plain continuation."""

import pytest
import torch
from transformers import TextStreamer

import medusa_apar
from medusa_apar.heads import HydraHeads, MedusaHeads
from medusa_apar.stitched import JUDGED
from tests.tiny import (
    CHILD,
    CONTROL,
    EOS,
    FORK,
    RecallHeads,
    forking_model,
    plain_continuation,
    prompts,
    tiny_model,
    tiny_tokenizer,
)

LIMIT = 40
GREEDY = {"do_sample": False, "max_new_tokens": LIMIT, "return_dict_in_generate": True, "verify": "stitched"}


def ending_model(seed):
    """Forks often, and its threads end: a rewritten one does not take the rest of the answer."""
    return tiny_model("llama", seed, scale=6.0, fork=2.0, eos=3.5)


def run(model, heads=None, rows=2, attach=None, **options):
    apar = medusa_apar.attach(model, heads, CONTROL, **(attach or {}))
    return apar.generate(**prompts(rows, 6, seed=rows, ragged=True), **(GREEDY | options))


def hand_made(model, out, row):
    """(chosen, log-probability) of every token of a row's text, from one plain pass of transformers."""
    prompt = out.paragraph_tree[row].trunk.tokens[: out.paragraph_tree[row].trunk.num_forced]
    text = text_of(out, row)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
    logits[:, [FORK, CHILD]] = -torch.inf
    chosen = logits.argmax(-1) == torch.tensor(text)
    return chosen.tolist(), logits.log_softmax(-1)[torch.arange(len(text)), torch.tensor(text)].tolist()


def order(out, row):
    """(thread, index) of the text; the reading order up to the limit."""
    return list(out.paragraph_tree[row].reading_order())[:LIMIT]


def text_of(out, row):
    return [thread.tokens[index] for thread, index in order(out, row)]


def assert_report_is(model, out):
    for row, report in enumerate(out.agreement):
        threads = out.paragraph_tree[row].threads
        assert [entry.thread for entry in report] == [thread.index for thread in threads] == list(range(len(threads)))
        chosen, log_probs = hand_made(model, out, row)
        for thread, entry in zip(threads, report, strict=True):
            own = [place for place, (owner, _) in enumerate(order(out, row)) if owner is thread]
            assert entry.tokens == len(own) and entry.chosen == sum(chosen[place] for place in own)
            assert entry.agreement == (entry.chosen / len(own) if own else None)
            if own:
                assert entry.log_prob == pytest.approx(sum(log_probs[place] for place in own) / len(own), abs=1e-4)
    tokens, agreeing = (sum(getattr(e, name) for r in out.agreement for e in r) for name in ("tokens", "chosen"))
    assert tokens == out.stats.generated_tokens and out.stats.agreement == agreeing / tokens


@pytest.mark.parametrize("runtime", ["torch", "auto"])
@pytest.mark.parametrize("family", ["llama", "wide_llama", "gemma3", "gpt2"])
def test_one_thread_agrees_with_itself(family, runtime):
    model = tiny_model(family, 5)
    out = run(model, MedusaHeads.random(model), attach={"runtime": runtime}, fork=False)
    assert out.stats.agreement == 1.0 and out.stats.final_slots == 0
    assert [[entry.agreement for entry in report] for report in out.agreement] == [[1.0]] * 2
    for options in ({"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2, "min_new_tokens": 10}):
        assert run(model, attach={"runtime": runtime}, fork=False, **options).stats.agreement == 1.0


@pytest.mark.parametrize("seed", [5, 11, 24])
@pytest.mark.parametrize("piece", [3, 512])
def test_agreement_is_that_of_one_plain_pass(monkeypatch, seed, piece):
    monkeypatch.setattr("medusa_apar.stitched._PIECE", piece)
    model = forking_model(seed)
    plain = run(model, verify=None)
    out = run(model, RecallHeads(model, plain.paragraph_tree))
    assert plain.agreement is None and torch.equal(out.sequences, plain.sequences)
    assert 0 < out.stats.agreement < 1 and out.stats.final_slots == 0 and out.stats.stitched_seconds > 0
    assert_report_is(model, out)
    assert out.stats.steps > plain.stats.steps / 4 and out.stats.regenerated == 0


def test_sampling_reports_log_probabilities_alone():
    model = forking_model(24)
    out = run(model, do_sample=True, seed=3, top_k=5)
    for row, report in enumerate(out.agreement):
        _, log_probs = hand_made(model, out, row)
        own = [(thread.index, log_prob) for (thread, _), log_prob in zip(order(out, row), log_probs, strict=True)]
        for entry in report:
            mine = [log_prob for index, log_prob in own if index == entry.thread]
            assert entry.tokens == len(mine) and entry.chosen is None and entry.agreement is None
            assert (
                entry.log_prob is None
                if not mine
                else math.isclose(entry.log_prob, sum(mine) / len(mine), abs_tol=1e-4)
            )
    assert out.stats.agreement is None


def rewritten(out, row):
    """(thread, text before it, its visible tokens) for every thread that was written anew."""
    found, before = {}, []
    for thread, index in order(out, row):
        if out.agreement[row][thread.index].regenerated:
            found.setdefault(thread, (list(before), []))[1].append(thread.tokens[index])
        before.append(thread.tokens[index])
    return [(thread, *parts) for thread, parts in found.items()]


@pytest.mark.parametrize("make", [forking_model, ending_model])
@pytest.mark.parametrize("seed", [1, 5, 24])
def test_rewritten_threads_are_plain_greedy_decoding_behind_the_text_before(make, seed):
    model = make(seed)
    first = run(model, verify=None)
    out = run(model, regenerate_below=0.5)
    assert out.stats.regenerated > 0 and out.stats.final_slots == 0
    assert_report_is(model, out)
    count = 0
    for row in range(2):
        tree = out.paragraph_tree[row]
        prompt = tree.trunk.tokens[: tree.trunk.num_forced]
        for thread, before, visible in rewritten(out, row):
            path = [*prompt, *before, FORK, CHILD]
            ends = thread.finish_reason == "stop" and len(before) + len(visible) < LIMIT
            length = len(visible) + ends
            assert plain_continuation(model, path, length, len(prompt), fork=False) == visible + [EOS] * ends
            assert not thread.children and thread.parent is not None
            count += 1
        assert out.sequences[row, 6 : 6 + len(text_of(out, row))].tolist() == text_of(out, row)
    assert count > 0
    assert out.sequences.shape[1] <= 6 + LIMIT and not torch.equal(out.sequences, first.sequences)


@pytest.mark.parametrize("make", [forking_model, ending_model])
@pytest.mark.parametrize("seed", [5, 24])
def test_drafts_and_schedules_never_show(monkeypatch, make, seed):
    monkeypatch.setattr("medusa_apar.checks.check_lengths", lambda *args: None)
    model = make(seed)
    plain = run(model, regenerate_below=0.6)
    options = {"regenerate_below": 0.6}
    for heads, attach in (
        (MedusaHeads.random(model), {}),
        (HydraHeads.random(model), {"max_threads": 1}),
        (RecallHeads(model, plain.paragraph_tree), {"budget": 60}),
        (RecallHeads(model, plain.paragraph_tree), {"pool_slots": 170}),
    ):
        out = run(model, heads, attach=attach, **options)
        assert torch.equal(out.sequences, plain.sequences) and out.agreement == plain.agreement
        assert out.stats.final_slots == 0
    for row in range(2):
        apar = medusa_apar.attach(model, None, CONTROL)
        alone = {name: tensor[row : row + 1, 2 * row :] for name, tensor in prompts(2, 6, seed=2, ragged=True).items()}
        out = apar.generate(**alone, **GREEDY, **options)
        assert out.sequences[0, 6 - 2 * row :].tolist() == text_of(plain, row)
        assert out.agreement == plain.agreement[row : row + 1]


@pytest.mark.parametrize("seed", [5, 11, 24])
@pytest.mark.parametrize("judged", [4, JUDGED])
def test_every_limit_is_the_unlimited_run_cut_short(monkeypatch, seed, judged):
    """With few tokens known beyond the limit, rewriting often makes an answer too short, and more has to be written."""
    monkeypatch.setattr("medusa_apar.stitched.JUDGED", judged)
    model = ending_model(seed)
    whole = run(model, rows=1, max_new_tokens=60, regenerate_below=0.7)
    assert whole.stats.regenerated > 0
    heads = RecallHeads(model, whole.paragraph_tree)
    short = 0
    for limit in range(1, 60, 3):
        out = run(model, heads, rows=1, max_new_tokens=limit, regenerate_below=0.7)
        width = out.sequences.shape[1]
        assert width <= 6 + limit and torch.equal(out.sequences, whole.sequences[:, :width])
        assert out.stats.final_slots == 0
        short += width < min(6 + limit, whole.sequences.shape[1])
    assert short <= 2  # only where twice the limit was not enough


def test_scores_follow_the_rewritten_threads():
    model = ending_model(24)
    out = run(model, regenerate_below=0.6, output_scores=True, output_logits=True, repetition_penalty=1.2)
    assert out.stats.regenerated > 0
    width = out.sequences.shape[1] - 6
    assert len(out.scores) == len(out.logits) == width
    for row in range(2):
        for column, token in enumerate(text_of(out, row)):
            assert int(out.scores[column][row].argmax()) == token


def test_the_hook_of_model_generate_and_plain_tensors():
    model = ending_model(24)
    expected = run(model, regenerate_below=0.6)
    inputs = prompts(2, 6, seed=2, ragged=True)
    apar = medusa_apar.attach(model, None, CONTROL)
    out = model.generate(**inputs, **GREEDY, custom_generate=apar, regenerate_below=0.6)
    assert torch.equal(out.sequences, expected.sequences) and out.agreement == expected.agreement
    options = GREEDY | {"return_dict_in_generate": False}
    assert torch.equal(model.generate(**inputs, **options, custom_generate=apar, regenerate_below=0.6), out.sequences)


def test_text_beyond_the_context_is_not_scored():
    """A path may be shorter than the reading order: learned positions end before the text does."""
    model = forking_model(24, "gpt2")
    model.config.n_positions = model.config.max_position_embeddings = 24
    for options in ({}, {"regenerate_below": 0.9}):
        out = run(model, rows=1, **options)
        assert out.stats.generated_tokens == LIMIT and out.stats.final_slots == 0
        assert sum(entry.tokens for entry in out.agreement[0]) == 24 - 6


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"verify": "twice"}, "'twice' is not None or 'stitched'"),
        ({"return_dict_in_generate": False}, "return_dict_in_generate"),
        ({"verify": None, "regenerate_below": 0.5}, "verify='stitched'"),
        ({"regenerate_below": 0.0}, "above 0"),
        ({"regenerate_below": 1.5}, "at most 1"),
        ({"regenerate_below": float("nan")}, "above 0"),
        ({"regenerate_below": 0.5, "do_sample": True}, "greedy"),
        ({"regenerate_below": 0.5, "fork": False}, "without forking"),
        ({"regenerate_below": 0.5, "streamer": TextStreamer(tiny_tokenizer())}, "streamer"),
        ({"regenerate_below": 0.5, "stop_strings": ["x"], "tokenizer": tiny_tokenizer()}, "stop strings"),
        ({"regenerate_below": 0.5, "max_time": 3.0}, "stopping criteria"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_before_any_work(options, sentence):
    model = forking_model(1)
    apar = medusa_apar.attach(model, None, CONTROL)
    handle = model.register_forward_pre_hook(lambda *_: pytest.fail("work was done first"))
    try:
        with pytest.raises(ValueError, match=sentence) as raised:
            apar.generate(**prompts(1, 6), **(GREEDY | options))
        assert "\n" not in str(raised.value)
        with pytest.raises(ValueError, match="without forking"):
            medusa_apar.attach(model).generate(**prompts(1, 6), **GREEDY, regenerate_below=0.5)
    finally:
        handle.remove()
