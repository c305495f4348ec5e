"""The command line: what it prints where, on a tiny forking model; test_readme.py runs it with the default one."""

import contextlib
import inspect
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

import medusa_apar
from medusa_apar import job
from medusa_apar.commands import SUBCOMMANDS, cli, demo, doctor
from medusa_apar.display.terminal import Lanes
from medusa_apar.events import StepFinished
from medusa_apar.generate import attach
from medusa_apar.heads import MedusaHeads
from medusa_apar.models import hub
from medusa_apar.runtimes.cpu import library
from tests.support import arm
from tests.support.folders import forking_folder, own_code
from tests.support.models import CONTROL, VOCAB, forking_model
from tests.support.tokenizers import save_tokenizer

QUESTION = "w1 w2 w9 w3"
WRITERS = [name for name, module in SUBCOMMANDS.items() if '"--out"' in inspect.getsource(module)]
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


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["sing"], "invalid choice: 'sing'"),
        (["generate"], "required: PROMPT"),
        (["generate", "x", "--max-new-tokens", "0"], "'0' must be a whole number at least 1"),
        (["generate", "x", "--top-p", "1.5"], "'1.5' must be a number above 0 and at most 1"),
        (["demo", "--temperature", "0"], "'0' must be a number above 0"),
        (["demo", "--dtype", "int4"], "invalid choice: 'int4'"),
        (["train-heads", "--num-heads", "33"], "'33' must be a whole number at least 1 and at most 32"),
        (["train-heads", "--num-layers", "9"], "'9' must be a whole number at least 1 and at most 8"),
    ],
)
def test_bad_arguments_are_one_sentence(args, sentence, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(args)
    out, err = capsys.readouterr()
    assert exit.value.code == 2
    assert sentence in err and err.startswith("medusa-apar: ") and err.count("\n") == 1 and not out


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


def test_doctor_names_what_it_found(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name in ("python", "torch", "transformers", "cpu", "cpu runtime", "gpu", "kernels", "cache", "smollm2-135m"):
        assert re.search(rf"^{name} +\S", out, re.M), name


def test_bare_it_shows_its_help(capsys):
    assert cli.main([]) == 0
    bare = capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        cli.main(["--help"])
    assert exit.value.code == 0 and capsys.readouterr() == bare and "usage: medusa-apar" in bare.out


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"medusa-apar {medusa_apar.__version__}\n"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_help_has_a_sentence_and_an_example(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    shown = capsys.readouterr().out
    usage, sentence, *_ = shown.split("\n\n")
    assert usage.startswith(f"usage: medusa-apar {command}") and re.match(r"[A-Z](.|\n)*[.:]$", sentence)
    examples = re.findall(rf"^ +medusa-apar {command} (.*)$", shown, re.M)
    assert examples
    for example in examples:  # of options that there are
        assert set(re.findall(r"--[a-z-]+", example)) <= set(re.findall(r"--[a-z-]+", shown[len(usage) :]))


def test_every_command_that_reads_corpora_has_the_option_for_bad_lines():
    commands = cli.parser()._subparsers._group_actions[0].choices
    having = {name for name, command in commands.items() if "--bad-lines" in command._option_string_actions}
    assert having == {"answer", "data", "finetune", "train-heads", "calibrate"}
    templated = {name for name in having if "chat template" in commands[name].format_help()}
    assert templated == having - {"data"}  # which has no model


def numbers():
    """(command, option, what is needed beside it) of every option that takes a number."""
    needed = {"generate": ["x"], "merge": ["x"], "convert": ["x", "--to", "v2"], "data": ["x"]}
    for name, command in cli.parser()._subparsers._group_actions[0].choices.items():
        for action in command._actions:
            if getattr(action.type, "__qualname__", "").startswith("number."):
                yield name, action.option_strings[0], needed.get(name, [])


def test_there_are_numbers_to_try():
    assert len(list(numbers())) > 40


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "", " ", "1_", "9" * 5000])
def test_no_number_is_beyond_all_bounds(text, capsys):
    for command, option, needed in numbers():
        with pytest.raises(SystemExit) as exit:
            cli.main([command, *needed, f"{option}={text}"])
        out, err = capsys.readouterr()
        assert exit.value.code == 2 and not out
        assert err.startswith(f"medusa-apar: argument {option}") and err.count("\n") == 1, (command, option, err)
        assert len(err) < 250


@pytest.mark.parametrize("share", ["x=nan", "x=inf", "x=0", "x=-1", "x=y"])
def test_no_share_is_beyond_all_bounds(share, capsys):
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--out", "x", "--data", share])
    assert "with a share above 0" in capsys.readouterr().err


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize("kind", ["empty", "spaces", "file", "below a file", "link to nothing"])
def test_where_nothing_can_be_written_is_said_at_once(command, kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    out = {"empty": "", "spaces": "  ", "file": "file", "below a file": "file/a/b", "link to nothing": "link"}[kind]
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--out", out])
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.startswith("medusa-apar: argument --out: ") and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("command", WRITERS)
def test_a_folder_to_write_into_may_begin_with_the_home_directory(command, tmp_path, monkeypatch):
    """A shell leaves the `~` of --out=~/x as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (option,) = (
        action
        for action in cli.parser()._subparsers._group_actions[0].choices[command]._actions
        if "--out" in action.option_strings
    )
    assert option.type("~/x") == tmp_path / "x"


@pytest.mark.parametrize("argument", ["a\udcff", "\ud800"])
@pytest.mark.parametrize("before", [["generate"], ["demo", "--prompt"], ["data", "--out"], ["merge", "x", "--out"]])
def test_an_argument_that_is_no_text_is_refused(before, argument, capsys):
    assert cli.main([*before, argument]) == 2
    err = capsys.readouterr().err
    assert err.startswith("medusa-apar: an argument is no text in UTF-8: ") and err.count("\n") == 1


@pytest.mark.parametrize("prompt", ["", " ", "\n\t", "\u3000"])
@pytest.mark.parametrize("how", ["generate", "demo", "stdin"])
def test_an_empty_prompt_is_refused_before_anything_is_loaded(how, prompt, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(prompt.encode())))
    arguments = {"generate": ["generate", prompt], "demo": ["demo", "--prompt", prompt], "stdin": ["generate", "-"]}
    assert cli.main([*arguments[how], "--model", "./nothing"]) == 2
    assert capsys.readouterr() == ("", "medusa-apar: the prompt is empty\n")


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
