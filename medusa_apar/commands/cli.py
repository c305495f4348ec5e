"""The `medusa-apar` command. Its larger subcommands have a file each in `commands/`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any, NoReturn

from rich.console import Console

from medusa_apar import __version__
from medusa_apar.arguments import MAX_THREADS, number
from medusa_apar.reading import out_of_memory
from medusa_apar.threads.fork_policy import FORKS

from . import SUBCOMMANDS, serve

PROGRAM = "medusa-apar"
MAX_PROMPT = 1 << 24  # bytes of standard input
MAX_SENTENCE = 1000  # characters
SPECULATION = ("auto", "forest", "even", "off")

DESCRIPTION = """Answers written by several threads at once, several tokens per thread.

  medusa-apar demo                                            # downloads the default model the first time (93 MB)
  medusa-apar generate "Give me three tips for better sleep."
  medusa-apar COMMAND --help
"""
DEMO = """Shows threads as they write an answer, then times transformers alone on the same prompt.

examples:
  medusa-apar demo
  medusa-apar demo --prompt "Name five rivers and what they are known for." --no-baseline
"""
GENERATE = """Prints the answer to PROMPT as it becomes readable.

On a terminal it also says, on standard error, what runs the model.

examples:
  medusa-apar generate "Give me three tips for better sleep."
  medusa-apar generate - --model my-model --temperature 0.7 < question.txt
"""
CHAT = """Talks with a model, turn after turn, on a terminal in lanes that show its threads as they grow; /help says
what can be typed beside questions. Questions from a pipe are lines, and their answers are printed as plain text.

examples:
  medusa-apar chat
  medusa-apar chat --temperature 0.7 --quantize int8
"""
DOCTOR = """Says what was found on this machine: versions, device, caches and their sizes, kernels. With MODEL also what
would run that model, and why: nothing is generated, but the model is loaded.

examples:
  medusa-apar doctor
  medusa-apar doctor my-model --dtype bfloat16
"""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence, without the usage lines."""
        self.exit(2, f"{PROGRAM}: {_one_line(message)} (see `{self.prog} --help`)\n")


def parser() -> Parser:
    raw: Any = argparse.RawDescriptionHelpFormatter
    root = Parser(prog=PROGRAM, description=DESCRIPTION, formatter_class=raw)
    root.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = root.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    def add_command(name: str, summary: str, description: str | None) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=summary, description=description, formatter_class=raw)

    demo = add_command("demo", "watch threads write an answer, then compare with transformers alone", DEMO)
    demo.add_argument("--prompt", help="the question (default: one whose answer is a list)")
    demo.add_argument("--no-baseline", dest="baseline", action="store_false", help="skip the comparison")

    generate = add_command("generate", "print the answer to PROMPT as it becomes readable", GENERATE)
    generate.add_argument("prompt", metavar="PROMPT", help="the question; - reads it from standard input")
    generate.add_argument("--baseline", action="store_true", help="also time transformers alone, for --json")
    chat = add_command("chat", "talk with a model, and watch its threads", CHAT)

    for command in (demo, generate, chat):
        add = command.add_argument
        add("--model", default="smollm2-135m", help="name, folder, GGUF file or Hub id (default: %(default)s)")
        add("--trust-remote-code", action="store_true", help="let code from the model's repository run")
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
        add(
            "--speculation",
            choices=SPECULATION,
            default="auto",
            help="how tokens are guessed ahead: one budget over all threads (forest), the same tree of the heads' "
            "guesses below each (even), or not at all (off) (default: what suits the model)",
        )
        add("--no-heads", dest="heads", action="store_false", help="leave the model's draft heads out")
        add("--max-threads", type=number(int, 1), metavar="N", help="most threads that run in one step")
        add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, bfloat16 on CUDA")
        add(
            "--quantize",
            choices=("int8",),
            help="round weights and activations for the CPU runtime (not the baseline's)",
        )
        add("--threads", type=number(int, 1, MAX_THREADS), metavar="N", help="CPU threads for torch")
    for command in (demo, generate):
        what = "print one JSON object as the last line (what people read: stderr)"
        command.add_argument("--json", action="store_true", help=what)

    doctor = add_command("doctor", "say what was found: versions, device, caches, kernels, what runs a model", DOCTOR)
    doctor.add_argument("model", nargs="?", metavar="MODEL", help="name, folder, GGUF file or Hub id")
    doctor.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of MODEL, as for generate")
    doctor.add_argument("--trust-remote-code", action="store_true", help="let code from MODEL's repository run")
    doctor.add_argument("--quantize", choices=("int8",), help="of MODEL, as for generate")
    for name, module in SUBCOMMANDS.items():
        module.add_arguments(add_command(name, module.HELP, module.__doc__))
    return root


def main(argv: Sequence[str] | None = None) -> int:
    try:
        _prepare_streams()
        given = list(sys.argv[1:] if argv is None else argv)
        for argument in given:
            _check_text(argument)
        root = parser()
        args, unknown = root.parse_known_args(given)
        if unknown and not serve.takes_flags(args):
            root.error(f"unrecognized arguments: {' '.join(unknown)}")
        args.given, args.engine_flags = given, unknown
        code = COMMANDS[args.command](args) if args.command else run_help()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has read enough
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        sentence = in_a_sentence(error)
        if sentence is None:
            raise
        print(f"{PROGRAM}: {sentence}", file=sys.stderr)
        return 2
    finally:
        try:
            sys.stdout.flush()
        except (AttributeError, OSError):
            _silence_stdout()


def in_a_sentence(error: Exception) -> str | None:
    """What a user is told of an error; None for one that no user can have caused."""
    if out_of_memory(error):
        return "there is not enough memory for that"
    if isinstance(error, RecursionError):
        return "something that was read nests too deeply"
    if isinstance(error, UnicodeDecodeError):
        return _one_line(f"something that was read is no text in UTF-8 ({error})")
    if isinstance(error, OSError) and error.strerror:
        return _one_line(f"{error.strerror}: {error.filename}" if error.filename else error.strerror)
    return _one_line(str(error)) if isinstance(error, (ValueError, OSError, NotImplementedError)) else None


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_SENTENCE else f"{line[:MAX_SENTENCE]} ..."


def _prepare_streams() -> None:
    """ValueError where nothing could be printed. What cannot be encoded is replaced, not an error."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # or the next file that is opened would take the number, and get what libraries print
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        raise ValueError("standard output is closed: send it to a file, or to /dev/null")
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # a notebook's, which takes all characters
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def _silence_stdout() -> None:
    """What is left in the buffer has nowhere to go, of which Python would complain at its end."""
    with suppress(AttributeError, OSError, ValueError):  # a stream without a descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_text(argument: str) -> None:
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = argument.encode("utf-8", "backslashreplace").decode()[:60]
        raise ValueError(f"an argument is no text in UTF-8: {shown}") from error


def run_help() -> int:
    parser().print_help()
    return 0


def run_demo(args: argparse.Namespace) -> int:
    question = None if args.prompt is None else _asked(args.prompt)

    from . import demo

    console = Console(stderr=args.json)
    apar = _load(args)
    ours, plain = demo.demo(apar, question or demo.QUESTION, _options(args), args.baseline, console)
    if args.json:
        print(json.dumps(demo.as_json(apar, ours, plain)), flush=True)
    return 0


def run_generate(args: argparse.Namespace) -> int:
    if args.baseline and not args.json:
        raise ValueError("--baseline needs --json, which is where its numbers go")
    question = _asked(_standard_input() if args.prompt == "-" else args.prompt)

    from medusa_apar.job import slow

    from . import demo

    apar, options = _load(args), _options(args)
    inputs = demo.prompt(apar, question)
    with ExitStack() as waiting:
        doing = "answering" if args.json else "reading"  # without a Printer nothing is seen before all is answered
        waiting.enter_context(slow(f"{doing} the prompt of {inputs['input_ids'].shape[1]} tokens"))
        if args.json:
            demo.warm_up(demo.run_apar, apar, inputs, options)
        streamer = None if args.json else demo.Printer(apar.tokenizer, waiting)
        ours, plain = demo.run_apar(apar, inputs, options, streamer=streamer), None
    if args.baseline:
        with slow("answering with transformers alone"):
            demo.warm_up(demo.run_baseline, apar, inputs, options)
            plain = demo.run_baseline(apar, inputs, options)
    if args.json:
        print(json.dumps(demo.as_json(apar, ours, plain)), flush=True)
    return 0


def run_chat(args: argparse.Namespace) -> int:
    from .chat import Chat, typed

    console = Console()
    apar, options = _load(args), _options(args)
    lines = typed(console) if console.is_terminal and sys.stdin.isatty() else _lines()
    with apar.engine() as engine:
        Chat(apar, engine, console, _sampling(options), args.fork, args.max_new_tokens).run(lines)
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    from .doctor import doctor

    width = None if sys.stdout.isatty() else 1000  # for who searches it, a line a finding
    options = {"dtype": args.dtype, "quantize": args.quantize, "trust_remote_code": args.trust_remote_code}
    doctor(Console(width=width), args.model, **options)
    return 0


def _asked(text: str) -> str:
    """The prompt, refused before anything is loaded where there is none."""
    if not text.strip():
        raise ValueError("the prompt is empty")
    return text


def _standard_input() -> str:
    if sys.stdin is None:
        raise ValueError("standard input is closed, from which - reads the prompt")
    text = sys.stdin.buffer.read(MAX_PROMPT + 1)
    if len(text) > MAX_PROMPT:
        raise ValueError(f"standard input goes on after {MAX_PROMPT >> 20} MiB, which no model reads as a prompt")
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is no text in UTF-8 ({error.reason} at byte {error.start})") from error


def _lines() -> Iterator[str]:
    """Of standard input, as they come."""
    if sys.stdin is None:
        raise ValueError("standard input is closed, from which questions are read")
    while line := sys.stdin.buffer.readline(MAX_PROMPT):
        yield line.decode("utf-8", "replace")


def _load(args: argparse.Namespace) -> Any:
    import torch

    from medusa_apar.job import quiet, slow
    from medusa_apar.loading import load

    quiet()
    if args.threads:
        torch.set_num_threads(args.threads)
    with slow(f"loading {args.model}"):
        return load(
            args.model,
            heads="auto" if args.heads else None,
            dtype=args.dtype,
            max_threads=args.max_threads,
            quantize=args.quantize,
            trust_remote_code=args.trust_remote_code,
            speculation=None if args.speculation == "auto" else args.speculation,
        )


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `generate`, our own and those of transformers."""
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "do_sample": False, "fork": args.fork}
    if args.sample or args.temperature or args.top_p:
        options |= {"do_sample": True, "seed": args.seed}
        options |= {"temperature": args.temperature or 1.0, "top_p": args.top_p or 1.0}
    return options


def _sampling(options: dict[str, Any]) -> Any:
    """The same for a request of an engine."""
    from medusa_apar.requests import Sampling

    return Sampling(**{name: options[name] for name in ("temperature", "top_p", "seed") if name in options})


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": run_demo,
    "generate": run_generate,
    "chat": run_chat,
    "doctor": run_doctor,
} | {name: module.run for name, module in SUBCOMMANDS.items()}
