"""Measures how often each draft head's guesses are what the model itself chooses, and chooses the draft tree by it.

The model answers the prompts greedily with our own engine, threads included (or give its answers with --answers).
Answers that loop are left out. Over the others is counted, for each head and rank, how often the guess is the model's
choice where all earlier tokens of the path are right; how far the heads' probabilities can be trusted; and how many
tokens a step yields with 1 to --nodes draft nodes, the tree chosen on one half of the answers and measured on the
other.

    medusa-apar calibrate --model out/adapter --heads out/heads --prompts chats.jsonl.gz --out out/calibration --write

--out gets answers.jsonl (kept: started again, it goes on from there), report.json and calibration.png. With --write,
the acceptance table goes into the heads' config.json, from where every later `attach` and `load` takes its draft tree.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa_apar.arguments import add_bad_lines, check_files, number, out_folder

if TYPE_CHECKING:
    from medusa_apar.generate import MedusaApar
    from medusa_apar.heads.answers import AnswerFile
    from medusa_apar.heads.ask import Limits, Prompt
    from medusa_apar.job import Job

HELP = "measure the heads' acceptance and choose the draft tree"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="smollm2-135m", metavar="NAME|DIR", help="the tuned model (default: %(default)s)")
    add("--heads", type=Path, metavar="DIR", help="folder of the heads (default: those that come with the model)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompts", type=Path, nargs="+", metavar="FILE", help="chats as `data` reads them, to be answered"
    )
    source.add_argument("--answers", type=Path, nargs="+", metavar="FILE", help="answers of the model (JSONL)")
    add("--out", type=out_folder, required=True, metavar="DIR", help="folder for the answers, the report and the plot")
    add_bad_lines(parser)
    add("--write", action="store_true", help="put the table into the heads' config.json")
    add("--count", type=number(int, 1), default=200, metavar="N", help="prompts or answers (default: %(default)s)")
    add("--max-new-tokens", type=number(int, 1), default=320, metavar="N", help="of an answer (default: %(default)s)")
    add("--batch", type=number(int, 1), default=16, metavar="N", help="prompts at once (default: %(default)s)")
    add("--top-k", type=number(int, 1, 1024), default=10, metavar="N", help="guesses per head (default: %(default)s)")
    add(
        "--nodes",
        type=number(int, 1, 1024),
        default=64,
        metavar="N",
        help="largest tree looked at (default: %(default)s)",
    )
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, bfloat16 on CUDA")
    add("--seed", type=number(int, 0), default=0, metavar="N", help="of the prompts' order (default: %(default)s)")
    add("--trust-remote-code", action="store_true", help="let code from the model's repository run")


def run(args: argparse.Namespace) -> int:
    from medusa_apar.finetune.corpus import Drops
    from medusa_apar.heads import calibrate, checkpoints
    from medusa_apar.heads.answers import loops
    from medusa_apar.heads.ask import ANSWERS, Limits, check_same_answers, fitting_prompts, keep_settings, read_prompts
    from medusa_apar.heads.calibration_plot import plot
    from medusa_apar.job import Job, quiet, slow
    from medusa_apar.loading import load
    from medusa_apar.models.families import end_tokens, unembedding_size
    from medusa_apar.models.fingerprint import fingerprint
    from medusa_apar.models.sources import locate

    check_files(args.prompts or args.answers)
    if args.heads is not None and not args.heads.exists():
        raise FileNotFoundError(f"--heads {args.heads} does not exist")
    folder = args.heads or locate(args.model).heads
    if folder is None:
        raise ValueError(f"{args.model} comes with no heads: give their folder with --heads")
    if args.write and not folder.is_dir():
        raise ValueError(f"--write needs heads in a folder of this machine, and {folder} is none")
    # A model's folder may keep its heads in medusa/, with a config.json of their own.
    home = checkpoints.find(folder)[0].parent if args.write else folder
    settings = {name: str(getattr(args, name)) for name in ("model", "prompts", "max_new_tokens", "dtype", "seed")}
    drops = Drops(skip_bad=args.bad_lines == "skip")
    if args.prompts:
        with slow("reading the prompts"):
            prompts = read_prompts(args.prompts, drops)
        check_same_answers(args.out, settings)
    else:
        read = calibrate.AnswerFile.read(*args.answers, drops=drops)
        if not read.records:
            raise ValueError(f"{args.answers[0]} holds no answers")
    quiet()
    with slow(f"loading {args.model}"):
        apar = load(args.model, heads=folder, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    heads = apar.heads
    assert heads is not None
    with Job(args.out, "calibrate", vars(args)) as job:
        if args.prompts:
            limits = Limits(args.count, max_new_tokens=args.max_new_tokens, batch=args.batch, seed=args.seed)
            fitting, too_long = fitting_prompts(apar.tokenizer, prompts, limits, job, drops)
            if not fitting:
                raise ValueError(f"{args.prompts[0]} holds no prompt of at most {limits.max_prompt} tokens")
            keep_settings(args.out, settings | {"model_fingerprint": fingerprint(apar.model)[:16]})
            read = _asked(job, apar, fitting, args.out / ANSWERS, limits)
            job.log("asked", too_long=too_long)
        if drops.counts:
            job.say(f"left out: {drops}")
        read.check_ids(unembedding_size(apar.model)[0])
        answers = read.records[: args.count]
        sound = [record for record in answers if not loops(record)]
        job.say(f"{len(sound)} answers ({len(answers) - len(sound)} more loop and are left out)")
        if not sound:
            raise ValueError("there is nothing to measure: every answer loops")
        max_depth = None if apar.control_token_ids is None else apar.max_depth
        file = calibrate.AnswerFile(sound, max_depth=max_depth)
        top_k = min(args.top_k, heads.draft_vocab_size)
        eos_ids = end_tokens(apar.model.generation_config)
        with job.bar("measuring", len(file.records)) as bar:
            ranks, reliability, own = calibrate.measure(apar.model, heads, file, eos_ids, top_k, bar.advance)
        if own < 0.9:
            job.say(f"Only {own:.0%} of the answers' tokens are what this model would write: are they its own?")
        found = calibrate.report(ranks, reliability, args.nodes)
        about = {"kind": heads.kind, "num_heads": heads.num_heads, "draft_vocabulary": heads.draft_vocab_size}
        job.report(heads=about, own_tokens=own, looping=len(answers) - len(sound), left_out=drops.as_report(), **found)
        try:
            plot(found, args.out / "calibration.png", f"{args.model}: {heads.kind} heads")
        except ImportError:
            job.say("No calibration.png: it needs matplotlib (pip install 'medusa-apar[eval]').")
        if args.write:
            calibrate.write_acceptance(home, found["acceptance"])
        _show(found)
        if args.write:
            print(f"written to {home / 'config.json'}")
    return 0


def _asked(job: Job, apar: MedusaApar, prompts: list[Prompt], path: Path, limits: Limits) -> AnswerFile:
    """The model's answers to the prompts, those of an earlier run among them."""
    from medusa_apar.heads.answers import AnswerFile
    from medusa_apar.heads.ask import ask

    bare = apar.without_heads()
    ask(bare, prompts, path, limits, job)
    return AnswerFile.read(path)


def _show(found: dict[str, Any]) -> None:
    """The table and the trees, for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    shares = Table(title="share accepted where the path so far is right", title_style="dim")
    shares.add_column("head")
    ranks = min(6, len(found["acceptance"][0]))
    for rank in range(ranks):
        shares.add_column(f"rank {rank + 1}", justify="right")
    shares.add_column("positions", justify="right")
    for head, row in enumerate(found["acceptance"]):
        cells = [f"{share:.3f}" for share in row[:ranks]]
        shares.add_row(str(head + 1), *cells, str(found["acceptance_positions"][head]))
    console.print(shares)
    tokens = found["tokens"]
    trees = Table(title="tokens per thread and step", title_style="dim")
    for name in ("nodes", "expected", "measured", "step by step", "joint tree, step by step"):
        trees.add_column(name, justify="right")
    for nodes in (1, 2, 4, 8, 12, 16, 24, 32, 48, 64):
        if nodes <= len(tokens["expected"]):
            rows = [tokens[name] for name in ("expected", "measured", "simulated", "joint_simulated")]
            trees.add_row(str(nodes), *(f"{row[min(nodes, len(row)) - 1]:.2f}" for row in rows))
    console.print(trees)
