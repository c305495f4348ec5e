"""Rescoring: every figure is that of a plain transformers pass, every rewritten thread a plain continuation."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, TextStreamer

import medusa_apar
from medusa_apar.heads import HydraHeads, MedusaHeads
from medusa_apar.threads.fork_manager import ForkManager
from tests.support.drafters import RecallHeads
from tests.support.models import CHILD, CONTROL, EOS, FORK, forking_model, tiny_model
from tests.support.prompts import prompts
from tests.support.tokenizers import tiny_tokenizer

LIMIT = 40
GREEDY = {"do_sample": False, "max_new_tokens": LIMIT, "return_dict_in_generate": True, "rescore": True}


class ThreadsEnd(LogitsProcessor):
    """Ends every thread after three to six tokens, and the trunk never, whatever a random model would do."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row, ids in enumerate(input_ids.tolist()):
            written = ids[::-1].index(CHILD) if CHILD in ids else 0
            scores[row, EOS] = torch.inf if written >= 3 + ids[-1] % 4 else -torch.inf
        return scores


ENDING = {"logits_processor": LogitsProcessorList([ThreadsEnd()])}


def run(model, heads=None, rows=2, attach=None, **options):
    apar = medusa_apar.attach(model, heads, CONTROL, **(attach or {}))
    return apar.generate(**prompts(rows, 6, seed=rows, ragged=True), **(GREEDY | options))


def hand_made(model, out, row, banned=()):
    """(chosen, log-probability) of every token of a row's text, from one plain pass of transformers.

    banned: ids that the call's processors ban on such a path.
    """
    prompt = prompt_of(out, row)
    text = text_of(out, row)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
    logits[:, [FORK, CHILD]] = -torch.inf
    log_probs = logits.log_softmax(-1)[torch.arange(len(text)), torch.tensor(text)]
    logits[:, list(banned)] = -torch.inf
    return (logits.argmax(-1) == torch.tensor(text)).tolist(), log_probs.tolist()


def prompt_of(out, row):
    trunk = out.paragraph_tree[row].trunk
    return trunk.tokens[: trunk.num_forced]


def order(out, row):
    """(thread, index) of the row's text."""
    found = list(out.paragraph_tree[row].reading_order())[: sum(entry.tokens for entry in out.agreement[row])]
    text = [thread.tokens[index] for thread, index in found]
    assert out.sequences[row, 6:].tolist() == text + [0] * (out.sequences.shape[1] - 6 - len(text))
    return found


def text_of(out, row):
    return [thread.tokens[index] for thread, index in order(out, row)]


def shown(out, row):
    """What is said of the threads in the text; how many others there are depends on the schedule."""
    reports = dict.fromkeys(out.agreement[row][thread.index] for thread, _ in order(out, row))
    return [(entry.tokens, entry.chosen, entry.regenerated) for entry in reports]


def assert_report_is(model, out, banned=()):
    for row, report in enumerate(out.agreement):
        threads = out.paragraph_tree[row].threads
        assert [entry.thread for entry in report] == [thread.index for thread in threads] == list(range(len(threads)))
        chosen, log_probs = hand_made(model, out, row, banned)
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
    monkeypatch.setattr("medusa_apar.engine.scheduler._SCORED_ROWS", piece)
    model = forking_model(seed)
    plain = run(model, rescore=False)
    out = run(model, RecallHeads(model, plain.paragraph_tree))
    assert plain.agreement is None and torch.equal(out.sequences, plain.sequences)
    assert 0 < out.stats.agreement < 1 and out.stats.final_slots == 0 and out.stats.rescore_seconds > 0
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
            if mine:
                assert entry.log_prob == pytest.approx(sum(mine) / len(mine), abs=1e-4)
    assert out.stats.agreement is None


def rewritten(out, row):
    """(thread, text before it, its visible tokens) for every thread that was written anew."""
    found, before = {}, []
    for thread, index in order(out, row):
        if out.agreement[row][thread.index].regenerated:
            found.setdefault(thread, (list(before), []))[1].append(thread.tokens[index])
        before.append(thread.tokens[index])
    return [(thread, *parts) for thread, parts in found.items()]


@pytest.mark.parametrize("seed", [1, 5, 24])
def test_rewritten_threads_are_plain_greedy_decoding_behind_the_text_before(seed):
    model = forking_model(seed)
    first = run(model, rescore=False, **ENDING)
    out = run(model, regenerate_below=0.7, **ENDING)
    assert out.stats.regenerated >= 3 and out.stats.final_slots == 0
    assert not torch.equal(out.sequences, first.sequences) and out.sequences.shape[1] <= 6 + LIMIT
    assert_report_is(model, out, banned=[EOS])
    count = 0
    for row in range(2):
        for thread, before, visible in rewritten(out, row):
            path = torch.tensor([[*prompt_of(out, row), *before, FORK, CHILD]])
            assert not thread.children and thread.parent is not None and thread.finish_reason == "stop"
            expected = model.generate(
                path,
                attention_mask=torch.ones_like(path),
                max_new_tokens=len(thread.token_ids),
                do_sample=False,
                suppress_tokens=[FORK, CHILD],
                **ENDING,
            )
            assert expected[0, path.shape[1] :].tolist() == thread.token_ids
            assert thread.token_ids[: len(visible)] == visible
            count += 1
    assert count == out.stats.regenerated


def test_a_rewritten_thread_that_does_not_end_is_given_up(monkeypatch):
    model = forking_model(24)
    first = run(model, **ENDING)
    monkeypatch.setattr("medusa_apar.engine.rescoring.LONGEST", 3)  # the shortest has three tokens and an end token
    out = run(model, regenerate_below=1.0, **ENDING)
    assert out.stats.regenerated == 0 and [shown(out, row) for row in range(2)] == [
        shown(first, row) for row in range(2)
    ]
    assert torch.equal(out.sequences, first.sequences)
    monkeypatch.setattr("medusa_apar.engine.rescoring.LONGEST", 5)
    some = run(model, regenerate_below=1.0, **ENDING)
    assert some.stats.regenerated > 0
    # Accepted drafts may run beyond where a rewritten thread is given up, which must not save it.
    heads = RecallHeads(model, some.paragraph_tree)
    assert torch.equal(run(model, heads, regenerate_below=1.0, **ENDING).sequences, some.sequences)


def test_drafts_and_schedules_never_show(monkeypatch):
    monkeypatch.setattr("medusa_apar.engine.admission.check_fits", lambda *args: None)
    model = forking_model(24)
    options = ENDING | {"regenerate_below": 0.6}
    plain = run(model, **options)
    for heads, attach in (
        (MedusaHeads.random(model), {}),
        (HydraHeads.random(model), {"max_threads": 1}),
        (RecallHeads(model, plain.paragraph_tree), {"budget": 60}),
        (RecallHeads(model, plain.paragraph_tree), {"pool_slots": 160}),
    ):
        out = run(model, heads, attach=attach, **options)
        assert torch.equal(out.sequences, plain.sequences) and out.stats.regenerated == plain.stats.regenerated
        assert [shown(out, row) for row in range(2)] == [shown(plain, row) for row in range(2)]
        assert out.stats.final_slots == 0 and out.stats.peak_slots <= attach.get("pool_slots", 10**6)
    for row in range(2):
        apar = medusa_apar.attach(model, None, CONTROL)
        alone = {name: tensor[row : row + 1, 2 * row :] for name, tensor in prompts(2, 6, seed=2, ragged=True).items()}
        out = apar.generate(**alone, **GREEDY, **options)
        assert out.sequences[0, 6 - 2 * row :].tolist() == text_of(plain, row)


@pytest.mark.parametrize("max_depth", [1, 3])
@pytest.mark.parametrize(("seed", "judged"), [(5, 64), (24, 6)])
def test_every_limit_is_the_unlimited_run_cut_short(monkeypatch, seed, judged, max_depth):
    """With few tokens known beyond the limit, rewriting makes answers too short, and more has to be written."""
    monkeypatch.setattr("medusa_apar.engine.rescoring.JUDGED", judged)
    resumed = []
    resume = ForkManager.resume
    monkeypatch.setattr(ForkManager, "resume", lambda *args: resumed.append(args[2]) or resume(*args))
    model = forking_model(seed)
    options = ENDING | {"regenerate_below": 0.8, "attach": {"max_depth": max_depth}}
    whole = run(model, rows=1, max_new_tokens=45, **options)
    assert whole.stats.regenerated > 2
    heads = RecallHeads(model, whole.paragraph_tree)
    short = 0
    for limit in range(1, 45, 6):
        out = run(model, heads, rows=1, max_new_tokens=limit, **options)
        width = out.sequences.shape[1]
        assert torch.equal(out.sequences, whole.sequences[:, :width]) and out.stats.final_slots == 0
        short += width < 6 + limit
    if max_depth == 1:  # a child with children of its own may become shorter than twice the limit makes up for
        assert not short
    assert resumed or judged > 6 or max_depth == 1


def test_scores_follow_the_rewritten_threads():
    model = forking_model(24)
    out = run(model, regenerate_below=0.6, output_scores=True, output_logits=True, **ENDING)
    assert out.stats.regenerated > 0
    assert len(out.scores) == len(out.logits) == out.sequences.shape[1] - 6
    for row in range(2):
        text = text_of(out, row)
        assert [int(scores[row].argmax()) for scores in out.scores[: len(text)]] == text


def test_the_hook_of_model_generate_and_plain_tensors():
    model = forking_model(24)
    options = ENDING | {"regenerate_below": 0.6}
    expected = run(model, **options)
    inputs = prompts(2, 6, seed=2, ragged=True)
    apar = medusa_apar.attach(model, None, CONTROL)
    out = model.generate(**inputs, **GREEDY, **options, custom_generate=apar)
    assert torch.equal(out.sequences, expected.sequences) and out.agreement == expected.agreement
    tensor = model.generate(**inputs, **(GREEDY | options | {"return_dict_in_generate": False}), custom_generate=apar)
    assert torch.equal(tensor, expected.sequences)


def test_the_cpu_runtime_rewrites_as_torch_does():
    model = forking_model(24, "wide_llama")
    outs = [run(model, attach={"runtime": runtime}, regenerate_below=0.7, **ENDING) for runtime in ("auto", "torch")]
    assert outs[0].stats.regenerated > 0 and torch.equal(outs[0].sequences, outs[1].sequences)
    assert [entry.chosen for entry in outs[0].agreement[0]] == [entry.chosen for entry in outs[1].agreement[0]]


def test_text_beyond_the_context_is_not_scored():
    """A path may be shorter than the reading order: learned positions end before the text does."""
    model = forking_model(24, "gpt2")
    model.config.n_positions = model.config.max_position_embeddings = 24
    for options in ({}, {"regenerate_below": 0.9}):
        out = run(model, rows=1, **options)
        assert out.stats.final_slots == 0 and out.stats.generated_tokens == out.sequences.shape[1] - 6 > 24 - 6
        assert sum(entry.tokens for entry in out.agreement[0]) == 24 - 6


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"return_dict_in_generate": False}, "return_dict_in_generate"),
        ({"rescore": False, "regenerate_below": 0.5}, "rescore=True"),
        ({"regenerate_below": 0.0}, "above 0"),
        ({"regenerate_below": 1.5}, "at most 1"),
        ({"regenerate_below": float("nan")}, "above 0"),
        ({"regenerate_below": 0.5, "do_sample": True}, "greedy"),
        ({"regenerate_below": 0.5, "fork": False}, "without forking"),
        ({"regenerate_below": 0.5, "streamer": TextStreamer(tiny_tokenizer())}, "streamer"),
        ({"regenerate_below": 0.5, "stop_strings": ["x"], "tokenizer": tiny_tokenizer()}, "stop strings"),
        ({"regenerate_below": 0.5, "max_time": 3.0}, "stopping criteria"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_makes_no_sense_is_refused_before_any_work(options, sentence):
    model = forking_model(1)
    apar, unforking = medusa_apar.attach(model, None, CONTROL), medusa_apar.attach(model)
    handle = model.register_forward_pre_hook(lambda *_: pytest.fail("work was done first"))
    try:
        with pytest.raises(ValueError, match=sentence) as raised:
            apar.generate(**prompts(1, 6), **(GREEDY | options))
        assert "\n" not in str(raised.value)
        with pytest.raises(ValueError, match="without forking"):
            unforking.generate(**prompts(1, 6), **GREEDY, regenerate_below=0.5)
    finally:
        handle.remove()
