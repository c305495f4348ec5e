"""`bench --serve`: loads, turns, what is asked, servers as processes, and what is refused."""

import json
from dataclasses import replace

import pytest

from medusa_apar.commands.cli import main
from medusa_apar.eval import serve_bench, serve_plots, serve_tables
from medusa_apar.eval.serve_bench import Load, Results, kept, loads_of, measure_all, measure_pools
from medusa_apar.eval.serve_servers import Launch
from medusa_apar.job import Job
from tests.support.benchmarks import lines
from tests.support.stand_in import ASKING, Served, StandIn


@pytest.fixture
def stand_in():
    server = StandIn()
    with Served(server) as url:
        server.url = url
        yield server


@pytest.fixture
def command(tmp_path, stand_in):
    asked = lines(tmp_path / "p.jsonl", *({"id": n, "prompt": f"ask {n}"} for n in range(3)))

    def command(*more):
        given = ["bench", "--serve", "--url", stand_in.url, "--prompts", asked, "--out", str(tmp_path / "out")]
        assert main([*given, *map(str, more)]) == 0
        return [json.loads(line) for line in (tmp_path / "out" / "load.jsonl").read_text().splitlines()]

    return command


# ---- the command, against a server that stands in


def test_each_load_is_asked_of_what_runs_at_a_url(command, stand_in, tmp_path, capsys):
    rows = command("--clients", 1, 3, "--min-requests", 5, "--requests-per-client", 2, "--max-new-tokens", 7)
    assert [(row["system"], row["clients"], row["requests"]) for row in rows] == [
        (stand_in.url, 1, 5),
        (stand_in.url, 3, 6),
    ]
    assert stand_in.peak >= 3  # it learns of those that hung up a little later
    for row in rows:
        assert row["errors"] == {} and row["answer_tokens"] == 7 and row["prompt_tokens"] == 5
        assert row["chunks"] == 4 and row["cached_tokens"] == 1 and row["stopped"] == 0
        assert (row["mean_slots"], row["peak_slots"], row["threads"]) == (30, 55, 3)
        assert row["steps"] is row["generated_per_100"] is None  # its counts stand still
        assert row["early_freed"] == pytest.approx(0.25) and row["tokens"] >= 7 * row["requests"] - 1e-3
        assert 0 < row["first_token"]["mean"] < row["latency"]["mean"] <= row["latency"]["p99"]
    body = {"model": "stand-in", "max_tokens": 7, "temperature": 0.0, "stream": True, "ignore_eos": True}
    body |= {"messages": [{"role": "user", "content": "ask 1"}], "stream_options": {"include_usage": True}}
    assert body in stand_in.bodies
    warm = [body for body in stand_in.bodies if body["max_tokens"] == serve_bench.WARM_UP_TOKENS]
    assert len(warm) == 4  # as many as clients, and none that goes on into what is measured
    assert all(row["date"] and row["commit"] for row in rows)
    shown = capsys.readouterr().out
    assert "prompt tokens came from a cache, which was to be off" in shown
    assert "**1 client**" in shown and "**3 clients**" in shown and "25%" in shown
    assert shown == (tmp_path / "out" / "load.md").read_text() + "\n"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["loads"]) == 2 and report["cpu"] and report["systems"][stand_in.url]["weights"] == "its own"
    assert (tmp_path / "out" / "clients.png").exists()


def test_what_has_been_measured_is_not_asked_again(command, stand_in, capsys):
    options = ["--seconds", 0.1, "--min-requests", 2, "--requests-per-client", 1, "--max-new-tokens", 3]
    rows = command("--clients", 1, *options)
    asked = len(stand_in.bodies)
    assert command("--clients", 1, *options) == rows and len(stand_in.bodies) == asked
    assert command("--clients", 1, "--rates", 40, *options)[:1] == rows  # a new load beside it
    assert len(stand_in.bodies) > asked
    with pytest.raises(AssertionError):  # the command's code is 2
        command("--clients", 1, *options[:-1], 4)
    assert "holds results with another max_tokens (3, now 4)" in capsys.readouterr().err
    with pytest.raises(AssertionError):
        command("--clients", 1, *options, "--url-model", "another")
    assert "holds results with another url_model (stand-in, now another)" in capsys.readouterr().err


def test_answers_may_stop_and_may_be_sampled(command, stand_in):
    few = ["--clients", 1, "--min-requests", 3, "--requests-per-client", 1]
    (row,) = command(*few, "--may-stop", "--temperature", 0.5, "--top-p", 0.25)
    assert row["stopped"] == 1 and row["answer_tokens"] == 3
    measured = [body for body in stand_in.bodies if body["max_tokens"] == 256]
    assert {"ignore_eos"} & set(measured[0]) == set() and measured[0]["top_p"] == 0.25
    assert [body["seed"] for body in measured[:3]] == [0, 1, 2]
    assert {(body["top_k"], body["min_p"]) for body in measured} == {(-1, 0.0)}


def test_questions_come_at_a_rate(command, stand_in):
    (row,) = command("--rates", 100, "--seconds", 0.08, "--min-requests", 2, "--max-new-tokens", 2, "--limit", 1)
    assert (row["clients"], row["rate"], row["requests"]) == (None, 100, 8) and row["errors"] == {}


def test_a_server_that_answers_nothing_is_one_sentence(command, stand_in):
    stand_in.refuses = 400
    with pytest.raises(RuntimeError, match=r"^http://.* has answered nothing: HTTP 400: not today \(its log: .*\)$"):
        command("--clients", 1)
    stand_in.refuses, stand_in.breaks = None, True
    with pytest.raises(RuntimeError, match="answered nothing: the stream ended without usage"):
        command("--clients", 1)


# ---- refused before anything starts


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--serve", "--check"], "--check is not for --serve"),
        (["--serve", "--runtime", "cpu"], "--runtime is not for --serve"),
        (
            ["--serve", "--systems", "hf"],
            "server 'hf' is none of plain, threads, heads, both, vllm, vllm-plain",
        ),
        (["--serve", "--systems", "plain", "plain"], "--systems names one twice: plain plain"),
        (["--serve", "--url", "localhost:8000"], "localhost:8000 is no address of a server"),
        (["--serve", "--url", "http://a:x"], "http://a:x is no address of a server"),
        (["--serve", "--url-model", "m"], "--url-model needs --url"),
        (["--serve", "--sweep-clients", "4"], "--sweep-clients needs --pool-slots-sweep"),
        (["--serve", "--systems", "vllm", "--pool-slots-sweep"], "--pool-slots-sweep is for our servers"),
        (["--serve", "--clients", "2", "2"], "--clients names one twice: 2 2"),
        (["--serve", "--rates", "0.5", "0.5"], "--rates names one twice: 0.5 0.5"),
        (["--serve", "--clients"], "--clients names no number"),
        (["--serve", "--clients", "0"], "'0' must be a whole number at least 1"),
        (["--serve", "--rates", "0"], "'0' must be a number above 0"),
        (["--serve", "--top-p", "0.5"], "--top-p 0.5 needs a --temperature above 0"),
        (["--serve", "--systems", "llama.cpp-q4_1", "--model", "MODEL"], "llama.cpp-q4_1 answers with smollm2-135m"),
        (["--serve", "--systems", "vllm-both", "--model", "MODEL"], "vllm-both needs Medusa heads that come with the"),
        (["--clients", "2"], "--clients is for --serve"),
        (["--may-stop"], "--may-stop is for --serve"),
        (["--pool-slots-sweep"], "--pool-slots-sweep is for --serve"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence_before_anything_starts(options, said, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    options = [str(tmp_path / "model") if option == "MODEL" else option for option in options]
    try:
        code = main(["bench", "--out", str(tmp_path / "out"), *options])
    except SystemExit as error:  # argparse's own
        code = error.code
    captured = capsys.readouterr()
    assert code == 2 and said in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---- turns and pools


class Recorded:
    """Measures nothing; says what was asked to be measured, and answers by a rule."""

    def __init__(self, speed):
        self.speed, self.asked = speed, []

    def __call__(self, launch, load):
        self.asked.append((launch.name, *load.key))
        speed = self.speed(launch.name, load)
        return {
            "requests": 0 if speed is None else 4, "errors": {"HTTP 400: too long": 4} if speed is None else {},
            "seconds": 1.0, "tokens_per_second": speed or 0.0, "requests_per_second": 1.0, "answer_tokens": 64,
            "latency": dict.fromkeys(("mean", "p50", "p95", "p99"), 100 / (speed or 1)), "first_token": None,
            "inter_token": None, "mean_slots": 10.0, "peak_slots": 1000.0, "early_freed": None, "looping": 0.25,
            "longest_pause": None, "prompt_tokens": 9.0, "cached_tokens": 0.0,
        }  # fmt: skip


def launches(tmp_path, *names):
    return [Launch(name, f"our {name}", "int8", tmp_path / name, ("x",), pooled=name != "vllm") for name in names]


def run(tmp_path, measure, names, work):
    results = Results(tmp_path / "out", ASKING)
    with Job(tmp_path / "out", "bench", {}) as job:
        work(job, results, launches(tmp_path, *names), measure)
    return results


def test_servers_take_turns_and_no_one_is_always_first(tmp_path):
    measure = Recorded(lambda name, load: 10.0)
    work = lambda *its: measure_all(*its[:3], loads_of([1, 2], [0.5]), 2, its[3])  # noqa: E731
    run(tmp_path, measure, ("plain", "both", "vllm"), work)
    assert len(measure.asked) == 18
    firsts = [name for name, *_ in measure.asked[::3]]
    assert firsts == ["plain", "both", "vllm", "both", "vllm", "plain"]
    assert all(len({its[1:] for its in measure.asked[start : start + 3]}) == 1 for start in range(0, 18, 3))
    again = Recorded(lambda name, load: 10.0)
    run(tmp_path, again, ("plain", "both", "vllm"), work)
    assert again.asked == []


def pool_speed(name, load):
    if load.slots is None:
        return 100.0
    need = {"plain": 800, "threads": 400}[name]
    return None if load.slots < 100 else min(100.0, 100.0 * load.slots / need)


def test_ever_smaller_pools_are_tried_until_too_much_is_lost(tmp_path):
    measure = Recorded(pool_speed)
    work = lambda *its: measure_pools(*its[:3], 16, [900, 800, 780, 700, 400, 390, 300, 50], 1, its[3])  # noqa: E731
    results = run(tmp_path, measure, ("plain", "vllm", "threads"), work)
    tried = {name: [its[3] for its in measure.asked if its[0] == name] for name in ("plain", "threads", "vllm")}
    assert tried == {
        "plain": [900, None, 800, None, 780, None, 700, None],
        "threads": [900, None, 800, None, 780, None, 700, None, 400, None, 390, None, 300, None],
        "vllm": [],
    }
    assert kept(results, "plain", Load(16, slots=700)) == pytest.approx(0.875)
    plain, threads = (serve_tables.smallest(results, name, 16) for name in ("plain", "threads"))
    assert (plain.slots, threads.slots) == (780, 390)
    assert threads.crossing == pytest.approx(388)
    shown = serve_tables.table(results, launches(tmp_path, "plain", "vllm", "threads"), ASKING, 1)
    assert "| 700 | 87.5 (88%) | 100.0 (100%) |" in shown
    assert "| threads against plain, smallest pool: -50 % | -50% |" in shown  # 388 of 776: both between two pools
    assert "Smallest pool that keeps 97%: plain 780 (the line crosses at 776)" in shown
    assert "beside" not in shown
    assert serve_tables.summary(results, launches(tmp_path, "plain"))["smallest_pools"]["plain"]["16"]["slots"] == 780


def test_pools_follow_from_what_was_in_use(tmp_path):
    measure = Recorded(lambda name, load: 100.0)
    work = lambda *its: measure_pools(*its[:3], 4, [], 1, its[3])  # noqa: E731
    results = run(tmp_path, measure, ("plain",), work)
    slots = [its[3] for its in measure.asked[1:] if its[3] is not None]
    assert slots == [int(1000 * share) for share in serve_bench.POOLS] and slots[0] == 1000
    assert serve_tables.smallest(results, "plain", 4) == serve_tables.SmallestPool(slots[-1], None)


def test_a_pool_is_compared_with_none_in_the_same_turn(tmp_path):
    """The machine becomes slower and slower, which is not the pool's doing."""
    machine = iter(100.0 - number for number in range(99))
    measure = Recorded(lambda name, load: next(machine) * (1.0 if load.slots is None or load.slots > 50 else 0.5))
    work = lambda *its: measure_pools(*its[:3], 4, [90, 80, 70, 60, 50, 40], 3, its[3])  # noqa: E731
    results = run(tmp_path, measure, ("plain",), work)
    assert serve_tables.smallest(results, "plain", 4).slots == 60
    assert kept(results, "plain", Load(4, slots=50)) == pytest.approx(0.5, abs=0.01)
    assert len(measure.asked) == 2 * 3 * 5  # 40 is not tried any more


Pool = serve_tables.SmallestPool


@pytest.mark.parametrize(
    ("threads", "plain", "shown"),
    [
        (Pool(400, 390.0), Pool(800, 780.0), "-50%"),
        (Pool(390, None), Pool(800, 780.0), "at most -50%"),
        (Pool(400, 390.0), Pool(780, None), "at least -50%"),
        (Pool(400, None), Pool(800, None), "not known: the smallest pools that were tried keep enough"),
        (None, Pool(800, None), None),
    ],
)
def test_a_pool_that_never_lost_enough_is_only_a_bound(threads, plain, shown):
    assert serve_tables._pool_goal(threads, plain) == shown
    assert serve_tables._pool(Pool(390, None)) == "at most 390"


def test_failures_and_unlike_prompts_are_told_beside_what_they_spoil(tmp_path):
    def measure(launch, load):
        row = Recorded(lambda name, load: 10.0)(launch, load)
        return row | {"plain": {"errors": {"HTTP 429: full": 2}}, "both": {"prompt_tokens": 12.0}}.get(launch.name, {})

    names = ("plain", "threads", "both")
    work = lambda *its: measure_all(*its[:3], [Load(16)], 1, its[3])  # noqa: E731
    results = run(tmp_path, measure, names, work)
    shown = serve_tables.table(results, launches(tmp_path, *names), ASKING, 1)
    assert "| threads against plain, tokens/s: no lower | 1.00x (not comparable: plain has failed 2) |" in shown
    assert "| guesses (both against threads), 16 clients: 0.97x or more | 1.00x |" in shown
    (tmp_path / "plots").mkdir()
    results.add("plain", Load(16, slots=9), 0, measure(Launch("plain", "", "", tmp_path), Load(16, slots=9)))
    drawn = serve_plots.plot(tmp_path / "plots", results, names)
    assert [path.name for path in drawn if path.stat().st_size] == ["clients.png", "pool_16.png"]
    assert "prompts have unlike numbers of tokens, threads 9.0, both 12.0 on average" in shown and "25%" in shown


def test_threads_over_vllm_stand_beside_one_thread_there(tmp_path):
    def measure(launch, load):
        row = Recorded(lambda name, load: 10.0)(launch, load)
        if launch.name == "vllm":
            return row | dict.fromkeys(("steps", "tokens_per_step", "generated_per_100", "prefix_hits"))
        plain = {"steps": 1024.0, "tokens_per_step": 1.0, "generated_per_100": 100.4, "prefix_hits": 0.5}
        threads = {"steps": 600.0, "tokens_per_step": 1.75, "generated_per_100": 131.0, "mean_slots": 8.0}
        threads["latency"] = dict.fromkeys(("mean", "p50", "p95", "p99"), 8.0)
        return row | plain | (threads if launch.name == "vllm-threads" else {})

    names = ("vllm", "vllm-plain", "vllm-threads")
    work = lambda *its: measure_all(*its[:3], loads_of([1, 16], []), 1, its[3])  # noqa: E731
    results = run(tmp_path, measure, names, work)
    theirs, *ours = launches(tmp_path, *names)
    shown = serve_tables.table(results, [theirs, *(replace(its, cached=True) for its in ours)], ASKING, 1)
    assert "prefix caches off, but on in vllm-plain and vllm-threads: prompts differ" in shown
    assert "| 25% | 600 | 1.75 | 131 | 50% | 8 |" in shown and "| 25% | - | - | - | - | 10 |" in shown
    said = "threads against plain over vLLM, 1 client"
    assert (
        f"| {said}, tokens per engine step: 1.72x | 1.75x |" in shown
        and f"| {said}, tokens/s: 1.45x | 1.00x |" in shown
    )
    assert f"| {said}, as soon, on average: 1.45x | 1.25x |" in shown
    assert "| threads over vLLM, 16 clients, generated per 100 shown: 115 at most | 131 |" in shown
    assert "| threads against plain over vLLM, mean slots: -20 % | -20% |" in shown and "4 clients" not in shown


def test_ratios_are_those_of_the_same_turn(tmp_path):
    speeds = {"plain": [10.0, 100.0, 50.0], "both": [20.0, 110.0, 25.0]}  # twice, 1.1 times and half: 1.1, not 25 / 50
    work = lambda *its: measure_all(*its[:3], [Load(16)], 3, its[3])  # noqa: E731
    results = run(tmp_path, Recorded(lambda name, load: speeds[name].pop(0)), ("plain", "both"), work)
    assert serve_tables.times(results, "both", "plain", Load(16), "tokens_per_second") == pytest.approx(1.1)
