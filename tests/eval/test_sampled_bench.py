"""The benchmark's sampled answers, and the untuned base: whose text is whose, and what may be compared."""

import json
import shutil
from types import SimpleNamespace

import pytest

from medusa_apar.commands.cli import main
from medusa_apar.eval import bench, systems
from medusa_apar.loading import load
from medusa_apar.models.chat import encode
from medusa_apar.requests import Sampling
from tests.support.benchmarks import asked_folder, command, lines, read_rows, row
from tests.support.folders import word_adapter, word_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return asked_folder(tmp_path_factory.mktemp("sampled"))


SAMPLED = ("--temperature", 2, "--top-p", 0.9, "--repeat", 2, "--limit", 2)


def test_sampled_answers_can_be_repeated_and_are_compared_by_their_speed(folder, tmp_path, capsys):
    """The same seed has our systems write the same text, with drafts and without; another repeat is another sample."""
    names = ("hf", "hf-pld", "ours-ar", "heads", "threads", "ours")
    answers = []
    for out, some in ((tmp_path / "one", names), (tmp_path / "two", ("ours", "hf", "hf-pld"))):
        assert command(folder, out, "--systems", *some, *SAMPLED) == 0
        answers.append({(r["system"], r["prompt"], r["repeat"]): r["ids"] for r in read_rows(out)})
    first, second = answers
    assert second == {which: ids for which, ids in first.items() if which in second} and len(second) == 2 * 2 * 3
    for prompt, repeat in ((p, n) for p in "01" for n in range(2)):
        assert first["ours-ar", prompt, repeat] == first["heads", prompt, repeat]
        assert first["threads", prompt, repeat] == first["ours", prompt, repeat]
    for name in names:
        assert first[name, "0", 0] != first[name, "0", 1]
    shown = capsys.readouterr().out
    assert "sampled at temperature 2, top-p 0.9, a seed for each question and repeat, at most 20" in shown
    assert "only tokens per second compare them" in shown and "times as soon done" not in shown
    assert "2 prompts, 2 times each" in shown


def test_what_the_models_own_config_asks_for_is_not_sampled_by(folder):
    """Other engines know nothing of it."""
    apar = load(folder.model, heads=folder.heads)
    inputs = encode(apar.tokenizer, "ask c")
    own = {"repetition_penalty": 3.0, "top_k": 2, "min_p": 0.5, "typical_p": 0.3, "no_repeat_ngram_size": 1}
    own |= {"epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "min_new_tokens": 20, "encoder_repetition_penalty": 9.0}
    for name in ("hf", "hf-pld", "ours-ar", "ours"):
        system = systems.make(name, apar)
        found = []
        for options in (dict.fromkeys(own), own):
            apar.model.generation_config.update(**options)
            found.append([system.answer(inputs, 20, Sampling(2.0, top_p=0.9, seed=seed)).ids for seed in range(3)])
        assert found[0] == found[1] and len({tuple(ids) for ids in found[0]}) == 3, name


def test_what_no_value_turns_off_is_refused(folder, tmp_path, capsys):
    model = shutil.copytree(folder.model, tmp_path / "model")
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(config | {"bad_words_ids": [[7]]}))
    asked = SimpleNamespace(model=str(model), heads=folder.heads, prompts=folder.prompts)
    assert command(asked, tmp_path / "out", "--systems", "hf", "--temperature", 1) == 2
    assert "generation config sets bad_words_ids, and sampled answers are chosen" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_greedy_and_sampled_answers_never_share_a_folder(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(folder, out, "--systems", "ours-ar", "--limit", 1) == 0
    assert command(folder, out, "--systems", "ours-ar", "--limit", 1, "--temperature", 0.5) == 2
    assert "results with another temperature (0.0, now 0.5)" in capsys.readouterr().err
    settings = json.loads((out / "settings.json").read_text())
    del settings["temperature"], settings["top_p"]  # of an earlier version, which was greedy
    (out / "settings.json").write_text(json.dumps(settings))
    assert command(folder, out, "--systems", "ours-ar", "--limit", 1) == 0
    assert command(folder, tmp_path / "hot", "--systems", "ours-ar", "--limit", 1, "--temperature", 0.5) == 0
    for more, says in (
        ([], "temperature (0.5, now 0.0)"),
        (["--temperature", 0.5, "--top-p", 0.9], "top_p (1.0, now 0.9)"),
    ):
        assert command(folder, tmp_path / "hot", "--systems", "ours-ar", "--limit", 1, *more) == 2
        assert f"another {says}" in capsys.readouterr().err
    assert len(read_rows(out)) == len(read_rows(tmp_path / "hot")) == 1


def test_of_sampled_repeats_all_tokens_and_all_seconds_count():
    """A median of times would belong to another text than the tokens do."""
    rows = [row("a", "1", seconds, tokens, n, steps=tokens) for n, (seconds, tokens) in enumerate(((1, 10), (4, 80)))]
    rows += [row("b", "1", seconds, tokens, n, steps=5) for n, (seconds, tokens) in enumerate(((1, 30), (1, 60)))]
    for found in rows:
        found["seed"] = 7 + found["repeat"]
    rows[1]["looping"], rows[3]["finish"] = 0.9, "length"
    figures = bench.summarise(rows, ["a", "b"])["parts"]["all"]
    assert figures["a"]["tokens_per_second"]["value"] == pytest.approx(90 / 5)
    assert figures["b"]["times_the_speed"]["value"] == pytest.approx((90 / 2) / (90 / 5))
    assert figures["b"]["tokens_per_step"] == pytest.approx(90 / 10) and figures["b"]["stopped"] == 0.5
    assert figures["b"]["times_the_answer"] is None and figures["a"]["looping"] == 1


# ---- the untuned base


def test_base_is_the_model_without_its_adapter(folder, tmp_path, capsys):
    base = word_folder(tmp_path / "base")
    tuned, _ = word_adapter(base, tmp_path / "tuned")
    out = tmp_path / "out"
    words = lines(tmp_path / "words.jsonl", {"prompt": "w1 w2 w3"})
    model = ["--model", str(tuned), "--prompts", words, "--max-new-tokens", "12", "--out", str(out)]
    assert main(["bench", *model, "--systems", "hf", "base", "ours-ar"]) == 0
    assert "| base | float32, untuned base |" in capsys.readouterr().out
    by = {r["system"]: r["ids"] for r in read_rows(out)}
    apar = load(base, heads=None, apar=None)
    inputs = encode(apar.tokenizer, "w1 w2 w3")
    plain = apar.model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert by["base"] == plain.tolist() and by["ours-ar"] == by["hf"] != by["base"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--temperature", "nan"], "--temperature: 'nan' must be a number at least 0"),
        (["--temperature", "1", "--top-p", "0"], "--top-p: '0' must be a number above 0 and at most 1"),
    ],
)
def test_no_temperature_and_no_probability_is_said(folder, tmp_path, capsys, more, says):
    with pytest.raises(SystemExit):
        command(folder, tmp_path / "out", *more)
    assert says in capsys.readouterr().err
