"""What drafting costs is told for every kind of heads, every depth of its tree and every number of threads."""

import json

import pytest

from medusa_apar.eval import draft_levels


def test_every_depth_is_measured(tmp_path, capsys):
    out = tmp_path / "levels.json"
    options = ["--quantize", "int8", "--heads", "auto", "medusa", "--threads", "1", "3", "--path", "20"]
    assert draft_levels.main([*options, "--seconds", "0", "--out", str(out)]) == 0
    kept = json.loads(out.read_text())
    found = {(row["heads"], row["threads"], row["levels"]) for row in kept["times"]}
    for heads, depths in (("hydra", 4), ("medusa", 3)):
        assert {(heads, threads, depth) for threads in (1, 3) for depth in range(depths + 1)} <= found
    assert all(0 < row["least_ms"] <= row["median_ms"] for row in kept["times"])
    assert "| medusa | 3 |" in capsys.readouterr().out and kept["path"] == 20


def test_what_is_not_there_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        draft_levels.main(["--out", str(tmp_path / "none" / "levels.json")])
    assert "none is no folder" in capsys.readouterr().err
