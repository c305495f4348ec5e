"""The machine's ceilings: what is written, whose they are, and that a run keeps those it began with."""

import json

import pytest

from medusa_apar.eval import ceilings
from medusa_apar.eval.ceilings import Ceilings

TOLD = Ceilings(20.0, {"int8": {1: 50.0, 8: 120.0, 64: 400.0}})


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """What is measured here is not the machine."""
    monkeypatch.setattr(ceilings, "buffer_bytes", lambda: 1 << 20)
    monkeypatch.setattr(ceilings, "READING_SECONDS", 0.0)
    monkeypatch.setattr(ceilings, "PRODUCT_SECONDS", 0.0)


def test_one_command_measures_both_and_says_whose_they_are(tmp_path, capsys):
    path = tmp_path / "machine.json"
    assert ceilings.main([str(path), "--threads", "1"]) == 0
    found = json.loads(path.read_text())
    assert found["versions"]["torch"] and found["date"] and "commit" in found and "1 threads" in found["cpu"]
    read = ceilings.read(path)
    assert set(read.gmac_per_second) == {"float32", "bfloat16", "int8"} and read.gb_per_second > 0
    assert all(tuple(rows) == ceilings.ROWS and min(rows.values()) > 0 for rows in read.gmac_per_second.values())
    assert f"the cores read {read.gb_per_second:.1f} GB/s" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        ceilings.main([str(tmp_path / "nowhere" / "machine.json")])


def test_the_buffer_is_larger_than_every_cache(monkeypatch, tmp_path):
    monkeypatch.undo()
    for level, size in enumerate(("48K", "2M", "300M")):
        (tmp_path / f"index{level}").mkdir()
        (tmp_path / f"index{level}" / "size").write_text(size + "\n")
    monkeypatch.setattr(ceilings, "CACHES", tmp_path)
    assert ceilings.cache_bytes() == 300 << 20
    monkeypatch.setattr(ceilings.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 64 << 30}))
    assert ceilings.buffer_bytes() == 1200 << 20
    monkeypatch.setattr(ceilings.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1 << 30}))
    assert ceilings.buffer_bytes() == 256 << 20  # a quarter of what is free
    monkeypatch.setattr(ceilings, "CACHES", tmp_path / "nowhere")
    assert ceilings.cache_bytes() == ceilings.UNKNOWN_CACHE


def test_between_measured_rows_it_is_in_proportion():
    assert [TOLD.products("int8", rows) for rows in (1, 4.5, 8, 36, 100)] == [50, 85, 120, 260, 400]


def test_a_run_keeps_its_ceilings(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(ceilings, "measure", lambda kinds: measured.append(kinds) or TOLD)
    assert ceilings.of_run(tmp_path, {"int8"}) == TOLD == ceilings.of_run(tmp_path, {"int8"})
    assert measured == [["int8"]]
    ceilings.of_run(tmp_path, {"float32"})  # of which those that were kept say nothing
    assert measured == [["int8"], ["float32"]]


def test_a_run_takes_those_that_are_given_with_their_date(tmp_path):
    given = tmp_path / "given.json"
    ceilings.write(given, TOLD)
    given.write_text(json.dumps(json.loads(given.read_text()) | {"date": "2026-01-01"}))
    ceilings.write(tmp_path / ceilings.FILE, Ceilings(1.0, {"int8": {1: 1.0}}))
    assert ceilings.of_run(tmp_path, {"int8"}, given) == TOLD == ceilings.of_run(tmp_path, {"int8"})
    assert (tmp_path / ceilings.FILE).read_text() == given.read_text()
    with pytest.raises(ValueError, match="says nothing of float32, in which our systems run here"):
        ceilings.of_run(tmp_path, {"float32", "int8"}, given)


def test_those_of_another_machine_are_refused(tmp_path):
    path = tmp_path / "machine.json"
    ceilings.write(path, TOLD)
    assert ceilings.read(path) == TOLD
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"cpu": "Z80, 1 threads, DEFAULT"}))
    with pytest.raises(ValueError, match=r"was measured on Z80, 1 threads, DEFAULT, and this is"):
        ceilings.read(path)
    for broken in ({"cpu": found["cpu"]}, found | {"gmac_per_second": {"int8": 3}}, found | {"gb_per_second": None}):
        path.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=r"machine\.json is no file of `python -m medusa_apar\.eval\.ceilings`"):
            ceilings.read(path)
