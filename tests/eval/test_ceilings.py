"""The machine's ceilings: what is written, whose they are, and that a run keeps those it began with."""

import json
from dataclasses import replace

import pytest

from medusa_apar.eval import bench_tables, ceilings
from medusa_apar.eval.ceilings import Ceilings
from tests.support.benchmarks import PLAN

TOLD = Ceilings(20.0, {"int8": {1: 50.0, 8: 120.0, 64: 400.0}}, 3.0)
INT8 = replace(PLAN, runtime="cpu, int8")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """What is measured here is not the machine, and nobody else is on it."""
    monkeypatch.setattr(ceilings, "others_share", lambda: 0.0)
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
    assert all(min(rows.values(), default=1) > 0 for rows in read.gmac_per_second.values())
    assert read.others_percent == 0 and read.doubt is None
    shown = capsys.readouterr().out
    assert f"the cores read {read.gb_per_second:.1f} GB/s" in shown and "Other processes" not in shown
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
    some = Ceilings(20.0, {"int8": {8: 120.0, 64: 400.0}, "float32": {}}, 0.0)
    assert (
        some.products("int8", 4.5) is None and some.products("int8", 8) == 120 and some.products("float32", 8) is None
    )


def test_a_call_that_is_most_of_the_time_is_timed_again_and_then_left_out(monkeypatch):
    calls = iter([0.6, 0.9, 0.2, 0.5, *[0.7] * ceilings.TRIES, 0.0])  # of one second; 1, 8, 32 and 64 rows
    monkeypatch.setattr(ceilings, "best", lambda runs, long: [1.0, next(calls)])
    found = ceilings.products("int8")
    assert list(found) == [1, 8, 64] and next(calls, None) is None
    assert found[8] == pytest.approx(8 * found[1] * 0.8 / 0.5) and found[64] == pytest.approx(64 * found[1] * 0.8)
    said = ceilings.sentence(Ceilings(20.0, {"int8": found, "float32": {}}, 0.0), ["int8", "float32"])
    assert "In int8 at 32 rows calls took most of the time. In float32 at 1, 8, 32, 64 rows" in said


@pytest.mark.parametrize("shares", [(35.0, 4.0), (4.0, 35.0)])
def test_whether_others_were_busy_is_looked_at_on_both_sides(monkeypatch, tmp_path, capsys, shares):
    looks = iter(shares)
    monkeypatch.setattr(ceilings, "others_share", lambda: next(looks))
    assert ceilings.main([str(tmp_path / "busy.json")]) == 0
    assert "Other processes took 35 % of the machine when that was measured" in capsys.readouterr().out
    assert ceilings.read(tmp_path / "busy.json").others_percent == 35


def test_shares_of_a_ceiling_that_is_passed_are_marked():
    """And of one that nobody knows there are none."""
    figures = {"seconds_per_step": 0.01, "gb_per_second": 30.0, "gmac_per_second": 100.0}
    parts = {"all": {"ours": {"forward": figures, "rows_per_step": 4.5}}}
    table = bench_tables._forward({"parts": parts, "systems": ["ours"]}, INT8, TOLD)
    assert table[-2].endswith("| 30.0 | 150% (not to be trusted) | 100 | 118% (not to be trusted) |")
    table = bench_tables._forward({"parts": parts, "systems": ["ours"]}, INT8, Ceilings(60.0, {"int8": {8: 1.0}}, None))
    assert table[-2].endswith("| 30.0 | 50% | 100 | - |") and "Nobody looked whether" in table[0]


def test_a_run_keeps_its_ceilings(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(ceilings, "measure", lambda kinds: measured.append(kinds) or TOLD)
    assert ceilings.of_run(tmp_path, {"int8"}) == TOLD == ceilings.of_run(tmp_path, {"int8"})
    assert measured == [["int8"]]
    ceilings.of_run(tmp_path, {"float32"})  # of which those that were kept say nothing
    assert measured == [["int8"], ["float32"]]


@pytest.mark.parametrize("others", [35.0, None])
def test_what_a_busy_machine_gave_is_not_kept(tmp_path, monkeypatch, others):
    busy, given = Ceilings(1.0, TOLD.gmac_per_second, others), tmp_path / "given.json"
    answers = iter([busy, TOLD])
    monkeypatch.setattr(ceilings, "measure", lambda kinds: next(answers))
    ceilings.write(given, busy)
    assert ceilings.of_run(tmp_path, {"int8"}, given) == busy  # for a run that asks for it
    assert ceilings.of_run(tmp_path, {"int8"}) == busy and ceilings.of_run(tmp_path, {"int8"}) == TOLD
    assert ceilings.of_run(tmp_path, {"int8"}) == TOLD == ceilings.read(tmp_path / ceilings.FILE)


def test_a_run_takes_those_that_are_given_with_their_date(tmp_path):
    given = tmp_path / "given.json"
    ceilings.write(given, TOLD)
    given.write_text(json.dumps(json.loads(given.read_text()) | {"date": "2026-01-01"}))
    ceilings.write(tmp_path / ceilings.FILE, Ceilings(1.0, {"int8": {1: 1.0}}, 0.0))
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
