"""vLLM as servers of the load benchmark: its own, and ours over its engine.

Both run with the Python, the engine and the environment variables of the peers' vLLM, on the same merged weights. Ours
is `medusa-apar serve --engine vllm`, and finds this very package through `peer_files.own_package`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from medusa_apar.loading import load
from medusa_apar.threads.control_tokens import ControlTokens

from . import peer_files, peers
from .serve_launch import HOST, MODEL_NAME, QUEUE, Launch, Serving

VLLM, PLAIN, THREADS, HEADS, BOTH = "vllm", "vllm-plain", "vllm-threads", "vllm-heads", "vllm-both"
OURS = {  # what each is, --fork, and whether it has the model's Medusa heads
    PLAIN: ("ours over vLLM, one thread and no guesses", "off", False),
    THREADS: ("ours over vLLM, threads", "auto", False),
    HEADS: ("ours over vLLM, heads", "off", True),
    BOTH: ("ours over vLLM, threads and heads", "auto", True),
}

SEQUENCES = 3  # threads for each client, all answers together
FEWEST_SEQUENCES = 16  # a single answer may have more than three threads
BLOCK = 32  # tokens; the CPU's smallest, whereas its default of 128 leaves children little to share


@dataclass(frozen=True, slots=True)
class Prepared:
    """The environment's Python, the model folder with the tuning merged in, and its control tokens."""

    python: Path
    model: Path
    control: ControlTokens | None

    def command(self, *module: str) -> tuple[str, ...]:
        # -P: vLLM would take a `triton_kernels` in the working folder, a checkout of ours, for the one that it knows.
        return (str(self.python), "-P", *module, "--host", HOST, "--port", "{port}", "--dtype", "bfloat16")


def check(names: Sequence[str], model: str) -> None:
    """ValueError, before anything is loaded, where one of them cannot answer with this model."""
    for name in names:
        if name in OURS and OURS[name][2]:
            peers.medusa_heads(name, model)


def launches(names: Sequence[str], serving: Serving, folder: Path) -> dict[str, Launch]:
    """How to start each of them, with all on disk that they need."""
    if not names:
        return {}
    python = peer_files.install(peers.VLLM)
    apar = load(serving.model, heads=None, speculation="off", dtype="bfloat16", device="cpu")
    prepared = Prepared(python, peer_files.merged(apar, serving.model), apar.control_token_ids)
    return {name: NAMES[name](name, serving, prepared, folder / f"{name}.log") for name in names}


def _theirs(name: str, serving: Serving, its: Prepared, log: Path) -> Launch:
    """vLLM's own server, the control tokens banned, as the benchmark of latency has them."""
    command = (
        *its.command("-E", "-m", "vllm.entrypoints.openai.api_server", "--model", str(its.model)),
        *("--served-model-name", MODEL_NAME, "--max-model-len", str(serving.context)),
        *("--max-num-seqs", str(serving.clients)),
        "--enable-prefix-caching" if serving.prefix_cache else "--no-enable-prefix-caching",
        *("--disable-uvicorn-access-log", "--disable-log-stats"),
    )
    body = {} if its.control is None else {"logit_bias": {str(token): -100 for token in its.control.ids}}
    about = "vLLM for CPUs, control tokens suppressed"
    return Launch(name, about, "bfloat16", log, command, _variables(serving), body, peers.VLLM.software)


def _ours(name: str, serving: Serving, its: Prepared, log: Path) -> Launch:
    """Our server over vLLM's engine. Its prefix cache is on: threads share a prompt and each other's text by it."""
    about, fork, guesses = OURS[name]
    heads = str(peers.medusa_heads(name, serving.model)) if guesses else "none"
    command = (
        *its.command("-m", "medusa_apar", "serve", str(its.model), "--engine", "vllm"),
        *("--fork", fork, "--heads", heads, "--max-requests", str(serving.clients), "--max-queue", str(QUEUE)),
        *("--no-access-log", "--block-size", str(BLOCK), "--max-model-len", str(serving.context)),
        *("--max-num-seqs", str(max(SEQUENCES * serving.clients, FEWEST_SEQUENCES)), "--prefix-cache"),
    )
    ours = {"PYTHONPATH": str(peer_files.own_package()), "MEDUSA_APAR_API_KEY": ""}
    variables = _variables(serving) | ours
    return Launch(name, about, "bfloat16", log, command, variables, software=peers.VLLM.software, cached=True)


NAMES: dict[str, Callable[[str, Serving, Prepared, Path], Launch]] = {VLLM: _theirs, **dict.fromkeys(OURS, _ours)}


def _variables(serving: Serving) -> dict[str, str]:
    variables = {
        "OMP_NUM_THREADS": str(serving.threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if (library := peers.VLLM.folder / peers.PEERS["vllm"].preload).exists():
        variables["LD_PRELOAD"] = str(library)
    return variables
