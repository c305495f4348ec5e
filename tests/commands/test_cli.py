"""The command line: what it prints where, on a tiny forking model; test_readme.py runs it with the default one."""

import contextlib
import io
import json
import re
import sys
import time

import pytest
import torch
from rich.console import Console
from tokenizers.normalizers import Replace
from transformers import AutoModelForCausalLM, AutoTokenizer

from medusa_apar import job
from medusa_apar.attaching import attach
from medusa_apar.commands import cli, demo
from medusa_apar.display.terminal import Lanes
from medusa_apar.events import StepFinished
from medusa_apar.heads import MedusaHeads
from tests.support.folders import forking_folder, own_code
from tests.support.models import CONTROL, VOCAB, forking_model
from tests.support.tokenizers import save_tokenizer

QUESTION = "w1 w2 w9 w3"
KEYS = ["text", "tokens", "steps", "threads", "forks", "tokens_per_second", "baseline_tokens_per_second", "speedup"]
KEYS += ["weights", "baseline_weights"]


@pytest.fixture(scope="module")
def apar(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, ["<unk>", "<s>", "</s>", "<fork>", "<child>", *(f"w{i}" for i in range(VOCAB - 5))])
    model = forking_model(2)
    return attach(model, heads=MedusaHeads.random(model), apar=CONTROL, tokenizer=AutoTokenizer.from_pretrained(folder))


@pytest.fixture
def run(apar, monkeypatch, capsys):
    """Runs the command on the tiny model: (exit code, stdout, stderr)."""
    monkeypatch.setattr(cli, "_load", lambda args: apar)

    def run(*args):
        code = cli.main([*args])
        return code, *capsys.readouterr()

    return run


def test_generate_prints_just_the_answer(run, apar):
    code, out, err = run("generate", QUESTION, "--max-new-tokens", "30")
    assert (code, err) == (0, "")
    inputs = apar.tokenizer(QUESTION, return_tensors="pt")
    sequence = apar.generate(**inputs, max_new_tokens=30, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert out.strip() == apar.tokenizer.decode(sequence, skip_special_tokens=True).strip()


@pytest.mark.parametrize("command", [("demo", "--prompt"), ("generate", "--baseline")])
def test_json_is_the_last_line(run, command):
    code, out, err = run(*command, QUESTION, "--max-new-tokens", "40", "--json")
    found = json.loads(out.splitlines()[-1])
    assert list(found) == KEYS
    assert found["tokens"] == 40 and found["threads"] == found["forks"] + 1 >= 3
    assert found["speedup"] == pytest.approx(found["tokens_per_second"] / found["baseline_tokens_per_second"])
    assert found["weights"] == found["baseline_weights"] == "float32"
    assert code == 0 and "\x1b" not in err


def test_without_a_baseline_its_numbers_are_null(run):
    _, out, _ = run("generate", QUESTION, "--max-new-tokens", "5", "--json")
    assert json.loads(out)["baseline_tokens_per_second"] is json.loads(out)["speedup"] is None
    _, out, _ = run("demo", "--prompt", QUESTION, "--max-new-tokens", "5", "--json", "--no-baseline")
    assert json.loads(out)["speedup"] is None


@pytest.mark.parametrize("option", [("--no-fork",), ("--fork", "off")], ids=" ".join)
def test_no_fork_is_one_thread(run, apar, option):
    found = json.loads(run("generate", QUESTION, "--max-new-tokens", "20", *option, "--json")[1])
    assert found["threads"] == 1 and found["forks"] == 0
    inputs = apar.tokenizer(QUESTION, return_tensors="pt")
    plain = demo.run_baseline(apar, inputs, {"max_new_tokens": 20, "do_sample": False, "fork": False})
    assert found["text"] == plain.text


def test_a_seed_names_a_sample(run):
    def sample(seed):
        args = ("--max-new-tokens", "20", "--temperature", "1.5", "--seed", seed, "--json")
        return json.loads(run("generate", QUESTION, *args)[1])["text"]

    assert sample("1") == sample("1") != sample("2")


def test_demo_in_a_pipe_prints_milestones_answer_and_table(run):
    code, out, err = run("demo", "--prompt", QUESTION, "--max-new-tokens", "60")
    assert (code, err) == (0, "")
    assert "\x1b" not in out and "\r" not in out
    lines = out.splitlines()
    forked = [index for index, line in enumerate(lines) if "thread 1 leaves trunk after" in line]
    ended = [index for index, line in enumerate(lines) if "thread 1 ends with" in line]
    table = [index for index, line in enumerate(lines) if "tokens per second" in line]
    assert forked and ended and table and forked < ended < table
    assert "transformers" in out
    assert re.search(r"tokens per step +│ +\d", out)


@pytest.mark.parametrize(("width", "height"), [(110, 30), (40, 12), (20, 5), (300, 60)])
def test_lanes_fit_the_terminal(apar, width, height):
    frames = []
    console = Console(force_terminal=True, width=width, height=height, file=open("/dev/null", "w"))  # noqa: SIM115
    inputs = demo.prompt(apar, QUESTION)
    lanes = Lanes(console, apar.tokenizer)

    def draw(event):
        lanes(event)
        if isinstance(event, StepFinished):
            frames.append(["".join(part.text for part in line) for line in console.render_lines(lanes.frame())])

    run = demo.run_apar(apar, inputs, {"max_new_tokens": 60, "do_sample": False, "fork": True}, draw)
    assert run.threads >= 3
    assert all(len(frame) < max(height, 7) for frame in frames)
    assert "thread 1" in "\n".join(frames[-1]) or width * height < 500
    if width > 100:
        assert len({line.count("╭") for frame in frames for line in frame} - {0}) > 1  # side by side


def test_lanes_restore_the_terminal(run, monkeypatch, capsys):
    monkeypatch.setattr(cli, "Console", lambda stderr=False: Console(force_terminal=True, width=100, height=30))
    _, out, _ = run("demo", "--prompt", QUESTION, "--max-new-tokens", "40", "--no-baseline")
    assert out.count("\x1b[?25l") == out.count("\x1b[?25h") == 1  # cursor hidden and shown again
    assert "thread 1" in out


def test_what_load_and_generate_refuse_is_one_sentence(run, monkeypatch, capsys):
    for args, sentence in [
        (("generate", " "), "the prompt is empty"),
        (("generate", QUESTION * 100), "256"),
        (("generate", QUESTION, "--baseline"), "--baseline needs --json"),
    ]:
        code, out, err = run(*args)
        assert (code, out) == (2, "")
        assert sentence in err and err.startswith("medusa-apar: ") and err.count("\n") == 1
    monkeypatch.undo()
    assert cli.main(["generate", "x", "--model", "./nothing"]) == 2
    assert capsys.readouterr().err == "medusa-apar: ./nothing does not exist\n"


def test_the_prompt_comes_from_standard_input(run, monkeypatch):
    expected = run("generate", QUESTION, "--max-new-tokens", "5")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(QUESTION.encode())))
    assert run("generate", "-", "--max-new-tokens", "5") == expected


@pytest.mark.parametrize(
    "command",
    [
        ["doctor", "MODEL"],
        ["generate", "ab", "--model", "MODEL", "--max-new-tokens", "2"],
        ["demo", "--prompt", "ab", "--model", "MODEL", "--max-new-tokens", "2", "--no-baseline"],
        ["convert", "HEADS", "--to", "v1", "--out", "OUT", "--base", "MODEL"],
    ],
)
def test_code_of_the_model_runs_where_it_is_trusted(tmp_path, capsys, command):
    model = forking_folder(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(model)
    MedusaHeads.random(base, num_heads=1).save_pretrained(tmp_path / "heads", dtype=torch.float32)
    own_code(model)
    places = {"MODEL": str(model), "HEADS": str(tmp_path / "heads"), "OUT": str(tmp_path / "out")}
    command = [places.get(word, word) for word in command]
    assert cli.main(command) == 2
    assert "runs only where it is trusted (trust_remote_code=True, or --trust-remote-code)" in capsys.readouterr().err
    assert cli.main([*command, "--trust-remote-code"]) == 0


def test_a_prompt_without_a_token_is_said(apar, run, monkeypatch):
    monkeypatch.setattr(apar.tokenizer.backend_tokenizer, "normalizer", Replace("w", ""))
    assert run("generate", "wwww")[2] == (
        "medusa-apar: the conversation is empty to this model, whose vocabulary has no token for any of it\n"
    )


# ---- what is seen while one waits


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("waits", "seconds"), [(True, 0.01), (False, 5)])
def test_what_takes_long_is_said_on_a_terminal_alone(monkeypatch, waits, seconds):
    for stream, shown in ((Terminal(), waits), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with job.slow("loading it", seconds):
            time.sleep(0.1)
        assert stream.getvalue() == ("loading it ...\n" if shown else "")


@pytest.mark.parametrize(("more", "what"), [([], "reading"), (["--json"], "answering")])
def test_the_first_text_of_an_answer_ends_the_waiting(run, monkeypatch, more, what):
    """A line about the prompt must not come between the words of the answer; with --json these come at the end."""
    left = []

    @contextlib.contextmanager
    def slow(what):
        yield
        left.append((what, sys.stdout.getvalue()))

    monkeypatch.setattr(job, "slow", slow)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert run("generate", QUESTION, "--max-new-tokens", "5", *more)[0] == 0
    assert left == [(f"{what} the prompt of 4 tokens", "")]


@pytest.mark.parametrize("plan", cli.SPECULATION)
def test_how_tokens_are_guessed_and_what_runs_is_said_on_a_terminal(tmp_path, monkeypatch, capsys, plan):
    folder = forking_folder(tmp_path / "model")
    MedusaHeads.random(AutoModelForCausalLM.from_pretrained(folder)).save_pretrained(folder / "medusa")
    monkeypatch.setattr(sys, "stderr", Terminal())
    options = ["--max-new-tokens", "12", "--speculation", plan, "--no-fork", "--json"]
    assert cli.main(["generate", "aaa bb", "--model", str(folder), *options]) == 0
    line = sys.stderr.getvalue()
    assert line.startswith(f"{folder}: MedusaApar(LlamaForCausalLM, torch on cpu in float32, ")
    guesses = {"even": "guesses by 3 Medusa heads", "off": "guesses nothing"}
    assert guesses.get(plan, "guesses by 3 Medusa heads and n-grams") in line and line.count("\n") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 12
    assert found["steps"] == 12 if plan == "off" else found["steps"] < 12 or plan == "even"
