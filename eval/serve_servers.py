"""The servers of the load benchmark: ours with and without its parts, vLLM, ours over vLLM, llama.cpp, or a URL.

One is alive at a time, each in a process of its own with a port of its own, started for one setting and stopped after
it: no setting finds what another has left in a cache.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from medusa_apar.job import machine
from medusa_apar.loading import load
from medusa_apar.models import hub
from medusa_apar.models.fingerprint import fingerprint
from medusa_apar.models.sources import locate

from . import llama_server, peer_files, peers, serve_vllm
from .serve_client import message_of
from .serve_launch import HOST, MODEL_NAME, QUEUE, Launch, Serving
from .systems import UNTUNED

OURS = {
    "plain": ("--fork", "off", "--speculation", "off"),
    "threads": ("--fork", "auto", "--speculation", "off"),
    "heads": ("--fork", "off", "--speculation", "auto"),
    "both": ("--fork", "auto", "--speculation", "auto"),
}
LLAMA_Q4, LLAMA_Q8, URL = "llama.cpp-q4_1", "llama.cpp-q8_0", "url"
NAMES = (*OURS, *serve_vllm.NAMES, LLAMA_Q4, LLAMA_Q8)

READY = 600.0  # seconds for a server to load and compile what it wants to
STOPPING = 20.0  # seconds to end by itself


class NotStarted(RuntimeError):
    """A server has ended before it was ready."""


@dataclass(frozen=True, slots=True)
class Running:
    url: str  # without `/v1`
    model: str
    headers: dict[str, str]
    local: bool  # never through a proxy


def prepare(names: Sequence[str], serving: Serving, folder: Path, url: str | None, model: str | None) -> list[Launch]:
    """How to start each server, with all on disk that it needs; their logs go into `folder`.

    url, model: of the one that runs already. ValueError where one cannot stand beside ours.
    """
    vllm = serve_vllm.launches([name for name in names if name in serve_vllm.NAMES], serving, folder)
    return [
        _ours(name, serving, folder) if name in OURS
        else _running(url, model, folder) if name == URL and url is not None
        else vllm[name] if name in vllm
        else _llama(name, serving, folder)
        for name in names
    ]  # fmt: skip


def check(names: Sequence[str], model: str) -> None:
    """ValueError, before anything is loaded, where a peer cannot answer with this model."""
    serve_vllm.check(names, model)
    for name in names:
        if name in (LLAMA_Q4, LLAMA_Q8) and (base := locate(model).base) not in hub.EMBEDDED:
            raise ValueError(f"{name} answers with {' or '.join(hub.EMBEDDED)}, and this model is built on {base}")


def base_of(url: str) -> str:
    """A server's address without `/v1`. ValueError for what is none."""
    try:
        parts = urllib.parse.urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        fine = False
    if not fine:
        raise ValueError(f"{url} is no address of a server: one looks like http://localhost:8000")
    return url.rstrip("/").removesuffix("/v1")


def _ours(name: str, serving: Serving, folder: Path) -> Launch:
    options = {"--quantize": serving.quantize, "--dtype": serving.dtype}
    rounding = [part for flag, value in options.items() if value for part in (flag, value)]
    cache = "--prefix-cache" if serving.prefix_cache else "--no-prefix-cache"
    command = (
        *(sys.executable, "-m", "medusa_apar", "serve", serving.model, "--host", HOST, "--port", "{port}"),
        *("--heads", serving.heads, *rounding, *OURS[name], "--max-requests", str(serving.clients), cache),
        *("--threads", str(serving.threads), "--max-queue", str(QUEUE), "--no-access-log"),
    )
    about = {"plain": "ours, one thread and no guesses", "both": "ours, threads and guesses"}.get(name, f"ours, {name}")
    weights = serving.quantize or serving.dtype or "as loaded"
    variables = {"OMP_NUM_THREADS": str(serving.threads), "MEDUSA_APAR_API_KEY": ""}
    return Launch(name, about, weights, folder / f"{name}.log", command, variables, pooled=True)


def _llama(name: str, serving: Serving, folder: Path) -> Launch:
    gguf = hub.embedded_gguf(locate(serving.model).base)
    if name == LLAMA_Q8:
        gguf = peer_files.requantised(gguf, peer_files.install(peers.LLAMA))
    context, clients, threads = serving.context * serving.clients, str(serving.clients), str(serving.threads)
    cache = "--cache-prompt" if serving.prefix_cache else "--no-cache-prompt"
    command = (
        *(str(llama_server.llama_server()), "--model", str(gguf), "--alias", MODEL_NAME, "--host", HOST),
        *("--port", "{port}", "--threads", threads, "--parallel", clients, "--ctx-size", str(context)),
        *(cache, "--cache-ram", "0", "--offline", "--no-ui", "--no-slots", "--verbosity", "2"),
    )
    weights = f"Q4_1, {UNTUNED}" if name == LLAMA_Q4 else f"Q8_0 from Q4_1, {UNTUNED}"
    variables = {"OMP_NUM_THREADS": threads}
    about = "llama.cpp's server on the untuned base"
    return Launch(name, about, weights, folder / f"{name}.log", command, variables, software=peers.LLAMA.software)


def _running(url: str, model: str | None, folder: Path) -> Launch:
    base = base_of(url)
    return Launch(base, "runs already", "its own", folder / "url.log", url=base, model=model)


@contextmanager
def running(launch: Launch) -> Iterator[Running]:
    """Starts a server, waits until it is ready, and stops it with all of its processes when the block ends.

    RuntimeError, naming its log, where it does not come to that, and NotStarted where it has ended itself;
    ConnectionError where nobody answers at a URL.
    """
    if not launch.command:
        headers = _key()
        yield Running(launch.url, launch.model or _listed(launch.url, headers), headers, local=False)
        return
    port = _free_port()
    process = _start(launch, port)
    try:
        url = f"http://{HOST}:{port}"
        _wait(launch, process, url)
        yield Running(url, launch.model or _listed(url, {}), {}, local=True)
        if process.poll() is not None:
            code = process.returncode
            raise RuntimeError(f"{launch.name} stopped while answering (exit code {code}): {_see(launch)}")
    finally:
        _stop(process)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit while the block runs, so that it stops what it has started."""
    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = {number: signal.getsignal(number) for number in numbers}

    def end(number: int, frame: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # a second one would break the stopping off
        raise SystemExit(128 + number)

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def asked_model(url: str, model: str | None) -> str:
    """The name of the model that is asked at a URL. ConnectionError and ValueError where it cannot be told."""
    return model or _listed(base_of(url), _key())


def weights_of(serving: Serving) -> str:
    """A name for the weights that our servers load, those of the heads included."""
    heads = None if serving.heads == "none" else serving.heads
    apar = load(serving.model, heads=heads, dtype=serving.dtype, speculation="off", device="cpu")
    return " ".join(fingerprint(its)[:12] for its in (apar.model, apar.heads) if its is not None)


def software() -> str:
    """Versions of all engines that may be measured."""
    ours = ", ".join(f"{name} {version}" for name, version in machine()["versions"].items())
    return f"{ours}, {peers.VLLM.software}, {peers.LLAMA.software}"


def _key() -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    return {"Authorization": f"Bearer {key}"} if key else {}


def _start(launch: Launch, port: int) -> subprocess.Popen[bytes]:
    # Another engine's Python must not find our packages.
    kept = {key: value for key, value in os.environ.items() if launch.pooled or key != "PYTHONPATH"}
    command = [part.replace("{port}", str(port)) for part in launch.command]
    launch.log.parent.mkdir(parents=True, exist_ok=True)
    with launch.log.open("ab") as log:
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=kept | launch.variables,
                start_new_session=True,  # a group of its own, which ends as one
            )
        except OSError as error:
            raise RuntimeError(f"{launch.name} cannot be started ({error})") from error


def _wait(launch: Launch, process: subprocess.Popen[bytes], url: str) -> None:
    until = time.monotonic() + READY
    with httpx.Client(trust_env=False, timeout=5.0) as http:
        while time.monotonic() < until:
            if process.poll() is not None:
                code = process.returncode
                raise NotStarted(f"{launch.name} stopped while starting (exit code {code}): {_see(launch)}")
            with suppress(httpx.HTTPError):
                if http.get(f"{url}/health").status_code == 200:
                    return
            time.sleep(0.2)
    raise RuntimeError(f"{launch.name} was not ready within {READY:.0f} seconds: {_see(launch)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Its whole group: an engine may have processes of its own, which would go on computing."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOPPING)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _listed(url: str, headers: dict[str, str]) -> str:
    """The name of the only model that a server lists."""
    try:
        with httpx.Client(trust_env=bool(headers) or HOST not in url, timeout=30.0, headers=headers) as http:
            answer = http.get(f"{url}/v1/models")
        if answer.status_code != 200:
            said = message_of(answer.text)
            raise ConnectionError(f"{url} does not list its models (HTTP {answer.status_code}: {said})")
        names = [str(entry["id"]) for entry in answer.json()["data"]]
    except httpx.HTTPError as error:
        raise ConnectionError(f"nobody answers at {url} ({error}): is the server running there?") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConnectionError(f"{url} lists its models otherwise than OpenAI's API does") from error
    if len(names) != 1:
        raise ValueError(f"{url} lists {', '.join(names[:5]) or 'no models'}: say with --url-model which one to ask")
    return names[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _see(launch: Launch) -> str:
    return f"see {launch.log}"
