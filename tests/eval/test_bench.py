"""The benchmark: whose numbers may stand side by side, what a killed run keeps, what is the model's own answer."""

import gzip
import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from medusa_apar.eval import bench, ceilings, check, prompts, statistics, systems
from medusa_apar.eval.ceilings import Ceilings
from medusa_apar.eval.plan import open_results
from medusa_apar.heads import MedusaHeads
from medusa_apar.loading import load
from medusa_apar.models.chat import encode
from tests.support.benchmarks import PLAN, asked_folder, command, lines, read_rows, row
from tests.support.folders import forking_folder

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


# ---- prompt sets


def test_every_benchmarks_lines_are_prompts(tmp_path):
    path = lines(
        tmp_path / "p.jsonl",
        {"question_id": 81, "category": "writing", "turns": ["first", "second"]},
        {"task_id": "HumanEval/0", "prompt": "def f():\n"},
        {"id": "g1", "question": "How many?", "answer": "2"},
        {"id": "c1", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "chat"}]},
        {"prompt": "plain"},
    )
    found = prompts.read(path)
    assert [(p.id, p.category) for p in found] == [
        ("81", "writing"), ("HumanEval/0", "code"), ("g1", "maths"), ("c1", ""), ("5", "")]  # fmt: skip
    assert [p.text for p in found[2:]] == ["How many?", "chat", "plain"]
    assert found[0].text == "first" and "def f()" in found[1].text
    assert [p.id for p in prompts.read(path, 2)] == ["81", "HumanEval/0"]


@pytest.mark.parametrize("bad", ["{", "{}", '{"turns": []}', '{"turns": [""]}', '{"turns": [3]}', "[1]"])
def test_a_bad_line_is_named(tmp_path, bad):
    with pytest.raises(ValueError, match=r"p\.jsonl:2 is no prompt"):
        prompts.read(lines(tmp_path / "p.jsonl", {"turns": ["a"]}, bad))


def test_an_id_counts_once_and_a_file_holds_something(tmp_path):
    with pytest.raises(ValueError, match=r"p\.jsonl:2 has the id 1"):
        prompts.read(lines(tmp_path / "p.jsonl", {"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}))
    with pytest.raises(ValueError, match="holds no prompts"):
        prompts.read(lines(tmp_path / "e.jsonl"))
    with pytest.raises(FileNotFoundError, match="nothing is no file and none of default, vicuna, mt"):
        prompts.read("nothing")


def test_a_named_set_has_its_known_digest(tmp_path, monkeypatch):
    """From the data folder, or from upstream into the cache; never a file of other content."""
    content = b'{"question_id": 1, "turns": ["a"]}\n'
    source = tmp_path / "upstream.jsonl"
    source.write_bytes(content)
    spec = prompts.PromptSet("set.jsonl", hashlib.sha256(content).hexdigest(), source.as_uri())
    packed = prompts.PromptSet("set.jsonl.gz", spec.sha256, source.as_uri())
    monkeypatch.setattr(prompts, "SETS", {"set": spec, "packed": packed})
    monkeypatch.setenv("MEDUSA_APAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MEDUSA_APAR_DATA", str(tmp_path / "data"))
    assert [p.text for p in prompts.read("set")] == ["a"]
    source.unlink()
    assert [p.text for p in prompts.read("set")] == ["a"]  # cached
    (tmp_path / "data").mkdir()
    (tmp_path / "data/set.jsonl").write_bytes(content + b" ")
    with pytest.raises(ValueError, match=r"data/set\.jsonl has sha256 .* it is not used"):
        prompts.read("set")
    monkeypatch.setenv("MEDUSA_APAR_CACHE", str(tmp_path / "other"))
    with pytest.raises(ConnectionError, match="put it into a folder and name that in MEDUSA_APAR_DATA"):
        prompts.read("packed")
    source.write_bytes(content)
    assert gzip.decompress(prompts.find("packed").read_bytes()) == content


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 50)[:-12])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz cannot be read after line"):
        prompts.read(str(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match=r"bytes\.jsonl:1 is no prompt: broken text"):
        prompts.read(str(tmp_path / "bytes.jsonl"))
    with pytest.raises(ValueError, match=r"p\.jsonl:1 is no prompt"):
        prompts.read(lines(tmp_path / "p.jsonl", {"messages": [{"role": "assistant", "content": "x"}]}))


def test_our_own_prompts_are_there():
    assert len(prompts.read("default")) >= 10


# ---- statistics


@unhurried
@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0.1, 50)), min_size=1, max_size=20), st.floats(0.5, 8))
def test_a_ratio_lies_in_its_interval_and_scales(pairs, factor):
    found = statistics.ratio_of_totals([t for t, _ in pairs], [s for _, s in pairs], draws=200)
    assert found.low - 1e-9 <= found.high and min(t / s for t, s in pairs) <= found.value + 1e-9
    faster = [(t, s / factor) for t, s in pairs]
    ratio = statistics.speed_ratio(faster, pairs, draws=200)
    # The same prompts are drawn on both sides: a system that is as much faster everywhere has no interval at all.
    assert ratio.value == pytest.approx(factor) == ratio.low == pytest.approx(ratio.high)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(200):
        seconds = torch.rand(40, generator=generator) + 0.5
        tokens = seconds * (20 + 5 * torch.randn(40, generator=generator))
        found = statistics.ratio_of_totals(tokens.tolist(), seconds.tolist(), draws=300, seed=seed)
        covered += found.low <= 20 <= found.high
    assert 175 <= covered <= 199  # 95 % of 200, give or take; never all of them


def test_sides_of_different_prompts_have_no_ratio():
    with pytest.raises(ValueError, match="got 1 and 2"):
        statistics.speed_ratio([(1, 1)], [(1, 1), (2, 2)])


# ---- what may be compared


def test_systems_that_answered_other_prompts_are_not_compared():
    rows = [row("a", "1"), row("a", "2"), row("b", "1")]
    with pytest.raises(ValueError, match=r"b and a did not answer the same prompts \(2 differs\)"):
        bench.summarise(rows, ["a", "b"])
    with pytest.raises(ValueError, match="in the number of repeats"):
        bench.summarise([*rows, row("b", "2"), row("b", "2", repeat=1)], ["a", "b"])
    assert bench.summarise(rows, ["a"])["prompts"] == 2


def test_speed_is_of_totals_and_medians_and_loops_stand_apart():
    rows = [row("a", "1", 2.0, 20), row("a", "2", 4.0, 100, category="x")]
    rows += [row("b", "1", seconds, 20, repeat=n) for n, seconds in enumerate((9.0, 1.0, 0.5))]
    rows += [row("b", "2", 1.0, 100, repeat=n, looping=0.9, category="x") for n in range(3)]
    rows += [row("a", "1", 2.0, 20, repeat=n) for n in (1, 2)] + [row("a", "2", 4.0, 100, n, 0, "x") for n in (1, 2)]
    for found in rows:
        found["category"] = "x" if found["prompt"] == "2" else ""
    summary = bench.summarise(rows, ["a", "b"])
    everything = summary["parts"]["all"]["b"]
    assert everything["tokens_per_second"]["value"] == pytest.approx(120 / 2.0)  # medians 1.0 and 1.0
    assert everything["times_the_speed"]["value"] == pytest.approx(60 / 20)
    assert everything["times_the_answer"]["value"] == pytest.approx(6.0 / 2.0)
    assert summary["looping"] == ["2"] and summary["parts"]["no loops"]["prompts"] == 1
    assert summary["parts"]["no loops"]["a"]["tokens_per_second"]["value"] == pytest.approx(10.0)
    assert set(summary["parts"]) == {"all", "no loops", "x"}


# ---- the command


def other_heads(folder, into):
    """Heads of the folder's model that draft one token alone."""
    MedusaHeads.random(AutoModelForCausalLM.from_pretrained(folder.model), num_heads=1, seed=5).save_pretrained(into)
    return into


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return asked_folder(tmp_path_factory.mktemp("bench"))


def test_the_command_times_every_system_in_turns(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(systems, "BACKEND", "eager")  # traced, but not compiled: that takes a C++ compiler
    names = [name for name in systems.NAMES if name not in systems.OF_BASE]
    others = other_heads(folder, tmp_path / "others")
    assert command(folder, out, "--systems", *names, "--repeat", 2, "--check", "--other-heads", others) == 0
    shown = capsys.readouterr().out
    assert "**all** (3 prompts)" in shown and "| hf | float32 |" in shown and "Engines: hf: transformers " in shown
    assert "are what the model itself chooses" in shown and "ARE NOT" not in shown
    rows = read_rows(out)
    assert [(r["repeat"], r["prompt"], r["system"]) for r in rows] == [
        (n, str(p), s) for n in range(2) for p in range(3) for s in names
    ]
    by = {(r["system"], r["prompt"]): r for r in rows}
    for prompt in map(str, range(3)):
        plain = by["hf", prompt]["ids"]
        for name in ("hf-pld", "hf-compiled", "ours-ar", "heads", "other-heads"):
            assert by[name, prompt]["ids"] == plain, name
        assert by["ours", prompt]["ids"] == by["threads", prompt]["ids"] == by["other-ours", prompt]["ids"]
        assert by["hf", prompt]["steps"] == by["hf-compiled", prompt]["steps"] == len(plain)
        assert by["ours-ar", prompt]["steps"] == len(plain)
    assert all(0 < r["first_token_seconds"] <= r["seconds"] for r in rows)
    assert any(r["threads"] > 1 for r in rows if r["system"] == "ours")
    assert all(len(r["spans"]) == r["threads"] for r in rows if r["system"] == "ours")
    drafts = {name: [by[name, str(p)]["drafted"]["heads"] for p in range(3)] for name in ("ours", "other-ours")}
    assert drafts["ours"] != drafts["other-ours"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["plan"]["max_new_tokens"] == 20 and summary["versions"]["torch"] and summary["commit"]
    for picture in ("speed.png", "steps.png", "length.png", "timeline.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_a_killed_run_goes_on_and_other_settings_are_refused(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    answered = []
    ours = systems._ours
    monkeypatch.setattr(systems, "_ours", lambda *a: answered.append(1) or ours(*a))
    assert command(folder, out, "--systems", "ours", "ours-ar") == 0
    whole = (out / "results.jsonl").read_text()
    (out / "results.jsonl").write_text(whole[: len(whole) // 2])
    kept = whole[: len(whole) // 2].count("\n")
    answered.clear()
    assert command(folder, out, "--systems", "ours", "ours-ar") == 0
    assert len(read_rows(out)) == 6
    assert (out / "results.jsonl").read_text().splitlines()[:kept] == whole.splitlines()[:kept]
    assert 6 - kept < len(answered) <= 6 - kept + 2  # what was missing, and a warm-up a system
    answered.clear()
    assert command(folder, out, "--systems", "ours", "ours-ar") == 0 and not answered
    for more, name in (
        (["--max-new-tokens", 19], "max_new_tokens"),
        (["--limit", 2], "prompts"),
        (["--heads", "none", "--systems", "threads"], "heads"),
        (["--other-heads", other_heads(folder, tmp_path / "others"), "--systems", "other-ours"], "other_heads"),
    ):
        assert command(folder, out, "--systems", "ours", *more) == 2
        assert f"results with another {name}" in capsys.readouterr().err
    assert len(read_rows(out)) == 6


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--systems", "hf", "tgi"], "system 'tgi' is none of hf, hf-pld"),
        (["--systems", "hf", "hf"], "--systems names one twice"),
        (["--systems", "hf", "--check"], "--check proves the answers of `ours` or `threads`"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl is no file and none of default"),
        (["--systems", "heads", "--heads", "none"], "heads needs draft heads, and this model has none"),
        (["--systems", "hf", "base"], "base needs a model tuned by an adapter, and"),
        (["--systems", "hf", "other-ours"], "--other-heads and a system that drafts with them"),
        (["--systems", "hf", "ours", "--other-heads", "nowhere"], "--other-heads and a system that drafts with them"),
        (["--top-p", "0.9"], "--top-p 0.9 needs a --temperature above 0"),
        (["--temperature", "1", "--check"], "--check proves greedy answers"),
        (["--ceilings", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_input_is_one_sentence(folder, tmp_path, capsys, more, says):
    assert command(folder, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_ceilings_are_of_compiled_systems(folder, tmp_path, capsys):
    ceilings.write(tmp_path / "ceilings.json", Ceilings(10.0, {"float32": {1: 50.0}}, 0.0))
    assert command(folder, tmp_path / "out", "--systems", "hf", "--ceilings", tmp_path / "ceilings.json") == 2
    assert "--ceilings is for the compiled CPU runtime" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_quantised_answers_are_said_checked_and_never_mixed(folder, tmp_path, capsys):
    forking_folder(tmp_path / "model", "wide_llama")
    wide, out = SimpleNamespace(model=str(tmp_path / "model"), heads="none", prompts=folder.prompts), tmp_path / "out"
    asked = ("--systems", "hf", "threads", "--limit", 2)
    told = Ceilings(10.0, {"int8": {1: 50.0, 64: 400.0}}, 35.0)
    ceilings.write(tmp_path / "ceilings.json", told)
    given = ("--quantize", "int8", "--ceilings", tmp_path / "ceilings.json")
    assert command(wide, out, *asked, *given, "--check", "--profile") == 0
    shown = capsys.readouterr().out
    assert "the cores read 10.0 GB/s from memory" in shown and "multiply 50, 400 GMAC/s in int8 at 1, 64 rows" in shown
    assert "Other processes took 35 % of the machine when that was measured" in shown
    assert ceilings.read(out / "ceilings.json") == told
    rows = [row for row in read_rows(out) if row["system"] == "threads"]
    achieved = sum(row["read_bytes"] for row in rows) / 1e9 / sum(row["forward_seconds"] for row in rows)
    share = next(line for line in shown.splitlines() if line.startswith("| threads |") and line.count("|") == 8)
    assert share.split(" | ")[3:5] == [f"{achieved:.1f}", f"{achieved / 10:.0%}"]
    assert all(0 < row["forward_seconds"] < row["seconds"] for row in rows)
    assert "our runtime cpu, int8" in shown and "| threads | int8 |" in shown and "| hf | float32 |" in shown
    assert "are what the rounded weights choose for each thread alone" in shown
    assert "| forward: attention |" in (out / "profile.md").read_text() and (out / "profile.json").is_file()
    assert command(wide, out, *asked) == 2
    assert "holds results with another runtime (cpu, int8, now cpu, float32)" in capsys.readouterr().err


def test_answers_with_line_separators_are_read_back(tmp_path):
    """U+2028 is no end of a line in JSON; str.splitlines() thinks it is one, and a resumed run once died of it."""
    results = open_results(tmp_path, PLAN)
    results.add([{"system": "a", "prompt": "1", "repeat": 0, "text": "one\u2028two\x85three"}])
    assert open_results(tmp_path, PLAN).rows == results.rows != {}


def test_more_repeats_of_some_systems_do_not_stop_a_summary(folder, tmp_path):
    out = tmp_path / "out"
    assert command(folder, out, "--systems", "ours-ar", "--limit", 1, "--repeat", 2) == 0
    assert command(folder, out, "--systems", "ours-ar", "heads", "--limit", 1) == 0
    assert len(read_rows(out)) == 3


# ---- the check


def test_the_check_finds_an_answer_that_is_not_the_timed_one(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(folder, out, "--systems", "threads", "--limit", 1) == 0
    row = read_rows(out)[0]
    (out / "results.jsonl").write_text(json.dumps(row | {"ids": row["ids"][:-1]}) + "\n")
    assert command(folder, out, "--systems", "threads", "--limit", 1, "--check") == 1
    assert "1 ARE NOT, the first in prompt 0: another answer than the timed one" in capsys.readouterr().out


def test_processors_are_not_checked(folder):
    apar = load(folder.model, heads=None)
    check.check_greedy(apar)
    apar.model.generation_config.repetition_penalty = 1.1
    with pytest.raises(ValueError, match="sets repetition_penalty, and --check knows plain greedy decoding only"):
        check.check_greedy(apar)


def test_the_check_finds_a_token_that_is_not_the_models(folder):
    apar = load(folder.model, heads=folder.heads)
    inputs = encode(apar.tokenizer, "ask c")
    output = apar.generate(**inputs, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    tree = output.paragraph_tree[0]
    counts = {"threads": 0, "tokens": 0}
    assert check.differences(apar, tree, counts) == []
    assert counts["tokens"] == sum(len(thread.token_ids) for thread in tree.threads) and counts["threads"] > 1
    thread = tree.threads[1]
    thread.tokens[-1] = (thread.tokens[-1] + 1) % 50 + 5
    place, distance = check.differences(apar, tree, counts)[-1]
    assert place == {"thread": 1, "place": len(thread.token_ids) - 1} and distance > 1e-3
