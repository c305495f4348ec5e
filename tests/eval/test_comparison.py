"""`ours` against the others of a folder, and question by question against the best of its own parts."""

import json

import pytest

from medusa_apar.eval import comparison
from medusa_apar.eval.runs import Runs
from tests.support.benchmarks import row

# Seconds of 100 tokens by system and question; c loops.
SECONDS = {
    "hf": (20.0, 20.0, 40.0),
    "ours-ar": (4.0, 4.0, 8.0),
    "threads": (2.0, 4.0, 8.0),
    "heads": (3.0, 2.0, 1.0),
    "llama.cpp-q4_1": (4.0, 4.0, 12.0),
    "llama.cpp-q8_0": (5.0, 5.0, 2.0),
    "ours": (2.02, 2.5, 1.0),
}


def written(folder, names, repeats=1):
    rows = [
        row(name, prompt, SECONDS[name][place] * noise, 100, n, 0.9 * (prompt == "c")) | {"weights": "int8"}
        for name in names
        for place, prompt in enumerate("abc")
        for n, noise in zip(range(repeats), (1.0, 1.0, 9.0), strict=False)
    ]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def table(text):
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {name: (everything, calm) for name, everything, calm in rows}


def test_ratios_of_speed_and_slower_questions(tmp_path, capsys):
    written(tmp_path, SECONDS, repeats=3)
    assert comparison.main([str(tmp_path)]) == 0
    text = (tmp_path / "comparison.md").read_text()
    assert capsys.readouterr().out == text
    found = table(text)
    assert list(found) == ["against", "hf", "ours-ar", "threads", "heads", "llama.cpp"]
    assert found["against"] == ("all (3)", "without loops (2)")
    ours, calm = 2.02 + 2.5 + 1.0, 2.02 + 2.5
    for name in ("hf", "ours-ar", "threads", "heads"):
        sums = sum(SECONDS[name]), sum(SECONDS[name][:2])
        assert [float(cell.split()[0]) for cell in found[name]] == [
            pytest.approx(sums[0] / ours, abs=0.006), pytest.approx(sums[1] / calm, abs=0.006)]  # fmt: skip
    # The better of the two, on all questions and without loops each.
    assert found["llama.cpp"][0].startswith(f"{12 / ours:.2f} (") and "llama.cpp-q8_0)" in found["llama.cpp"][0]
    assert found["llama.cpp"][1].startswith(f"{8 / calm:.2f} (") and "llama.cpp-q4_1)" in found["llama.cpp"][1]
    # On a it is 1 % slower than threads, on b a quarter slower than heads; a busy third repeat changes nothing.
    assert "1 of 3 prompts (b) took more than 3% longer a token with `ours` than with the best of `ours-ar`" in text
    assert "the worst is b, at 1.25 of its time" in text and "(3 repeats.)" in text


def test_few_repeats_are_said_and_counted_as_asked(tmp_path):
    written(tmp_path, ("hf", "heads", "ours"), repeats=3)
    results = Runs(tmp_path / "results.jsonl", ("system", "prompt", "repeat"))
    text = comparison.write(tmp_path, results, ["heads", "ours"], 1)
    assert "(1 repeat: a busy moment looks the same; take --repeat 3.)" in text
    assert list(table(text)) == ["against", "heads"] and "with `ours` than with `heads`; the worst is b" in text
    assert "took more" not in comparison.write(tmp_path, results, ["hf", "ours"], 3)  # no part of it took part


def test_where_all_loop_nothing_is_left(tmp_path):
    written(tmp_path, ("hf", "ours"))
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(json.loads(line) | {"looping": 0.9}) + "\n" for line in path.open()))
    text = comparison.write(tmp_path, Runs(path, ("system", "prompt", "repeat")), ["hf", "ours"], 1)
    assert table(text)["against"] == ("all (3)", "without loops (0)") and table(text)["hf"][1] == "-"


@pytest.mark.parametrize(
    ("names", "says"), [(("hf", "heads"), "needs answers of ours"), (("ours",), "and of another"), ((), "holds no")]
)
def test_what_is_missing_is_said(tmp_path, capsys, names, says):
    if names:
        written(tmp_path, names)
    with pytest.raises(SystemExit):
        comparison.main([str(tmp_path)])
    assert says in capsys.readouterr().err and not (tmp_path / "comparison.md").exists()
