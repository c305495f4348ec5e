"""What the parts of speculation bring, from a benchmark's lines."""

import json

import pytest

from medusa_apar.eval import speculation


def line(system, prompt, seconds, steps, looping=0.0, **more):
    drafted = {"heads": 4 * steps, "ngrams": 0, "forks": 0}
    return {
        "system": system, "prompt": prompt, "repeat": 0, "category": "", "weights": "int8", "tokens": 100,
        "seconds": seconds, "first_token_seconds": 0.1, "steps": steps, "rows": 5 * steps, "looping": looping,
        "finish": "stop",
        "drafted": drafted, "accepted": {"heads": steps, "ngrams": 0, "forks": 0}, **more,
    }  # fmt: skip


@pytest.fixture
def results(tmp_path):
    rows = []
    for prompt, (plain, static, ours) in {"a": (4.0, 3.0, 2.0), "b": (4.0, 4.0, 4.4), "c": (9.0, 9.0, 1.0)}.items():
        looping = 0.9 if prompt == "c" else 0.0
        rows.append(line("threads", prompt, plain, 80, looping, drafted={}, accepted={}))
        rows.append(line("static", prompt, static, 50, looping))
        rows.append(line("ours", prompt, ours, 25, looping))
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_tables_and_pictures(results, capsys):
    assert speculation.main([str(results)]) == 0
    text = (results / "speculation.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    ours = next(row for row in text.splitlines() if row.startswith("| ours |")).split(" | ")
    assert ours[1] == "4.00 (4.00)" and ours[2] == "5.0 (5.0)" and ours[3] == "50% (50%)"
    assert ours[4].startswith("2.16x") and "(1.09x" in ours[4]  # 16 of 7.4 seconds; 7 of 6.4 without the loop
    assert ours[5] == "75 of 300"
    assert "1 of 3 prompts (b) took more than 3% longer" in text and "1.10 of its time" in text
    assert (results / "by_prompt.png").stat().st_size > 1000


def sampled(results, same):
    """The same seeds, and other ids with `ours` in the last prompt unless they are the same."""
    path = results / "results.jsonl"
    rows = [json.loads(each) for each in path.read_text().splitlines()]
    for row in rows:
        other = not same and (row["system"], row["prompt"]) == ("ours", "c")
        row |= {"seed": 7, "ids": [1, 2, 4 if other else 3]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_sampled_texts_are_compared_by_time_where_they_are_the_same(results):
    speculation.main([str(results)])
    greedy = (results / "speculation.md").read_text()
    sampled(results, same=True)
    speculation.main([str(results)])
    assert (results / "speculation.md").read_text() == greedy and (results / "by_prompt.png").is_file()
    sampled(results, same=False)
    speculation.main([str(results)])
    text = (results / "speculation.md").read_text()
    ours, before = (
        next(row for row in each.splitlines() if row.startswith("| ours |")).split(" | ") for each in (text, greedy)
    )
    assert ours[3:5] == ["-", "-"] and ours[:3] + ours[5:] == before[:3] + before[5:]
    assert "| threads | 1.25 (1.25) | 5.0 (5.0) | -60% (-60%) |" in text  # which wrote the same as `static`
    assert "`ours` sampled other texts than `static`" in text and "`ours` sampled other texts than `threads`" in text
    assert "took more than" not in text and not (results / "by_prompt.png").exists()


def test_what_is_missing_is_said(results, tmp_path, capsys):
    with pytest.raises(SystemExit):
        speculation.main([str(results), "--against", "medusa"])
    with pytest.raises(SystemExit):
        speculation.main([str(tmp_path / "nowhere")])
    for name, broken in (("seconds", None), ("looping", None), ("drafted", 3)):
        row = line("static", "a", 1.0, 5) | {name: broken}
        lines = [{key: value for key, value in row.items() if value is not None}, line("ours", "a", 1.0, 5)]
        (results / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        with pytest.raises(SystemExit):
            speculation.main([str(results)])
        assert "results.jsonl holds a line that is no result of ours" in capsys.readouterr().err
