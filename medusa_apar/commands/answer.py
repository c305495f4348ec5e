"""Have a chat model answer prompts, as a corpus in its own words for `medusa-apar data`.

Tuned on its own answers a model changes least, and learns to fork in the very phrasing that it will write. It answers
untuned, or with --tuned as it was tuned but without forking: what another round of tuning can correct. Answers that do
not end within --max-new-tokens are no examples of how to write, but most of them loop: `medusa-apar data --looping
avoid` makes them examples of how not to. DIR gets chats.jsonl, unended.jsonl, asked.jsonl, log.jsonl and report.json;
the same command started again goes on where it stopped, and one with another model or other sampling is refused.

  medusa-apar answer --prompts chats.jsonl --temperature 0.7 --out own
  medusa-apar data own/chats.jsonl --agree-with chats.jsonl --out examples
  medusa-apar data own/unended.jsonl --looping avoid --out loops
"""

from __future__ import annotations

import argparse
from pathlib import Path

from medusa_apar.arguments import add_bad_lines, check_files, number, out_folder

HELP = "a corpus of a model's own answers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="name, folder or Hub id (default: %(default)s)")
    add("--tuned", action="store_true", help="with the tuning that comes with the model, in one thread")
    add("--prompts", type=Path, nargs="+", required=True, metavar="FILE", help="chat JSONL, .gz or not")
    add_bad_lines(parser)
    add("--out", type=out_folder, required=True, metavar="DIR", help="where answers, log and report go")
    add("--count", type=number(int, 1), metavar="N", help="prompts to answer (default: all)")
    add("--max-prompt", type=number(int, 1), default=300, metavar="N", help="tokens (default: %(default)s)")
    add("--max-new-tokens", type=number(int, 1), default=512, metavar="N", help="of an answer (default: %(default)s)")
    add("--temperature", type=number(float, 0), default=0.7, metavar="T", help="0 is greedy (default: %(default)s)")
    add("--top-p", type=number(float, 0, 1, open_low=True), default=0.9, metavar="P", help="default: %(default)s")
    add("--batch", type=number(int, 1), default=32, metavar="N", help="prompts at a time (default: %(default)s)")
    add("--max-minutes", type=number(float, 0, open_low=True), default=float("inf"), metavar="M", help="then stop")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="default: bfloat16 where it is fast")
    add("--quantize", choices=("int8",), help="round weights and activations: faster, and nearly the same text")
    add("--seed", type=number(int, 0), default=0, help="of order and sampling (default: %(default)s)")
    add("--trust-remote-code", action="store_true", help="let code from the model's repository run")


def run(args: argparse.Namespace) -> int:
    check_files(args.prompts)

    from medusa_apar.finetune.corpus import Drops
    from medusa_apar.heads.ask import Limits, read_prompts
    from medusa_apar.heads.own_answers import Sampling, own_answers
    from medusa_apar.job import Job, fast_dtype, quiet, slow
    from medusa_apar.loading import load

    quiet()
    drops = Drops(skip_bad=args.bad_lines == "skip")
    with slow("reading the prompts"):
        prompts = read_prompts(args.prompts, drops)
    dtype = fast_dtype() if args.dtype == "auto" else args.dtype
    # Without guesses: what a thread writes beyond an answer's end is kept, and they would change how much.
    options = {"speculation": "off", "dtype": dtype, "trust_remote_code": args.trust_remote_code}
    if args.quantize:
        options["quantize"] = args.quantize
    with slow(f"loading {args.model}"):
        apar = load(args.model, heads=None, apar=True if args.tuned else None, **options)
    limits = Limits(args.count, args.max_prompt, args.max_new_tokens, args.batch, args.max_minutes, args.seed)
    settings = {key: value for key, value in vars(args).items() if key != "command"}
    with Job(args.out, "answer", settings) as job:
        own_answers(apar, prompts, limits, Sampling(args.temperature, args.top_p, args.quantize), job, drops)
    return 0
