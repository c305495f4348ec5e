"""Arguments of the command line: helps that are true, and what is refused in one sentence before anything is loaded."""

import inspect
import io
import re

import pytest

import medusa_apar
from medusa_apar.commands import SUBCOMMANDS, cli

WRITERS = [name for name, module in SUBCOMMANDS.items() if '"--out"' in inspect.getsource(module)]


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
