"""What a whole forward pass takes on a GPU, with CUDA graphs and without, beside reading its weights once.

  python -m medusa_apar.eval.kernel_steps --out DIR [--shapes smollm2 llama-8b]

Models have the shapes of real ones and random weights in bfloat16, which is all that time depends on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from medusa_apar.attaching import attach
from medusa_apar.job import machine, write_text

from .kernel_timing import copy_bandwidth, table
from .profile import curve

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49_152,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
}
ROWS = (1, 8, 16, 32, 64)


def measure(name: str, shape: dict[str, Any], device: str, copy: float) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    config = LlamaConfig(**shape, max_position_embeddings=8192)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    # Every weight is read once but the embedding, of which a row a token is.
    read = sum(p.nbytes for n, p in model.named_parameters() if "embed_tokens" not in n or config.tie_word_embeddings)
    rows = []
    for graphs in (True, False):
        costs = curve(attach(model, attention="triton", cuda_graphs=graphs, speculation="off"), ROWS)
        for size, seconds in costs["rows"].items():
            weights = 1e3 * read / copy
            row = {"model": name, "graphs": graphs, "rows": size, "slots": costs["slots"], "ms": 1e3 * seconds}
            rows.append(row | {"weights_once_ms": weights, "times_that": 1e3 * seconds / weights})
        rows.append({"model": name, "graphs": graphs, "rows": "prompt of 512", "ms": 1e3 * costs["prefill"]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA GPU, and there is none.")
    copy = copy_bandwidth("cuda")
    rows = [row for name in args.shapes for row in measure(name, SHAPES[name], "cuda", copy)]
    args.out.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "copy_bytes_per_second": copy, "rows": rows}
    write_text(args.out / "steps.json", json.dumps(report, indent=1))
    write_text(args.out / "steps.md", table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
