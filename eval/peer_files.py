"""What the benchmark's peers need on disk, each made once in the user's cache: environments and model files."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

import medusa_apar
from medusa_apar.generate import MedusaApar
from medusa_apar.job import write_text
from medusa_apar.loading import load
from medusa_apar.models import hub
from medusa_apar.models.fingerprint import fingerprint
from medusa_apar.runtimes.cpu.library import processor

WORKERS = Path(__file__).parent / "peers_workers"
MAPPED = ("heads", "triton_kernels", "eval")  # which lie beside the package in a checkout (setup.py)
FINISHED = "finished.json"  # a killed installation leaves an environment without it


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment of its own: peers pin other versions of torch and transformers than we do."""

    name: str
    packages: tuple[str, ...]  # pinned; the first is the engine
    takes: str  # time and room to make it
    alone: bool = False  # the engine comes without what it says it needs; the other packages are what it does
    removed: tuple[str, ...] = ()  # dependencies that are not needed and fail to import beside a CPU build of torch
    variables: tuple[tuple[str, str], ...] = ()  # for the build
    native: bool = False  # compiled here, for this processor: another in its place makes it again

    @property
    def folder(self) -> Path:
        return peers_dir() / self.name

    @property
    def python(self) -> Path:
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def contents(self) -> str:
        """For the marker: another text there means another environment."""
        made_for = [hashlib.sha256(processor().encode()).hexdigest()] if self.native else []
        return json.dumps([self.packages, self.alone, self.removed, self.variables, *made_for]) + "\n"

    @property
    def software(self) -> str:
        return re.sub(r"\[.*\]", "", self.packages[0]).replace("==", " ")


def peers_dir() -> Path:
    return hub.cache_dir() / "peers"


def run_logged(command: list[str], log: Path, doing: str, variables: dict[str, str] | None = None) -> None:
    """RuntimeError in one sentence where the command fails; its output is in `log`, which is appended to."""
    with log.open("ab") as file:
        try:
            ran = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env={**os.environ, **(variables or {})}
            )
        except OSError as error:
            raise RuntimeError(f"{doing} failed ({error})") from error
    if ran.returncode:
        raise RuntimeError(f"{doing} failed (exit code {ran.returncode}): see {log}")


def say(doing: str, folder: Path, takes: str, log: Path) -> None:
    """Tells somebody who waits for what is done once."""
    print(f"medusa-apar: {doing} into {folder}, once ({takes}; log: {log})", file=sys.stderr)


def pip(python: Path) -> list[str]:
    """The command that serves an environment: our own pip, or where we have none the environment's."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    return [str(python), "-m", "pip", "--disable-pip-version-check"]


def install(environment: Environment) -> Path:
    """The environment's Python; the first call makes the environment, and one that is not whole is made again."""
    folder = environment.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{environment.name}.lock"):
        marker = folder / FINISHED
        if (
            environment.python.exists()
            and marker.exists()
            and marker.read_text(encoding="utf-8") == environment.contents
        ):
            return environment.python
        log = folder.parent / f"{environment.name}.log"
        log.unlink(missing_ok=True)
        say(f"installing {environment.software}", folder, environment.takes, log)
        shutil.rmtree(folder, ignore_errors=True)
        doing = f"installing {environment.software}"
        without = ["--without-pip"] if importlib.util.find_spec("pip") else []  # copying one takes seconds
        run_logged([sys.executable, "-m", "venv", *without, str(folder)], log, doing)
        command = pip(environment.python)
        engine, *others = environment.packages
        together = others if environment.alone else [engine, *others]
        variables = dict(environment.variables)
        if environment.native:  # or pip would take the wheel that it built on another machine
            variables["PIP_NO_CACHE_DIR"] = "1"
        run_logged([*command, "install", *together], log, doing, variables)
        if environment.alone:
            run_logged([*command, "install", "--no-deps", engine], log, doing, variables)
        if environment.removed:
            run_logged([*command, "uninstall", "--yes", *environment.removed], log, doing)
        write_text(marker, environment.contents)
    return environment.python


def own_package() -> Path:
    """A folder for another environment's PYTHONPATH, by which its Python finds this very package, and nothing else.

    It holds links, so that it is never older than what runs here, and is named after them. Nothing is built or
    installed: an environment that is shared with others, and takes gigabytes, stays as it is. A checkout could not
    stand there itself, as its `triton_kernels` would be found under the name of a package that vLLM knows.
    """
    package = Path(medusa_apar.__file__).parent.absolute()
    parts = {path.name: path for path in package.iterdir() if path.name != "__pycache__"}
    for name in MAPPED:
        spec = importlib.util.find_spec(f"medusa_apar.{name}")
        assert spec is not None and spec.submodule_search_locations
        parts[name] = Path(spec.submodule_search_locations[0]).absolute()
    told = json.dumps(sorted((name, str(path)) for name, path in parts.items()))

    def build(_: Path, folder: Path) -> None:
        inside = folder / medusa_apar.__name__
        inside.mkdir()
        for name, path in parts.items():
            (inside / name).symlink_to(path)

    return hub.build_once(peers_dir() / f"own-{hashlib.sha256(told.encode()).hexdigest()[:12]}", build)


def merged(apar: MedusaApar, model: str) -> Path:
    """A transformers folder with the very weights that our own systems have, tuning merged in."""
    target = peers_dir() / "models" / f"merged-{fingerprint(apar.model)[:12]}"

    def build(_: Path, folder: Path) -> None:
        # Loaded again: by now our own systems may have put other layers into `apar.model`.
        again = load(model, heads=None, speculation="off", dtype=apar.model.dtype, device="cpu")
        again.model.save_pretrained(folder)
        tokenizer: Any = again.tokenizer
        tokenizer.save_pretrained(folder)

    return hub.build_once(target, build)


def requantised(gguf: Path, python: Path) -> Path:
    """A Q8_0 file of another GGUF file's weights, made by llama.cpp."""
    target = peers_dir() / "models" / f"{gguf.parent.name}-q8_0"

    def build(_: Path, folder: Path) -> None:
        command = [str(python), "-E", str(WORKERS / "llama_prepare.py"), str(gguf), str(folder / "model.gguf")]
        run_logged(command, peers_dir() / "llama_prepare.log", f"requantising {gguf.name}")

    return hub.build_once(target, build) / "model.gguf"


def int8_graph(source: Path, python: Path, banned: list[int], software: str) -> Path:
    """OpenVINO's form of a transformers folder, int8 weights, the banned tokens' logits masked in the graph."""
    name = "-".join(["openvino", software.split()[-1], source.name, *map(str, banned)])

    def build(scratch: Path, folder: Path) -> None:
        command = [str(python), "-E", str(WORKERS / "openvino_prepare.py"), str(source), str(scratch), str(folder)]
        run_logged([*command, json.dumps(banned)], peers_dir() / "openvino_prepare.log", "converting to OpenVINO")

    return hub.build_once(peers_dir() / "models" / name, build)
