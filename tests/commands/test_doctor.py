"""`doctor` says what it found, and what it could not find out hides nothing."""

import re

import pytest

from medusa_apar.commands import cli, doctor
from medusa_apar.models import hub
from medusa_apar.runtimes.cpu import library
from tests.support import arm
from tests.support.folders import forking_folder


def test_doctor_names_what_it_found(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name in ("python", "torch", "transformers", "cpu", "cpu runtime", "gpu", "kernels", "cache", "smollm2-135m"):
        assert re.search(rf"^{name} +\S", out, re.M), name


def test_doctor_says_what_would_run_a_model_and_why(tmp_path, capsys):
    reasons = {
        "llama": r"torch on cpu in float32; .*the CPU runtime cannot run it: its sizes are no multiples",
        "wide_llama": "compiled code on cpu in float32$",
    }
    for family, says in reasons.items():
        folder = forking_folder(tmp_path / family, family)
        assert cli.main(["doctor", str(folder)]) == 0
        found = dict(re.findall(r"^(\S+(?: \w+)*)  +(\S.*?) *$", capsys.readouterr().out, re.M))
        assert found["model"] == str(folder) and re.match(says, found["runtime"])
        assert found["dtype"] == "float32 as loaded, float32 where it runs"
        assert found["heads"] == "none: guesses come from n-grams"
        assert found["control tokens"] == "[Fork] is 3 <fork>, [Child] is 4 <child>"
        size = (folder / "model.safetensors").stat().st_size / 1e6
        assert found["disk"].startswith("base ") and float(found["disk"].split()[1]) == pytest.approx(size, abs=0.1)
        assert re.match(r"\d+\.\d MB of weights; loading it took ", found["memory"])


def test_doctor_says_what_the_disk_holds(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MEDUSA_APAR_CACHE", str(tmp_path))
    made = tmp_path / "models" / hub.embedded_model_path("smollm2-135m").name
    made.mkdir(parents=True)
    (made / "model.safetensors").write_bytes(bytes(2_500_000))
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^cache +{tmp_path}, \d+\.\d MB *$", out, re.M) and "base 2.5 MB" in out
    assert re.search(r"step\.so, \d\.\d MB", out) or "torch only" in out


def test_doctor_says_what_a_processor_of_arm_has(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "CPUINFO", tmp_path / "cpuinfo")
    doctor.CPUINFO.write_text(arm.CPUINFO)
    found = next(finding for name, finding in doctor.findings() if name == "cpu features")
    assert found.startswith("asimd asimddp bf16 i8mm; ")


def test_doctor_counts_a_linked_file_once(tmp_path):
    """As the Hub's cache holds a model: blobs, and a snapshot of links to them."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "a"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "1").write_bytes(bytes(1000))
    (snapshot / "model.safetensors").symlink_to(blobs / "1")
    (snapshot / "gone").symlink_to(blobs / "2")
    sizes = [doctor._bytes(place) for place in (tmp_path, snapshot, snapshot / "model.safetensors")]
    assert sizes == [1000, 1000, 1000]


def test_doctor_says_why_it_cannot_tell_the_size_on_the_disk(tmp_path, monkeypatch, capsys):
    folder = forking_folder(tmp_path / "model")

    def fails(place):
        raise PermissionError(13, "Permission denied", str(place))

    monkeypatch.setattr(doctor, "_bytes", fails)
    found = dict(doctor.model_findings(str(folder)))
    assert found["disk"].startswith("cannot be told: ") and "Permission denied" in found["disk"]


def test_what_doctor_cannot_find_out_does_not_hide_the_rest(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("MEDUSA_APAR_CACHE", "/dev/null/cache")
    library.outcome.cache_clear()
    try:
        assert cli.main(["doctor"]) == 0
    finally:
        library.outcome.cache_clear()
    out = capsys.readouterr().out
    assert "torch only" in out and re.search(r"^smollm2-135m +\S", out, re.M)
