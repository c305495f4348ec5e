"""What rows cost is told for every number of rows and of neighbours, and those are gone behind it."""

import json

import psutil
import pytest

from medusa_apar.eval import rows


def endless():
    return [each for each in psutil.Process().children() if rows.ENDLESS in each.cmdline()]


def test_neighbours_are_there_while_they_are_wanted():
    with pytest.raises(KeyError), rows.neighbours(2):
        assert len(endless()) == 2
        raise KeyError
    assert not endless()


def test_every_size_is_measured_beside_every_number_of_neighbours(tmp_path, capsys):
    out = tmp_path / "rows.json"
    options = ["--quantize", "int8", "--rows", "1", "3", "--neighbours", "0", "1", "--seconds", "0"]
    assert rows.main([*options, "--out", str(out)]) == 0
    kept = json.loads(out.read_text())
    assert list(kept["neighbours"]) == ["0", "1"] and not endless()
    for found in kept["neighbours"].values():
        assert list(found) == ["prefill", "1", "3"]
        assert all(0 < each["least_ms"] <= each["median_ms"] for each in found.values())
    quiet = kept["neighbours"]["0"]
    shown = capsys.readouterr().out
    assert f"| 0 | {quiet['1']['least_ms']:.1f} | {quiet['3']['least_ms'] / quiet['1']['least_ms']:.1f} |" in shown
    assert "int8" in shown and kept["slots"] == 512


def test_a_folder_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path, capsys):
    with pytest.raises(SystemExit):
        rows.main(["--out", str(tmp_path / "none" / "rows.json")])
    assert "none is no folder" in capsys.readouterr().err
