"""What a model of a billion parameters takes to start: time, and memory by kind.  python -m medusa_apar.eval.larger

Makes a Llama of random weights, 1.1 billion in bfloat16 (2.2 GB) unless options say otherwise, in a temporary folder,
and starts it with int8 weights in three processes: one that packs them and keeps the pack, one that finds it, and one
that packs them in memory alone. Prints JSON. Memory is in bytes: `peak` is the most that was resident (VmHWM), of which
`anonymous` is the process's own and `file` can be dropped by the kernel at any time, as it lies in files; each has a
peak of its own, seen every 20 milliseconds. `imported` is what the process took before it began to read the model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from medusa_apar.arguments import number
from medusa_apar.job import machine, quiet
from medusa_apar.loading import load
from medusa_apar.runtimes.cpu import library
from medusa_apar.runtimes.cpu.packed_model import packs_of

KINDS = {"peak": "VmHWM", "anonymous": "RssAnon", "file": "RssFile"}
STARTS = {"first": None, "second": None, "in memory": False}  # and their `keep_packed`


def memory() -> dict[str, int]:
    """Bytes of this process by kind, now; `peak` is the most there ever were."""
    lines = (line.split() for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    found = {words[0].rstrip(":"): int(words[1]) << 10 for words in lines if words[-1] == "kB"}
    return {kind: found[name] for kind, name in KINDS.items()}


@contextmanager
def peaks() -> Iterator[dict[str, int]]:
    """The most of each kind until the block ends."""
    found, done = memory(), threading.Event()

    def look() -> None:
        for kind, size in memory().items():
            found[kind] = max(found[kind], size)

    def watch() -> None:
        while not done.wait(0.02):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        look()


def make(folder: Path, layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocabulary: int) -> None:
    """A model folder: random weights in bfloat16, and a tokenizer whose words are numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        dtype=torch.bfloat16,
    )
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(id): id for id in range(vocabulary)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(folder)


def start(folder: Path, keep: bool | None, tokens: int) -> dict[str, Any]:
    """What it took to have a model ready, in this process, and to write some tokens."""
    imported, began = memory(), time.perf_counter()
    with peaks() as loading:
        apar = load(folder, dtype="auto", quantize="int8", device="cpu", speculation="off", keep_packed=keep)
    ready = time.perf_counter()
    prompt = torch.arange(5, 21)[None]
    with peaks() as generating:
        apar.generate(prompt, max_new_tokens=2, do_sample=False)  # measures what a step costs
        again = time.perf_counter()
        written = apar.generate(prompt, max_new_tokens=tokens, do_sample=False)[0, prompt.shape[1] :].tolist()
    packed = packs_of(apar.model).kinds["int8"]
    matrices = [packed.unembedding, *(matrix for layer in packed.layers for matrix in layer.matrices)]
    copies = {
        "model": sum(parameter.nbytes for parameter in apar.model.parameters()),
        "packed": sum(tensor.nbytes for matrix in matrices for tensor in matrix.stored.values()),
    }
    return {
        "parameters": sum(parameter.numel() for parameter in apar.model.parameters()),
        "copies": copies,
        "memory": {"imported": imported, "loading": loading, "generating": generating, "at the end": memory()},
        "peak_over_larger_copy": generating["peak"] / max(copies.values()),
        "seconds": {"loading": ready - began, "since the process began": time.time() - psutil.Process().create_time()},
        "tokens_per_second": len(written) / (time.perf_counter() - again),
        "tokens": written,
    }


def _in_a_process(folder: Path, name: str, tokens: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "medusa_apar.eval.larger", "--start", name, "--folder", str(folder)]
    ran = subprocess.run([*command, "--tokens", str(tokens)], stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    for name, size in (("layers", 22), ("hidden", 2048), ("inner", 5632), ("heads", 32), ("kv-heads", 4)):
        add(f"--{name}", type=number(int, 1), default=size, metavar="N", help="default: %(default)s")
    add("--vocabulary", type=number(int, 32), default=32000, metavar="N", help="default: %(default)s")
    add("--tokens", type=number(int, 1), default=32, metavar="N", help="that are written (default: %(default)s)")
    add("--folder", type=Path, metavar="DIR", help="where the temporary folder lies (default: $TMPDIR)")
    add("--start", choices=STARTS, help=argparse.SUPPRESS)  # of the model in --folder, in this process
    args = parser.parse_args()
    quiet()
    if args.start is not None:
        print(json.dumps(start(args.folder, STARTS[args.start], args.tokens)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="larger-") as scratch:
        os.environ["MEDUSA_APAR_CACHE"] = f"{scratch}/cache"
        library.library()  # compiled now, so that no start waits for it
        sizes = (args.layers, args.hidden, args.inner, args.heads, args.kv_heads, args.vocabulary)
        make(Path(scratch) / "model", *sizes)
        found = {name: _in_a_process(Path(scratch) / "model", name, args.tokens) for name in STARTS}
    same = len({tuple(start["tokens"]) for start in found.values()}) == 1
    print(json.dumps({**machine(), "starts": found, "same_tokens": same}, indent=2))


if __name__ == "__main__":
    main()
