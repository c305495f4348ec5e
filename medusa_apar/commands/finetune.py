"""Teach a chat model to fork: LoRA on every linear layer, and the two rows of its control tokens.

Every example is packed as a trie: one row holds the prompt, the trunk and its threads, every token once, and a token
sees its own path only. Several examples share a row. Trained are the trunk with its [Fork] tokens, and each thread's
tokens after its [Child].

An answer that can fork is written in three ways, drawn anew in each epoch: every detail forks, every detail stands in
line, or half of them each. So the model goes on with its list after a detail in line, and ends a thread after a forked
one. Answers that loop (`medusa-apar data --looping avoid`) are trained against: the tokens that they repeat become
unlikely (arXiv 1908.04319).

DIR gets adapter/ (which medusa_apar.load, peft and `medusa-apar merge` read), log.jsonl, report.json with held-out
losses of trunk, fork decisions and threads before and after, and checkpoint.pt: the same command started again goes on
from there, to the same result, and one with another base, data or settings is refused. One CPU core does about 150
tokens a second of a 135M model in bfloat16; several GPUs work together under `accelerate launch -m medusa_apar finetune
...`.

  medusa-apar finetune --base smollm2-135m --data examples --out tuned
  medusa-apar finetune --base owner/model --data own=0.6 sharegpt=0.4 --plain-share 0.3 --out tuned
"""

from __future__ import annotations

import argparse
from pathlib import Path

from medusa_apar.arguments import MAX_THREADS, add_bad_lines, number, out_folder

HELP = "teach a chat model to fork (LoRA)"


def data_share(text: str) -> tuple[Path, float | None]:
    folder, _, share = text.partition("=")
    if not share:
        return Path(folder), None
    try:
        value = float(share)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a folder, or folder=share with a share above 0")
    return Path(folder), value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base", default="smollm2-135m", help="model to tune: name, folder or Hub id (default: %(default)s)")
    add("--data", type=data_share, nargs="+", required=True, metavar="DIR[=SHARE]", help="of `medusa-apar data`")
    add_bad_lines(parser)
    add("--out", type=out_folder, required=True, metavar="DIR", help="where adapter, log and report go")
    add("--init", type=Path, metavar="ADAPTER", help="go on from this adapter instead of from nothing")
    add("--control-tokens", nargs=2, metavar=("FORK", "CHILD"),
        help="texts of the two control tokens (default: spare ones of the vocabulary, else two new ones)")  # fmt: skip
    add("--plain-share", type=number(float, 0, 0.95), default=0.5, metavar="S",
        help="share of the tokens from answers that stay whole (default: %(default)s, as in the paper)")  # fmt: skip
    add("--in-line-share", type=number(float, 0, 1), default=0.25, metavar="S",
        help="share of the forking answers that are written in line throughout (default: %(default)s)")  # fmt: skip
    add("--mixed-share", type=number(float, 0, 1), default=0.25, metavar="S",
        help="share of them of which half of the details fork (default: %(default)s)")  # fmt: skip
    add("--unlikelihood", type=number(float, 0), default=1.0, metavar="W",
        help="weight of what looping answers repeat, which becomes unlikely (default: %(default)s)")  # fmt: skip
    add("--distil", type=number(float, 0), default=0.0, metavar="W",
        help="weight of staying close to what the untuned base would write (default: %(default)s)")  # fmt: skip
    add(
        "--total-tokens",
        type=number(int, 1),
        metavar="N",
        help="packed tokens to draw (default: all, as long as the shares of --data hold)",
    )
    add("--epochs", type=number(float, 0, open_low=True), default=1.0, help="passes over them (default: %(default)s)")
    add("--max-minutes", type=number(float, 0, open_low=True), metavar="M", help="the schedule ends here at the latest")
    add("--rank", type=number(int, 1, 4096), default=16, help="of LoRA (default: %(default)s)")
    add("--lr", type=number(float, 0, open_low=True), default=5e-4, help="peak, of LoRA (default: %(default)s)")
    add("--row-lr", type=number(float, 0, open_low=True), default=2e-3, metavar="LR",
        help="peak, of the two control rows (default: %(default)s)")  # fmt: skip
    add("--warmup", type=number(int, 1), default=5, metavar="N", help="updates (default: %(default)s)")
    add("--row-tokens", type=number(int, 16), default=512, metavar="N", help="length of a row (default: %(default)s)")
    add("--update-tokens", type=number(int, 1), default=4096, metavar="N", help="of an update (default: %(default)s)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of the frozen base; what is trained is float32 (default: bfloat16 where it is fast)")  # fmt: skip
    add(
        "--workers",
        type=number(int, 1, MAX_THREADS),
        metavar="N",
        help="rows worked on at a time on a CPU (default: one a core)",
    )
    add("--save-every", type=number(int, 1), default=20, metavar="N", help="updates (default: %(default)s)")
    add("--evaluate-every", type=number(int, 1), default=40, metavar="N", help="updates (default: %(default)s)")
    add("--seed", type=number(int, 0), default=0, help="of the draw (default: %(default)s)")
    add("--trust-remote-code", action="store_true", help="let code from the model's repository run")


def run(args: argparse.Namespace) -> int:
    from medusa_apar.finetune.data import EXAMPLES

    for folder, _ in args.data:
        if not (folder / EXAMPLES).is_file():
            raise FileNotFoundError(f"{folder} holds no {EXAMPLES}: make it with `medusa-apar data`")
    if args.init and not (args.init / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{args.init} holds no adapter_config.json")

    from medusa_apar.finetune.settings import Settings
    from medusa_apar.finetune.train import finetune
    from medusa_apar.job import Job, fast_dtype, quiet

    quiet()
    settings = Settings(
        rank=args.rank,
        lr=args.lr,
        row_lr=args.row_lr,
        warmup=args.warmup,
        epochs=args.epochs,
        row_tokens=args.row_tokens,
        update_tokens=args.update_tokens,
        plain_share=args.plain_share,
        in_line=args.in_line_share,
        mixed=args.mixed_share,
        unlikelihood=args.unlikelihood,
        distil=args.distil,
        total_tokens=args.total_tokens,
        max_minutes=args.max_minutes,
        dtype=fast_dtype() if args.dtype == "auto" else args.dtype,
        seed=args.seed,
    )
    with Job(args.out, "finetune", {key: value for key, value in vars(args).items() if key != "command"}) as job:
        finetune(
            job,
            args.base,
            args.data,
            settings,
            init=args.init,
            control=tuple(args.control_tokens) if args.control_tokens else None,
            workers=args.workers,
            save_every=args.save_every,
            evaluate_every=args.evaluate_every,
            trust_remote_code=args.trust_remote_code,
            skip_bad=args.bad_lines == "skip",
        )
    return 0
