"""What only a real process meets: streams that are closed or full, pipes that break, disks without room."""

import contextlib
import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from medusa_apar.commands.cli import main
from tests.support.folders import forking_folder

ROOT = Path(__file__).parents[2]


def shell(line, **environment):
    """(exit code, stdout, stderr) of a line for sh in which `$mp` is the command."""
    done = subprocess.run(
        ["sh", "-c", line],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "mp": f"{sys.executable} -m medusa_apar", **environment},
        capture_output=True,
        timeout=60,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("$mp generate hi >&-", "standard output is closed: send it to a file, or to /dev/null"),
        ("$mp data x --out y >&- <&-", "standard output is closed: send it to a file, or to /dev/null"),
        ("$mp generate - <&-", "standard input is closed, from which - reads the prompt"),
        ("$mp generate - </dev/null", "the prompt is empty"),
        (r"printf 'a\377b' | $mp generate -", "standard input is no text in UTF-8 (invalid start byte at byte 1)"),
        (r"yes | $mp generate -", "standard input goes on after 16 MiB, which no model reads as a prompt"),
        (r"$mp generate $(printf 'a\377')", r"an argument is no text in UTF-8: a\udcff"),
    ],
)
def test_streams_and_bytes_that_are_no_text_are_one_sentence(line, sentence):
    assert shell(line) == (2, "", f"medusa-apar: {sentence}\n")


def test_closed_standard_error_does_no_harm(tmp_path):
    """What is written must not land in the file that happened to get its number."""
    assert shell(f"cd {tmp_path}; $mp generate ' ' 2>&- <&-; echo $?") == (0, "2\n", "")


FULL = "medusa-apar: No space left on device\n2\n"


@pytest.mark.parametrize(
    ("line", "said"), [("{ $mp --help; echo $? >&2; } | head -0", "0\n"), ("$mp > /dev/full; echo $? >&2", FULL)]
)
def test_what_cannot_be_printed_leaves_no_traceback(line, said):
    assert shell(line) == (0, "", said)


@contextlib.contextmanager
def room(size):
    """No file of this process can grow beyond so many bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = forking_folder(tmp_path_factory.mktemp("shell") / "model")
    messages = [[{"role": "user", "content": "abcdefgh"[n % 8] * 3 + " me"}] for n in range(20)]
    rows = [{"id": f"p{n}", "messages": turns} for n, turns in enumerate(messages)]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# The file that fills the disk, and a size at which some lines are in it.
FILLING = {
    "answer": (["--batch", "4", "--temperature", "1.5", "--max-new-tokens", "6"], "asked.jsonl", 500),
    "bench": (["--systems", "threads", "--heads", "none", "--max-new-tokens", "4"], "results.jsonl", 3000),
}


@pytest.mark.parametrize("command", FILLING)
def test_a_full_disk_ends_a_run_that_goes_on_when_there_is_room(folder, tmp_path, capsys, command):
    options, name, size = FILLING[command]

    def run(out):
        given = ["--model", folder, "--prompts", folder / "p.jsonl", "--dtype", "float32", "--out", out]
        return main([command, *map(str, given), *options])

    assert run(tmp_path / "whole") == 0
    whole = (tmp_path / "whole" / name).read_text().splitlines()
    assert len("\n".join(whole)) > size
    capsys.readouterr()
    with room(size):
        assert run(tmp_path / "cut") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("medusa-apar: File too large")
    cut = (tmp_path / "cut" / name).read_text()
    assert cut.endswith("\n") and 0 < len(list(map(json.loads, cut.splitlines()))) < 20
    assert not list((tmp_path / "cut").rglob(".*"))
    assert run(tmp_path / "cut") == 0
    fields = ("id", "tokens", "finished", "text", "prompt")
    kept = [
        [{name: json.loads(line).get(name) for name in fields} for line in lines]
        for lines in (whole, (tmp_path / "cut" / name).read_text().splitlines())
    ]
    assert kept[0] == kept[1] and len(kept[0]) == 20


def test_a_full_disk_leaves_no_half_corpus(tmp_path, capsys):
    answer = "\n".join(f"{n}. Head {n}: this part explains the idea in some more words." for n in range(1, 4))
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
    (tmp_path / "c.jsonl").write_text(
        "".join(json.dumps({"messages": [{**turns[0], "content": f"q{n}"}, turns[1]]}) + "\n" for n in range(99))
    )
    with room(5000):
        assert main(["data", str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "out")]) == 2
    assert "File too large" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["log.jsonl"]
    assert main(["data", str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "out")]) == 0
