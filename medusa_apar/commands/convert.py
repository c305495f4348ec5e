"""Medusa heads or an EAGLE-3 drafter from one file layout into another, bit for bit.

SOURCE is a folder, a head file or a Hub id in any of these layouts, which is told by its tensors and not by its config:

  v1       medusa_lm_head.safetensors or .pt, every head with an unembedding of its own
  v2       the same without: the base model's unembedding serves all heads
  vllm     model.safetensors and config.json as vLLM's Medusa reads them
  medusa2  a whole model with the heads in its weight files (TGI, Medusa-2)
  apar     medusa/medusa_lm_head.pt in a model's folder, a head's residual blocks being one block repeated

or an EAGLE-3 drafter, which goes into one of

  eagle3       its authors' names and config, as vLLM, SGLang and TensorRT-LLM read them
  speculators  the same in Red Hat's config, which names the base model

What the target cannot hold is refused with a sentence. Making v2 heads into v1, vllm or apar needs the base's
unembedding, making a medusa2 model all of the base's weights: from --base, or the base that the heads' config names.
vLLM does not load a truncated draft vocabulary: such heads get a row for every token, those they lack from the base. So
the file is as large as the base's unembedding at least, and half as large with --dtype bfloat16 as in float32.
A drafter with a truncated draft vocabulary and no unembedding gets the base's rows: other engines would take it whole.

examples:
  medusa-apar convert heads/weights/smollm2-135m/medusa --to vllm --out vllm-heads --dtype bfloat16
  medusa-apar convert FasterDecoding/medusa-vicuna-7b-v1.3 --to vllm --out vllm-heads
  medusa-apar convert my-heads --to medusa2 --base my-model --out my-medusa-model
  medusa-apar convert my-medusa-model --to v2 --out my-heads
  medusa-apar convert my-drafter --to speculators --base Qwen/Qwen3-8B --out Qwen3-8B-speculator
"""

from __future__ import annotations

import argparse
import sys

from medusa_apar.arguments import out_folder

HELP = "turn Medusa heads or an EAGLE-3 drafter into another file layout"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder, head file or Hub id of the heads")
    add("--to", required=True, choices=("v1", "v2", "vllm", "medusa2", "apar", "eagle3", "speculators"),
        help="layout to write")  # fmt: skip
    add("--trust-remote-code", action="store_true", help="let code from the base's repository run")
    add("--out", type=out_folder, required=True, metavar="DIR", help="folder to write into")
    add(
        "--base",
        metavar="NAME",
        help="the heads' base model: embedded name, folder or Hub id (default: their config's)",
    )
    add(
        "--dtype",
        choices=("keep", "float32", "float16", "bfloat16"),
        default="keep",
        help="of the tensors written, a medusa2 model's base included (default: %(default)s)",
    )
    add("--format", choices=("safetensors", "pt"), help="of v1, v2 and apar (default: pt for apar, else safetensors)")
    add("--force", action="store_true", help="replace the heads or the model that --out holds")


def run(args: argparse.Namespace) -> int:
    import torch

    from medusa_apar.heads.convert import convert
    from medusa_apar.job import quiet, slow

    quiet()
    dtype = None if args.dtype == "keep" else getattr(torch, args.dtype)
    options = {
        "base": args.base,
        "dtype": dtype,
        "file_format": args.format,
        "force": args.force,
        "trust_remote_code": args.trust_remote_code,
    }
    with slow(f"converting {args.source}"):
        read, written, notes = convert(args.source, args.to, args.out, **options)
    for note in notes:
        print(f"medusa-apar: {note}", file=sys.stderr)
    print(f"read   {read}\nwrote  {written}")
    return 0
