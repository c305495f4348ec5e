"""Every command and every example of the READMEs is run: nobody can add one that was never tried.

As it stands there, in an empty folder, with arguments behind its own that make it small. What takes minutes however
small it is runs in a notebook, with the same options among others; `ELSEWHERE` says in which.
"""

import asyncio
import functools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import httpx
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

import medusa_apar
from medusa_apar import loading
from medusa_apar.commands import cli
from medusa_apar.eval import ceilings
from medusa_apar.eval.peers import PEERS
from medusa_apar.eval.systems import OF_BASE
from medusa_apar.heads import HydraHeads
from medusa_apar.serve.server import Server
from tests.support.eagle3_files import LAYOUTS, checkpoint
from tests.support.files import home, repository_files
from tests.support.folders import forking_folder
from tests.support.models import LLAMA_LIKE

ROOT = Path(__file__).parent.parent
PAGES = {
    page: (ROOT / page).read_text(encoding="utf-8")
    for page in (
        "README.md",
        *(f"{folder}/README.md" for folder in ("medusa_apar", "medusa_apar/serve", "eval", "examples")),
    )
}
BLOCKS = [(page, *block) for page in PAGES for block in re.findall(r"^```(\w+)\n(.*?)^```$", PAGES[page], re.M | re.S)]
COMMANDS = [
    words
    for _, language, text in BLOCKS
    if language in ("sh", "bash", "shell", "console")
    for line in text.replace("\\\n", " ").splitlines()
    if (words := shlex.split(line.removeprefix("$ "), comments=True))
]
EXAMPLES = {page: [text for its, language, text in BLOCKS if (its, language) == (page, "python")] for page in PAGES}

ADDRESS = "http://127.0.0.1:8000"  # of a server, in the READMEs

# Of argparse's options the last one counts.
SMALL = {
    "demo": ["--max-new-tokens", "8"],
    "generate": ["--max-new-tokens", "8"],
    "bench": ["--max-new-tokens", "8", "--limit", "1", "--model", "tiny"],
    "doctor": [],
    "serve": ["--port", "0"],
}
ELSEWHERE = dict.fromkeys(("data", "finetune", "train-heads", "calibrate"), "3_your_own_model.ipynb")

# What stands in an example for a reader's own.
WEIGHTS = ROOT / "heads/weights/smollm2-135m"
STANDS_FOR = {"folder-or-hub-id": WEIGHTS / "medusa"}


@pytest.fixture(scope="module")
def load():
    """Each model is loaded once for all commands: that takes longer than what they do with it."""
    return functools.cache(loading.load)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model that forks and its heads, small enough to be answered with by every system there is."""
    folder = forking_folder(tmp_path_factory.mktemp("readme") / "tiny", "wide_llama")
    HydraHeads.random(AutoModelForCausalLM.from_pretrained(folder)).save_pretrained(folder / "medusa")
    return folder


@pytest.fixture
def folder(load, tiny, tmp_path, monkeypatch):
    """Where a command runs, and may write what it likes."""
    (tmp_path / "tiny").symlink_to(tiny)
    monkeypatch.setattr(loading, "load", load)
    monkeypatch.setattr(medusa_apar, "load", load)
    monkeypatch.setattr(
        ceilings, "measure", lambda kinds: ceilings.Ceilings(1.0, {kind: {1: 1.0} for kind in kinds}, 0.0)
    )
    monkeypatch.setattr(Server, "run", answer_curls)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answer_curls(server: Server, sockets: list[socket.socket]) -> None:
    """Serves in a thread, where no signal comes, until what the READMEs ask has been answered."""
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets)), daemon=True)
    thread.start()
    while server.service.state == "loading":
        time.sleep(0.05)
    try:
        for words, answer in curls(f"http://127.0.0.1:{sockets[0].getsockname()[1]}"):
            assert answer.status_code == 200, (shlex.join(words), answer.text)
            assert answer.json()["choices"][0]["message"]["content"].strip()
        for example in EXAMPLES["medusa_apar/serve/README.md"]:
            exec(example.replace(ADDRESS, f"http://127.0.0.1:{sockets[0].getsockname()[1]}"), {})
    finally:
        server.should_exit = True
        thread.join(60)


def run(words: list[str]) -> None:
    program = Path(words[0]).name
    if "&&" in words:
        run(words[: words.index("&&")])
        run(words[words.index("&&") + 1 :])
    elif words[:2] == ["git", "clone"]:
        assert words[2:] == [home(ROOT)]
    elif program == "cd":
        assert words[1:] == [Path(home(ROOT)).name]
    elif program == "make":
        run_target(words)
    elif "vllm" in words and program != "pip":
        assert words_of_vllm(words) <= {word for path in (ROOT / "tests/vllm").iterdir() for word in tried_in(path)}
    elif program == "medusa-apar":
        run_command(words[1:])
    elif program == "pip":
        run_pip(words[1:])
    elif program == "curl":
        assert COMMANDS.index(words) > COMMANDS.index(["medusa-apar", "serve", "--quantize", "int8"])  # when it is sent
    else:
        nobody_runs(words)


def words_of_vllm(words: list[str]) -> set[str]:
    """What tests/vllm has to have tried of a command with vLLM, whose own flags are not ours to try."""
    return set(words) & {"medusa-apar", "serve", "--engine", "VLLM_PLUGINS=medusa_apar"}


def tried_in(path: Path) -> set[str]:
    text = path.read_text(encoding="utf-8") if path.suffix == ".py" else ""
    found = set(re.findall(r"[\w-]+", text))
    plugin = {"VLLM_PLUGINS=medusa_apar"} if {"VLLM_PLUGINS", "medusa_apar"} <= found else set()
    return found | plugin | ({"medusa-apar"} if "medusa_apar" in found else set())


def nobody_runs(words: list[str]) -> NoReturn:
    pytest.fail(f"README has a command that no test runs: {shlex.join(words)}")


def run_target(words: list[str]) -> None:
    """CI makes it, or what its recipe ends with is run here."""
    # Of a `make test ARGS=...` that runs this, nothing is for the targets here.
    environment = {
        name: value for name, value in os.environ.items() if name != "ARGS" and not name.startswith(("MAKE", "MFLAGS"))
    }
    recipe = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert recipe.returncode == 0, recipe.stderr
    targets = {word for word in words[1:] if "=" not in word}
    if not targets or not targets <= by_ci():
        run(shlex.split(recipe.stdout.splitlines()[-1]))


def run_pip(arguments: list[str]) -> None:
    """What is installed from a copy of the clone works outside it, weights and kernels included; what it depends on is
    here already."""
    asked = re.fullmatch(r"(?:\.|medusa-apar)(\[\w+\])?", arguments[1])
    assert arguments[0] == "install" and asked
    for path in repository_files(ROOT):
        if not str(path).startswith(("eval/results", "notebooks")):
            Path("clone", path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, Path("clone", path))
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        "site",
    ]
    subprocess.run([*command, "./clone" + (asked[1] or "")], check=True)
    located = (
        "import medusa_apar.eval, medusa_apar.triton_kernels, medusa_apar.loading as l; print(l.locate('smollm2-135m'))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path("site").absolute())}
    told = subprocess.run([sys.executable, "-c", located], env=environment, capture_output=True, text=True, check=True)
    assert str(Path("site/medusa_apar/heads/weights").absolute()) in told.stdout


def by_ci() -> set[str]:
    lines = re.findall(r"^make (.*)$", (ROOT / ".ci/run").read_text(), re.M)
    return {target for line in lines for target in line.split()}


def run_command(arguments: list[str]) -> None:
    parsed = cli.parser().parse_args(arguments)
    if parsed.command in ELSEWHERE:
        tried = commands_run_by(ELSEWHERE[parsed.command]).get(parsed.command, set())
        assert {word for word in arguments if word.startswith("--")} <= tried
        return
    if parsed.command not in SMALL:
        nobody_runs(["medusa-apar", *arguments])
    more = SMALL[parsed.command]
    if parsed.command == "bench" and parsed.serve:
        more = [*more, "--clients", "1", "--min-requests", "1", "--requests-per-client", "1", "--systems", "plain"]
    elif parsed.command == "bench" and parsed.quality:
        more = [*more, "--base", "tiny"]  # which is no adapter
    elif parsed.command == "bench" and parsed.systems:
        # Other engines are downloads of their own, and an untuned base is of an adapter.
        more = [*more, "--systems", *(name for name in parsed.systems if name not in (*PEERS, *OF_BASE))]
    assert cli.main([*arguments, *more]) == 0


def curls(url: str) -> list[tuple[list[str], httpx.Response]]:
    """What the READMEs ask of the server, asked of this one."""
    asked = [words for words in COMMANDS if words[0] == "curl"]
    answers = []
    for words in asked:
        options = dict(zip(words[2::2], words[3::2], strict=True))
        header = dict([options["-H"].split(": ")])
        address = words[1].replace(ADDRESS, url)
        answers.append(
            (words, httpx.post(address, headers=header, content=options["-d"], timeout=120, trust_env=False))
        )
    return answers


def commands_run_by(notebook: str) -> dict[str, set[str]]:
    """Its subcommands, with the options that they are given."""
    cells = json.loads((ROOT / "notebooks" / notebook).read_text(encoding="utf-8"))["cells"]
    lines = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    found = re.findall(r"^medusa-apar (\S+)(.*)$", lines.replace("\\\n", " "), re.M)
    return {command: set(re.findall(r"--[\w-]+", options)) for command, options in found}


def small_qwen(folder, tokenizer):
    """What stands for a Qwen and its drafter: random ones, with another model's tokenizer."""
    torch.manual_seed(0)
    sizes = LLAMA_LIKE | {"vocab_size": len(tokenizer), "head_dim": 8, "max_position_embeddings": 2048}
    Qwen3ForCausalLM(Qwen3Config(**sizes, eos_token_id=tokenizer.eos_token_id)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    layout = replace(LAYOUTS["its authors'"], ids=(2, 2, 2), where_ids="top")
    state, config = checkpoint(layout, hidden=LLAMA_LIKE["hidden_size"], vocab=len(tokenizer))
    (folder / "drafter").mkdir()
    save_file(state, folder / "drafter" / "model.safetensors")
    (folder / "drafter" / "config.json").write_text(json.dumps(config))
    return {"Qwen/Qwen3-1.7B": folder / "model", "AngelSlim/Qwen3-1.7B_eagle3": folder / "drafter"}


@pytest.mark.real
@pytest.mark.parametrize("words", COMMANDS, ids=shlex.join)
def test_commands_run(folder, words):
    run(words)


@pytest.mark.real
@pytest.mark.parametrize("page", [page for page in PAGES if EXAMPLES[page] and "serve" not in page])
def test_examples_run(page, folder, load, capsys):
    """One after the other, as a reader would type them who has a model of his own."""
    apar = load("smollm2-135m")
    for name, path in (STANDS_FOR | small_qwen(folder / "small", apar.tokenizer)).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(path)
    inputs = apar.tokenizer("What is a choir?", return_tensors="pt")
    names = {"medusa_apar": medusa_apar, "model": apar.model, "inputs": inputs}
    for example in EXAMPLES[page]:
        exec(re.sub(r"max_new_tokens=\d+", "max_new_tokens=24", example), names)
        assert capsys.readouterr().out.strip() or "print(" not in example


def test_there_is_something_to_run():
    assert len(COMMANDS) >= 4 and EXAMPLES["README.md"]


@pytest.mark.parametrize(
    "words", [["rm", "-r", "."], ["medusa-apar", "merge", "a", "--out", "b"], ["make", "clean"], ["make"]]
)
def test_a_command_that_no_test_runs_is_said(words):
    with pytest.raises(pytest.fail.Exception, match="README has a command that no test runs: "):
        run(words)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", PAGES[page])
    paths = [link.split("#")[0] for pair in links for link in pair if not re.match(r"\w+:|#|$", link)]
    assert [path for path in paths if not (ROOT / page).parent.joinpath(path).exists()] == []


def test_the_readme_is_read_in_one_go():
    assert len(PAGES["README.md"].splitlines()) < 160
