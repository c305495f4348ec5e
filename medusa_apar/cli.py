"""The `medusa-apar` command. Its larger subcommands have a file each in `commands/`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from rich.console import Console

from .commands import SUBCOMMANDS
from .commands.arguments import number
from .fork_policy import FORKS

PROGRAM = "medusa-apar"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence, without the usage lines."""
        self.exit(2, f"{PROGRAM}: {message} (see `{self.prog} --help`)\n")


def parser() -> Parser:
    root = Parser(prog=PROGRAM, description="Answers written by several threads at once, several tokens per thread.")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")

    demo = commands.add_parser("demo", help="watch threads write an answer, then compare with transformers alone")
    demo.add_argument("--prompt", help="the question (default: one whose answer is a list)")
    demo.add_argument("--no-baseline", dest="baseline", action="store_false", help="skip the comparison")

    generate = commands.add_parser("generate", help="print the answer to PROMPT as it becomes readable")
    generate.add_argument("prompt", metavar="PROMPT", help="the question; - reads it from standard input")
    generate.add_argument("--baseline", action="store_true", help="also time transformers alone, for --json")

    for command in (demo, generate):
        add = command.add_argument
        add("--model", default="smollm2-135m", help="name, folder, GGUF file or Hub id (default: %(default)s)")
        add("--max-new-tokens", type=number(int, 1), default=256, metavar="N", help="limit (default: %(default)s)")
        add("--sample", action="store_true", help="sample instead of taking the likeliest token")
        add("--temperature", type=number(float, 0, open_low=True), metavar="T", help="of sampling; implies --sample")
        add("--top-p", type=number(float, 0, 1, open_low=True), metavar="P", help="of sampling; implies --sample")
        add("--seed", type=number(int, 0), default=0, metavar="N", help="of sampling (default: %(default)s)")
        add(
            "--fork",
            choices=FORKS,
            default="auto",
            help="where the answer splits: where the model forks, nowhere, "
            "or by rule at list items (default: %(default)s)",
        )
        add("--no-fork", dest="fork", action="store_const", const="off", help="one thread, as --fork off")
        add("--no-heads", dest="heads", action="store_false", help="no drafting")
        add("--max-threads", type=number(int, 1), metavar="N", help="most threads that run in one step")
        add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, bfloat16 on CUDA")
        add("--quantize", choices=("int8",), help="round the weights for the CPU runtime (the baseline's stay)")
        add("--threads", type=number(int, 1), metavar="N", help="CPU threads for torch")
        add("--json", action="store_true", help="print one JSON object as the last line (what people read: stderr)")

    commands.add_parser("doctor", help="say what was found: versions, device, caches, kernels")
    for name, module in SUBCOMMANDS.items():
        sub = commands.add_parser(
            name, help=module.HELP, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(sub)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return COMMANDS[args.command](args)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"{PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def run_demo(args: argparse.Namespace) -> int:
    from . import demo

    console = Console(stderr=args.json)
    apar = _load(args)
    ours, plain = demo.demo(apar, args.prompt or demo.QUESTION, _options(args), args.baseline, console)
    if args.json:
        print(json.dumps(demo.as_json(apar, ours, plain)), flush=True)
    return 0


def run_generate(args: argparse.Namespace) -> int:
    from transformers import TextStreamer

    from . import demo

    if args.baseline and not args.json:
        raise ValueError("--baseline needs --json, which is where its numbers go")
    apar, options = _load(args), _options(args)
    inputs = demo.prompt(apar, sys.stdin.read() if args.prompt == "-" else args.prompt)
    if args.json:
        demo.warm_up(demo.run_apar, apar, inputs, options)
    streamer = None if args.json else TextStreamer(apar.tokenizer, skip_prompt=True, skip_special_tokens=True)
    ours, plain = demo.run_apar(apar, inputs, options, streamer=streamer), None
    if args.baseline:
        demo.warm_up(demo.run_baseline, apar, inputs, options)
        plain = demo.run_baseline(apar, inputs, options)
    if args.json:
        print(json.dumps(demo.as_json(apar, ours, plain)), flush=True)
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    from .doctor import doctor

    doctor(Console(soft_wrap=not sys.stdout.isatty()))
    return 0


def _load(args: argparse.Namespace) -> Any:
    import torch
    from transformers.utils import logging

    from .loading import load

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    heads = "auto" if args.heads else None
    return load(args.model, heads=heads, dtype=args.dtype, max_threads=args.max_threads, quantize=args.quantize)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Of `generate`, ours and transformers' alike."""
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "do_sample": False, "fork": args.fork}
    if args.sample or args.temperature or args.top_p:
        options |= {"do_sample": True, "seed": args.seed}
        options |= {"temperature": args.temperature or 1.0, "top_p": args.top_p or 1.0}
    return options


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": run_demo,
    "generate": run_generate,
    "doctor": run_doctor,
} | {name: module.run for name, module in SUBCOMMANDS.items()}
