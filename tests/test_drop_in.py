"""Everything else a user of `model.generate` sets: streamers, stop strings, criteria, constraints, batches."""

import copy
import io
import pickle
import threading

import pytest
import torch
from transformers import CompileConfig, TextIteratorStreamer, pipeline
from transformers.generation import BaseStreamer

import medusa_apar
from medusa_apar.events import StepFinished
from medusa_apar.heads import HydraHeads, MedusaHeads
from tests.support.drafters import RecallHeads
from tests.support.models import CONTROL, VOCAB, forking_model, tiny_model
from tests.support.prompts import prompts
from tests.support.tokenizers import tiny_tokenizer

GREEDY = {"do_sample": False, "max_new_tokens": 16}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=5, eos=-50.0)


@pytest.mark.parametrize("bare_hook", [True, False])
def test_transformers_own_streamer(model, tokenizer, bare_hook):
    apar = medusa_apar.attach(model, MedusaHeads.random(model))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    inputs = prompts(1, 6)
    if bare_hook:
        work = threading.Thread(
            target=model.generate, kwargs={**inputs, **GREEDY, "custom_generate": apar, "streamer": streamer}
        )
    else:
        work = threading.Thread(target=apar.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
    work.start()
    pieces = list(streamer)
    work.join()
    plain = model.generate(**inputs, **GREEDY)[0, 6:]
    assert "".join(pieces) == tokenizer.decode(plain)


def fail(*args, **kwargs):
    raise RuntimeError("in mid-run")


FAILURES = {
    "a refused argument": {"assistant_model": object()},
    "a refused field": {"compile_config": CompileConfig()},
    "a bad prompt": {"input_ids": torch.full((1, 5), VOCAB), "attention_mask": None},
    "a bad mode": {"fork": "sometimes"},
    "no tokenizer": {"stop_strings": ["x"]},
    "a failing processor": {"logits_processor": [fail]},
    "a failing criterion": {"stopping_criteria": [fail]},
    "a failing consumer": {"events": fail},
    "nothing possible": {"suppress_tokens": list(range(VOCAB))},
    "a paged cache": {"cache_implementation": "paged"},  # of which transformers tells no hook
}


@pytest.mark.parametrize(
    ("failure", "bare_hook"),
    [(failure, bare) for failure in FAILURES for bare in (True, False) if not (bare and failure == "a paged cache")],
)
def test_a_call_that_fails_ends_its_streamer(model, tokenizer, failure, bare_hook):
    """Once: a reader of the next call's text would take a second end for that one's."""
    apar = medusa_apar.attach(model)
    streamer = TextIteratorStreamer(tokenizer, timeout=5)
    options = {**prompts(1, 6), **GREEDY, "streamer": streamer, **FAILURES[failure]}
    with pytest.raises((ValueError, NotImplementedError, RuntimeError)) as raised:
        model.generate(**options, custom_generate=apar) if bare_hook else apar.generate(**options)
    assert list(streamer) is not None and streamer.text_queue.empty()
    assert "in mid-run" in str(raised.value) or not failure.startswith("a failing")


@pytest.mark.parametrize("bare_hook", [True, False])
def test_a_streamer_that_fails_is_the_error_that_is_told(model, bare_hook):
    class Broken(BaseStreamer):
        put = end = fail

    apar = medusa_apar.attach(model)
    options = {**prompts(1, 6), **GREEDY, "streamer": Broken()}
    with pytest.raises(RuntimeError, match="in mid-run"):
        model.generate(**options, custom_generate=apar) if bare_hook else apar.generate(**options)


@pytest.mark.parametrize("bare_hook", [True, False])
def test_what_fails_behind_the_end_of_the_text_ends_no_streamer_again(model, tokenizer, bare_hook):
    streamer, text = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=5), []

    def fail_behind_the_end(input_ids, scores):
        """The answer is asked about once more when it is held against plain decoding."""
        text.extend(list(streamer) if streamer.stop_signal in streamer.text_queue.queue else [])
        if text:
            raise RuntimeError("behind the end")
        return scores

    apar = medusa_apar.attach(model)
    options = {**prompts(1, 6), **GREEDY, "streamer": streamer, "return_dict_in_generate": True, "rescore": True}
    options["logits_processor"] = [fail_behind_the_end]
    with pytest.raises(RuntimeError, match="behind the end"):
        model.generate(**options, custom_generate=apar) if bare_hook else apar.generate(**options)
    assert text and streamer.text_queue.empty()


@pytest.mark.parametrize("runtime", ["torch", "auto"])
@pytest.mark.parametrize("with_heads", [False, True])
@pytest.mark.parametrize("held", [False, True])
def test_a_hook_copied_beside_its_model_is_the_copys(runtime, with_heads, held):
    """What is done to the first model afterwards is nothing to the copies."""
    model = tiny_model("wide_llama", seed=5, eos=-50.0)
    apar = medusa_apar.attach(model, HydraHeads.random(model) if with_heads else None, CONTROL, runtime=runtime)
    expected = model.generate(**prompts(1, 6), **GREEDY)
    if held:
        model.hook = apar
        other = copy.deepcopy(model)
        hook = other.hook
    else:
        other, hook = copy.deepcopy((model, apar))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert hook.model is other is not model
    assert with_heads == (hook.heads is not None) and (not with_heads or hook.heads is not apar.heads)
    assert torch.equal(hook.generate(**prompts(1, 6), **GREEDY, fork=False), expected)
    assert torch.equal(other.generate(**prompts(1, 6), **GREEDY, fork=False, custom_generate=hook), expected)
    assert type(hook.runtime) is type(apar.runtime) and hook.runtime is not apar.runtime


class Falsy:
    """A tokenizer with a length of 0."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, *args, **options):
        return self._tokenizer(*args, **options)

    def __len__(self):
        return 0


@pytest.mark.parametrize("bare_hook", [True, False])
def test_a_calls_tokenizer_is_taken_whatever_its_length(tokenizer, bare_hook):
    model = tiny_model(seed=5)
    given, inputs = Falsy(tokenizer), prompts(1, 6) | GREEDY | {"return_dict_in_generate": True}
    for apar in (medusa_apar.attach(model, tokenizer=tokenizer), medusa_apar.attach(model)):
        inputs["tokenizer"] = given
        out = model.generate(**inputs, custom_generate=apar) if bare_hook else apar.generate(**inputs)
        assert out.tokenizer is given


def test_a_hook_is_copied_with_its_model_and_says_why_it_cannot_be_pickled(model):
    apar = medusa_apar.attach(model, MedusaHeads.random(model))
    expected = model.generate(**prompts(1, 6), **GREEDY)
    for other in (copy.deepcopy(apar), copy.copy(apar), copy.deepcopy({"custom_generate": apar})["custom_generate"]):
        assert other is not apar and other.model is model
        assert torch.equal(model.generate(**prompts(1, 6), **GREEDY, custom_generate=other), expected)
    for pickled in (pickle.dumps, lambda hook: torch.save(hook, io.BytesIO())):
        with pytest.raises(TypeError, match="attach them again") as raised:
            pickled(apar)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("whose", ["the hook's", "the call's"])
@pytest.mark.parametrize("stop", [str, list])
def test_stop_strings_of_the_bare_hook(tokenizer, whose, stop):
    model, inputs = tiny_model(seed=5), prompts(1, 6)
    text = tokenizer.decode(model.generate(**inputs, **GREEDY)[0, 7:9])
    options = {**inputs, **GREEDY, "stop_strings": text if stop is str else [text, "never"]}
    expected = model.generate(**options, tokenizer=tokenizer)
    assert expected.shape[1] == 9
    apar = medusa_apar.attach(model, tokenizer=tokenizer if whose == "the hook's" else None)
    given = {} if whose == "the hook's" else {"tokenizer": tokenizer}
    assert torch.equal(model.generate(**options, **given, custom_generate=apar), expected)
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(**options, custom_generate=medusa_apar.attach(model))


@pytest.mark.parametrize("name", ["stop_strings", "stop_sequence"])
def test_a_pipeline_takes_stop_strings(tokenizer, name):
    model = tiny_model(seed=5)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    text = pipe("Hello", return_full_text=False, **GREEDY)[0]["generated_text"]
    options = {**GREEDY, name: [text[4:6]] if name == "stop_strings" else text[4:6]}
    expected = pipe("Hello", **options, **({"tokenizer": tokenizer} if name == "stop_strings" else {}))
    assert len(expected[0]["generated_text"]) < len("Hello") + len(text)
    apar = medusa_apar.attach(model, MedusaHeads.random(model), tokenizer=tokenizer)
    assert pipe("Hello", **options, custom_generate=apar) == expected


@pytest.mark.parametrize("where", ["argument", "config", "model"])
@pytest.mark.parametrize("rows", [1, 3])
def test_stop_strings(tokenizer, where, rows):
    model = tiny_model(seed=5)
    inputs = prompts(rows, 6, ragged=True)
    text = model.generate(**inputs, **GREEDY)[0, 6:]
    options = {"stop_strings": [tokenizer.decode(text[4:6])], "tokenizer": tokenizer}
    expected = model.generate(**inputs, **GREEDY, **options)
    assert expected.shape[1] < 6 + 16 or rows > 1
    apar = medusa_apar.attach(model, MedusaHeads.random(model), tokenizer=tokenizer)
    if where == "argument":
        actual = apar.generate(**inputs, **GREEDY, **options)
    elif where == "config":
        config = model.generation_config.__class__.from_dict(model.generation_config.to_dict())
        config.update(**GREEDY, stop_strings=options["stop_strings"])
        actual = apar.generate(**inputs, generation_config=config)
    else:
        model.generation_config.stop_strings = options["stop_strings"]
        actual = apar.generate(**inputs, **GREEDY)
        assert model.generation_config.stop_strings == options["stop_strings"]
    assert torch.equal(actual, expected)


def test_criteria_see_each_row_and_pads_are_the_pad_token():
    model = tiny_model(seed=5, eos=-50.0)
    model.generation_config.pad_token_id = 60
    inputs = prompts(3, 6)
    stops = torch.tensor([3, 12, 7])

    def stop(input_ids, scores, **kwargs):
        return input_ids.shape[1] - 6 >= stops

    config = model.generation_config
    out = medusa_apar.attach(model).generate(**inputs, **GREEDY, stopping_criteria=[stop], generation_config=config)
    plain = model.generate(**inputs, **GREEDY)
    assert out.shape == (3, 6 + 12)
    for row, length in enumerate(stops.tolist()):
        assert torch.equal(out[row, : 6 + length], plain[row, : 6 + length])
        assert (out[row, 6 + length :] == 60).all()


def test_max_time_ends_a_run(model):
    out = medusa_apar.attach(model).generate(**prompts(1, 6), do_sample=False, max_new_tokens=200, max_time=1e-4)
    assert 6 < out.shape[1] < 20


def test_prefix_allowed_tokens_fn_is_asked_for_its_own_row(model):
    inputs = prompts(3, 6)
    allowed = [[7, 8, 9], [20, 21], [30, 31, 32, 33]]

    def choose(row, ids):
        assert ids[:6].tolist() == inputs["input_ids"][row].tolist()
        return allowed[row]

    expected = model.generate(**inputs, **GREEDY, prefix_allowed_tokens_fn=choose)
    heads = MedusaHeads.random(model)
    actual = medusa_apar.attach(model, heads).generate(**inputs, **GREEDY, prefix_allowed_tokens_fn=choose)
    assert torch.equal(actual, expected)


def test_num_return_sequences_of_a_batch(model):
    inputs = prompts(2, 6)
    options = {"do_sample": True, "max_new_tokens": 8, "num_return_sequences": 3, "seed": 4}
    out = medusa_apar.attach(model).generate(**inputs, **options)
    with_heads = medusa_apar.attach(model, MedusaHeads.random(model)).generate(**inputs, **options)
    assert out.shape == (6, 14) and torch.equal(out, with_heads)
    assert torch.equal(out[:, :6], inputs["input_ids"].repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in out.tolist()}) == 6


def test_overlapping_calls_and_plain_calls_beside_them(model):
    """A consumer of events runs other generate calls in the middle of a step loop: none disturbs another."""
    inputs, others = prompts(1, 6), prompts(2, 5, seed=9)
    expected, expected_others = model.generate(**inputs, **GREEDY), model.generate(**others, **GREEDY)
    apar, before = medusa_apar.attach(model), model.config._attn_implementation

    def interrupt(event):
        if isinstance(event, StepFinished) and event.step == 3:
            assert torch.equal(model.generate(**others, **GREEDY), expected_others)
            assert torch.equal(apar.generate(**others, **GREEDY), expected_others)

    assert torch.equal(apar.generate(**inputs, **GREEDY, events=interrupt), expected)
    assert model.config._attn_implementation == before
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_calls_from_several_threads(model):
    inputs = [prompts(1, 6, seed=seed) for seed in range(3)]
    expected = [model.generate(**one, **GREEDY) for one in inputs]
    found: dict[int, torch.Tensor] = {}

    def work(index):
        apar = medusa_apar.attach(model)
        found[index] = (apar if index else model).generate(**inputs[index], **GREEDY)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(3):
        assert torch.equal(found[index], expected[index])


def test_guesses_belong_to_their_thread():
    """Drafting every thread from another's hidden state would only cost speed: it must show in the accepted lengths."""
    model = forking_model(24)
    plain = medusa_apar.attach(model, None, CONTROL).generate(
        **prompts(2, 6, seed=2, ragged=True), **GREEDY, return_dict_in_generate=True
    )
    heads = RecallHeads(model, plain.paragraph_tree, wrong_every=1000)
    out = medusa_apar.attach(model, heads, CONTROL, budget=300).generate(
        **prompts(2, 6, seed=2, ragged=True), **GREEDY, return_dict_in_generate=True
    )
    gained = out.stats.accepted_lengths
    assert sum(length * count for length, count in gained.items()) / sum(gained.values()) > 2


def test_bfloat16_runs(model):
    half = tiny_model(seed=5, eos=-50.0).bfloat16()
    out = medusa_apar.attach(half, MedusaHeads.random(half)).generate(**prompts(2, 6, ragged=True), **GREEDY)
    assert out.shape == (2, 22) and int(out.max()) < VOCAB
