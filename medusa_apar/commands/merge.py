"""An APAR adapter merged into its base model and saved as a whole model.

ADAPTER is a folder with adapter_config.json (LoRA and the rows of the control tokens, as `medusa-apar finetune`
writes it), a Hub id, or smollm2-135m. DIR becomes a folder that medusa_apar.load, plain transformers and vLLM read:
weights, tokenizer with chat template, generation config, apar_config.json, and the adapter's Medusa heads, if it has
any, in medusa/.

examples:
  medusa-apar merge my-adapter --out my-model
  medusa-apar merge smollm2-135m --out smollm2-apar --dtype bfloat16
  medusa-apar generate --model my-model "Give me three tips for better sleep."
"""

from __future__ import annotations

import argparse

from medusa_apar.arguments import out_folder

HELP = "merge an adapter into its base model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="adapter folder, Hub id or embedded name")
    add("--out", type=out_folder, required=True, metavar="DIR", help="folder to write into")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: the base's)")
    add("--force", action="store_true", help="replace the model that --out holds; its other files stay")
    add("--trust-remote-code", action="store_true", help="let code from the model's repository run")


def run(args: argparse.Namespace) -> int:
    import torch

    from medusa_apar.job import quiet, slow
    from medusa_apar.models.head_files import SUBFOLDER
    from medusa_apar.models.merge import merge

    quiet()
    dtype = getattr(torch, args.dtype) if args.dtype else None
    with slow(f"merging {args.adapter}"):
        out = merge(args.adapter, args.out, dtype, args.force, args.trust_remote_code)
    heads = " and heads" if (out / SUBFOLDER).is_dir() else ""
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"wrote  model, tokenizer{heads}, {size:,} bytes, {out}")
    return 0
