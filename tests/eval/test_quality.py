"""`bench --quality` as a whole on tiny models: files, killed runs, whose text is whose, and what cannot be asked."""

import json
import shutil
from itertools import chain

import pytest
import torch

from medusa_apar.commands.cli import main
from medusa_apar.engine.rescoring import run
from medusa_apar.eval import quality, quality_answers, quality_similarity
from medusa_apar.eval.quality_answers import record
from medusa_apar.loading import load
from medusa_apar.models.chat import encode
from tests.support.benchmarks import lines
from tests.support.bytes_writer import bytes_writer, ids_of
from tests.support.folders import forking_folder, word_adapter, word_folder
from tests.support.models import tiny_model
from tests.support.tokenizers import tiny_tokenizer

LIMIT = 24
ASKED = (
    {"id": "a", "prompt": "ask a"},
    {"id": "b", "prompt": "ask b", "reference": "b c d"},
    {"id": "c", "prompt": "ask c", "checks": {"max_words": 3, "without": "no"}},
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model that forks, another that stands for what it was before, and what they are asked."""
    root = tmp_path_factory.mktemp("quality")
    forking_folder(root / "model")
    tiny_model("llama", 1).save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    lines(root / "p.jsonl", *ASKED)
    return root


def command(root, out, *more):
    model = ["--model", str(root / "model"), "--base", str(root / "base"), "--prompts", str(root / "p.jsonl")]
    given = ["--limit", "3", "--max-new-tokens", str(LIMIT), "--batch", "4", "--out", str(out), *map(str, more)]
    return main(["bench", "--quality", *model, *given])


def rows_of(out, name="answers.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """A run to its end; tests copy what they change."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert command(root, out) == 0
    return out


def without_rounding(rows):
    """What is the same whatever a batch holds beside it."""
    return [row | {"threads": [thread | {"log_prob": None} for thread in row["threads"]]} for row in rows]


def report_of(out):
    found = json.loads((out / "report.json").read_text())
    return {name: found[name] for name in ("systems", "repeats", "sets", "verdict")}


def test_every_system_answers_every_question_and_all_is_written(whole, root):
    rows = rows_of(whole)
    systems = ["base", "ours-ar", "threads", "lists"]
    ids = ["a", "b", "c", "check-01", "check-02", "check-03"]
    assert [(row["system"], row["prompt"]) for row in rows] == [(name, id) for name in systems for id in ids]
    report = json.loads((whole / "report.json").read_text())
    assert report["systems"] == systems and report["commit"] and report["versions"]["torch"]
    assert report["plan"]["weights"] != report["plan"]["base_weights"] and report["plan"]["max_new_tokens"] == LIMIT
    assert {name: its["parts"]["all"]["questions"] for name, its in report["sets"].items()} == {
        str(root / "p.jsonl"): 3, "instructions": 3}  # fmt: skip
    assert len(report["verdict"]) == 3 * 4 and sum(row["decides"] for row in report["verdict"]) == 6
    threads = report["sets"][str(root / "p.jsonl")]["parts"]["all"]["systems"]["threads"]
    assert threads["threads"] > 1 and threads["likelihood_seam"] < 0 and 0 < threads["agreement"] < 1
    assert threads["checks"] is not None and threads["rouge_l"] is not None
    text = (whole / "report.md").read_text()
    for words in (
        "**What decides**",
        "| threads | ours-ar |",
        "stopped after item 1",
        "log-likelihood",
        "threads less",
    ):
        assert words in text
    assert (whole / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_answers_in_a_crowd_are_those_that_transformers_and_one_call_give(whole, root):
    by = {(row["system"], row["prompt"]): row for row in rows_of(whole)}
    tuned, base = load(root / "model", heads=None), load(root / "base", heads=None, apar=None)
    for question in ASKED:
        inputs = encode(tuned.tokenizer, question["prompt"])
        for system, apar, options in (
            ("ours-ar", tuned, {"fork": False}), ("threads", tuned, {"fork": True}), ("base", base, None),
            ("lists", base, {"fork": "lists"}),
        ):  # fmt: skip
            generate = base.model.generate if options is None else apar.generate
            ids = generate(**inputs, max_new_tokens=LIMIT, do_sample=False, **(options or {}))
            ids = ids[0, inputs["input_ids"].shape[1] :].tolist()
            row, eos = by[system, question["id"]], apar.model.generation_config.eos_token_id
            assert row["ids"] == [id for id in ids if id not in tuned.tokenizer.all_special_ids]
            assert row["finish"] == ("stop" if ids[-1] == eos else "length")
            assert row["text"] == tuned.tokenizer.decode(row["ids"])


def test_threads_tell_whose_text_is_whose_and_how_plain_decoding_sees_it(whole, root):
    forked = [row for row in rows_of(whole) if len(row["threads"]) > 1]
    assert forked and {row["system"] for row in forked} == {"threads"}
    tuned, prompts = load(root / "model", heads=None), {row["id"]: row["prompt"] for row in ASKED}
    for row in forked:
        spans = sorted(chain.from_iterable(thread["spans"] for thread in row["threads"]))
        assert [span[0] for span in spans] == [0, *(span[1] for span in spans[:-1])]
        assert spans[-1][1] == len(row["text"])
    for row in (row for row in forked if row["prompt"] in prompts):
        inputs = encode(tuned.tokenizer, prompts[row["prompt"]])
        options = {"max_new_tokens": LIMIT, "do_sample": False, "rescore": True, "return_dict_in_generate": True}
        output = tuned.generate(**inputs, **options)
        tree, shown = output.paragraph_tree[0], {}
        for thread, index in list(tree.reading_order())[:LIMIT]:
            shown.setdefault(thread, []).append(thread.tokens[index])
        order = [thread for thread in tree.depth_first() if thread in shown]
        assert len(order) == len(row["threads"]) > 1
        for thread, its in zip(order, row["threads"], strict=True):
            agreed = output.agreement[0][thread.index]
            assert its["text"] == tuned.tokenizer.decode(shown[thread], skip_special_tokens=True)
            assert its["parent"] == (-1 if thread.parent is None else order.index(thread.parent))
            assert (its["scored"], its["chosen"]) == (agreed.tokens, agreed.chosen)
            assert its["log_prob"] == pytest.approx(agreed.log_prob, abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_no_character_is_lost_between_threads(seed):
    """Threads may end within a character, which their tokens are bytes of."""
    apar = bytes_writer(seed)
    requests = [apar.request(str(n), ids_of("aé?你"[: n + 1]), max_new_tokens=60) for n in range(4)]
    with apar.engine() as engine:
        run(engine, requests)
    for request in requests:
        found = record(request, apar.tokenizer, ())
        spans = sorted(chain.from_iterable(thread["spans"] for thread in found["threads"]))
        assert "".join(found["text"][begin:end] for begin, end in spans) == found["text"]
        assert all(one[1] == other[0] for one, other in zip(spans, spans[1:], strict=False))


def test_a_killed_run_goes_on_to_the_same(whole, root, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    text = (out / "answers.jsonl").read_text()
    (out / "answers.jsonl").write_text(text[: len(text) // 2])  # in mid-line
    for name in ("report.json", "report.md", "quality.png"):
        (out / name).unlink()
    asked = []
    ours = quality_answers.answer_batch
    monkeypatch.setattr(
        quality_answers,
        "answer_batch",
        lambda engine, system, todo, plan: asked.append(todo) or ours(engine, system, todo, plan),
    )
    kept = text[: len(text) // 2].count("\n")
    assert command(root, out) == 0
    assert without_rounding(rows_of(out)) == without_rounding(rows_of(whole)) and sum(map(len, asked)) == 24 - kept
    assert report_of(out) == report_of(whole) and (out / "quality.png").is_file()
    asked.clear()
    assert command(root, out) == 0 and not asked


def test_given_answers_are_measured_again_without_their_systems(whole, root, tmp_path, capsys):
    out = shutil.copytree(whole, tmp_path / "out")
    (out / "report.json").unlink()
    (out / "scores.jsonl").unlink()
    assert quality.main([str(out)]) == 0
    assert report_of(out) == report_of(whole) and "**What decides**" in capsys.readouterr().out
    other = tmp_path / "other"
    shutil.copytree(root / "model", other)
    settings = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps(settings | {"base": str(other)}))
    assert quality.main([str(out)]) == 2
    assert "is another model now than the untuned base" in capsys.readouterr().err


def test_samples_have_a_seed_for_each_question_and_repeat(root, tmp_path):
    outs = [tmp_path / "one", tmp_path / "two"]
    for out, batch in zip(outs, (1, 5), strict=True):
        sampled = ("--temperature", 1.5, "--top-p", 0.9, "--repeat", 2, "--systems", "ours-ar", "threads")
        assert command(root, out, *sampled, "--batch", batch) == 0
    one, two = (without_rounding(rows_of(out)) for out in outs)
    assert one == two and len({row["seed"] for row in one}) == len(one) / 2
    by = {(row["system"], row["prompt"], row["repeat"]): row["text"] for row in one}
    assert by["ours-ar", "a", 0] != by["ours-ar", "a", 1]
    report = json.loads((outs[0] / "report.json").read_text())
    assert report["repeats"] == 2 and "sampled at temperature 1.5" in (outs[0] / "report.md").read_text()


def test_what_is_not_installed_is_said_and_left_out(whole, tmp_path, monkeypatch):
    out = shutil.copytree(whole, tmp_path / "out")
    monkeypatch.setattr(quality_similarity, "PACKAGE", "no_such_package")
    monkeypatch.setattr(quality_similarity, "chrf", lambda: None)
    assert quality.main([str(out)]) == 0
    text = (out / "report.md").read_text()
    assert "MiniLM is not installed" in text and "sacrebleu is not installed" in text and "similarity of" not in text
    assert "| ROUGE-L |" in text and "chrF |" not in text


def test_the_base_of_an_adapter_is_found(tmp_path):
    base = word_folder(tmp_path / "base")
    tuned, _ = word_adapter(base, tmp_path / "tuned")
    asked = lines(tmp_path / "p.jsonl", {"prompt": "w1 w2 w3"})
    given = ["--model", str(tuned), "--prompts", asked, "--limit", "1", "--max-new-tokens", "12"]
    assert main(["bench", "--quality", *given, "--out", str(tmp_path / "out"), "--systems", "base", "ours-ar"]) == 0
    by = {(row["system"], row["prompt"]): row["ids"] for row in rows_of(tmp_path / "out")}
    model = load(base, heads=None, apar=None).model
    plain = model.generate(torch.tensor([[6, 7, 8]]), max_new_tokens=12, do_sample=False)[0, 3:].tolist()
    assert by["base", "1"] == [id for id in plain if id > 2] != by["ours-ar", "1"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--systems", "hf"], "system 'hf' is none of base, ours-ar, threads, lists"),
        (["--systems", "base", "base"], "--systems names one twice"),
        (["--check"], "--check is not for --quality"),
        (["--judge", "http://localhost"], "--judge is not for --quality"),
        (["--heads", "none"], "--heads is not for --quality"),
        (["--serve"], "--quality is not for --serve"),
        (["--clients", "2"], "--clients is for --serve"),
        (["--top-p", "0.9"], "--top-p 0.9 needs a --temperature above 0"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl is no file and none of default"),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(root, tmp_path, capsys, more, says):
    assert command(root, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_prompts_that_cannot_be_asked_are_one_sentence(root, tmp_path, capsys):
    for row, says in (
        ({"id": "x", "prompt": "a", "checks": {"item": 1}}, "prompt x has a check 'item'"),
        ({"id": "check-01", "prompt": "a"}, "both have a question check-01"),
    ):
        assert command(root, tmp_path / "out", "--prompts", lines(tmp_path / "p.jsonl", row)) == 2
        assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_model_without_an_adapter_needs_its_base_named(root, tmp_path, capsys):
    given = ["bench", "--model", str(root / "model"), "--out", str(tmp_path / "out")]
    assert main([*given, "--quality"]) == 2
    assert "is tuned by no adapter: name its base with --base" in capsys.readouterr().err
    assert main([*given, "--base", "x"]) == 2
    assert "--base is for --quality" in capsys.readouterr().err


def test_answers_of_other_settings_are_never_mixed(whole, root, tmp_path, capsys):
    out = shutil.copytree(whole, tmp_path / "out")
    for more, name in ((["--max-new-tokens", 9], "max_new_tokens"), (["--temperature", 1], "temperature"),
                       (["--limit", 2], "prompts"), (["--base", root / "model"], "base")):  # fmt: skip
        assert command(root, out, *more) == 2
        assert f"holds results with another {name}" in capsys.readouterr().err
    assert (out / "questions.jsonl").read_text() == (whole / "questions.jsonl").read_text()


def test_folders_that_hold_no_such_answers_are_one_sentence(whole, tmp_path, capsys):
    assert quality.main([str(tmp_path)]) == 2
    out = shutil.copytree(whole, tmp_path / "out")
    rows = [row for row in rows_of(out) if (row["system"], row["prompt"]) != ("lists", "b")]
    (out / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert quality.main([str(out)]) == 2
    assert "lists has not answered question b yet" in capsys.readouterr().err
    (out / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["system"] != "lists"))
    assert quality.main([str(out)]) == 0 and report_of(out)["systems"] == ["base", "ours-ar", "threads"]
    (out / "answers.jsonl").write_text(
        "".join(json.dumps({"system": "base", "prompt": row["prompt"], "repeat": 0}) + "\n" for row in rows)
    )
    assert quality.main([str(out)]) == 2
    assert "holds a line that is no result of ours" in capsys.readouterr().err
