"""Train heads that guess several tokens ahead, on a chat model's own answers.

The model answers --prompts with our engine, threads included, and the heads learn to match its own distribution at
each place of these answers. --copy adds answers of corpora, cut into threads by rule: the model reads them once, and
its distribution over them is the target; that gives twenty times the tokens an hour. --answers takes records made
elsewhere, as this command keeps them in DIR/answers.jsonl.

DIR gets the heads (`medusa_apar.load(MODEL, heads=DIR)`), answers.jsonl and what they were made with (asked.json),
log.jsonl, report.json with held-out loss and accuracy of each head, and train/ with a checkpoint and hidden states (2
kB a token at a hidden size of 1024). The same command started again goes on where it stopped, to the same result.
Delete train/ when all is done.

  medusa-apar train-heads --model tuned/adapter --prompts chats.jsonl --out heads
  medusa-apar train-heads --model tuned/adapter --answers a.jsonl --copy corpus.jsonl.gz --kind hydra --out hydra
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa_apar.arguments import MAX_THREADS, add_bad_lines, check_files, number, out_folder
from medusa_apar.reading import MAX_HEADS, MAX_LAYERS

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from medusa_apar.finetune.corpus import Drops
    from medusa_apar.generate import MedusaApar
    from medusa_apar.heads.answers import AnswerFile
    from medusa_apar.job import Job

HELP = "train Medusa or Hydra heads or an EAGLE-3 drafter on a model's own answers"


DRAFT_VOCAB = 8192
# Options that only some kinds of heads know, and what they are where nobody gives them.
OF_HEADS = {"num_heads": 4, "num_layers": 1, "aux_layers": [], "start": "auto", "hard": 0.0, "temperature": 1.0}
OF_DRAFTERS: dict[str, Any] = {"boundaries": []}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    positive = number(float, 0, open_low=True)
    count = number(int, 1)
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="name, folder (an adapter, too) or Hub id (default: %(default)s)")
    add("--trust-remote-code", action="store_true", help="let code from the model's repository run")
    add("--out", type=out_folder, required=True, metavar="DIR", help="where heads, log and report go")

    data = parser.add_argument_group("data, at least one of the first three")
    add = data.add_argument
    add("--prompts", type=Path, nargs="+", default=[], metavar="FILE",
        help="chats as `data` reads them, whose last questions the model answers first")  # fmt: skip
    add("--answers", type=Path, nargs="+", default=[], metavar="FILE", help="answer records (JSONL) already made")
    add("--copy", type=Path, nargs="+", default=[], metavar="FILE", help="chat JSONL whose own answers are taken")
    add("--count", type=count, metavar="N", help="prompts to answer (default: all)")
    add("--copy-count", type=count, metavar="N", help="corpus answers to take, drawn at random (default: all)")
    add("--answer-minutes", type=positive, metavar="M",
        help="stop answering after so long (default: no limit)")  # fmt: skip
    add("--max-prompt", type=count, default=200, metavar="N",
        help="tokens; longer prompts are left out (default: %(default)s)")  # fmt: skip
    add("--max-new-tokens", type=count, default=320, metavar="N", help="of an answer (default: %(default)s)")
    add("--max-copied", type=count, default=600, metavar="N",
        help="tokens of a prompt and its copied answer; longer ones are left out (default: %(default)s)")  # fmt: skip
    add("--answer-batch", type=count, default=16, metavar="N", help="prompts answered at a time (default: %(default)s)")
    add("--quantize", choices=("int8",),
        help="round weights and activations of the model while it answers --prompts: faster, and nearly the same text"
        " (heads learn from its unrounded states)")  # fmt: skip
    add_bad_lines(data)

    heads = parser.add_argument_group("heads")
    add = heads.add_argument
    add("--kind", choices=("medusa", "hydra", "eagle3"), default="medusa",
        help="independent heads, heads that see the tokens drafted before them, or a decoder layer that attends to all"
        " that was written (default: %(default)s)")  # fmt: skip
    add(
        "--num-heads",
        type=number(int, 1, MAX_HEADS),
        default=OF_HEADS["num_heads"],
        metavar="N",
        help="tokens guessed ahead (default: %(default)s)",
    )
    add(
        "--num-layers",
        type=number(int, 1, MAX_LAYERS),
        default=OF_HEADS["num_layers"],
        metavar="N",
        help="residual blocks of a head (default: %(default)s)",
    )
    add("--draft-vocab", type=number(int, 0), metavar="N",
        help="ids that heads can propose, the answers' most frequent; 0: all (default: "
        f"{DRAFT_VOCAB}, or those of --init)")  # fmt: skip
    add("--aux-layers", type=number(int, 0), nargs="*", default=[], metavar="LAYER",
        help="base layers (from 0) whose outputs the heads read beside the last one's")  # fmt: skip
    add("--boundaries", type=number(int, 1), nargs="*", default=[], metavar="B",
        help="of the base, whose states an EAGLE-3 drafter fuses: B is what the first B layers put out (default: 2, the"
        " middle and all layers)")  # fmt: skip
    add("--init", metavar="HEADS", help="go on from these heads, whose kind and sizes then hold")

    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--start", choices=("auto", "ridge", "zero"), default="auto",
        help="how the input layer of Hydra heads and of heads with aux layers starts: as a ridge regression, or at the"
        " base's own next token (default: ridge)")  # fmt: skip
    add("--epochs", type=positive, default=4.0, help="passes over the data (default: %(default)s)")
    add("--max-minutes", type=positive, default=60.0, metavar="M",
        help="of encoding, half of it at most, and training; earlier runs count (default: %(default)s)")  # fmt: skip
    add("--lr", type=positive, help="peak learning rate (default: 5e-3 for Medusa, 5e-4 else)")
    add("--batch", type=count, default=2048, metavar="N", help="positions of an update (default: %(default)s)")
    add("--hard", type=number(float, 0, 1), default=0.0, metavar="W",
        help="weight of the written token in the target (default: %(default)s)")  # fmt: skip
    add("--temperature", type=positive, default=1.0, metavar="T",
        help="of the target distribution; below 1 nearer to greedy decoding (default: %(default)s)")  # fmt: skip
    add("--eval-every", type=count, default=100, metavar="N", help="updates between checkpoints (default: %(default)s)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of the base and of products; heads stay float32 (default: bfloat16 where it is fast)")  # fmt: skip
    add("--device", help="default: CUDA where there is one")
    add(
        "--threads",
        type=number(int, 1, MAX_THREADS),
        metavar="N",
        help="CPU cores to use (default: all that this process may)",
    )
    add("--seed", type=number(int, 0), default=0, help="of every order and draw (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    if not (args.prompts or args.answers or args.copy):
        raise ValueError("there is nothing to learn from: give --prompts, --answers or --copy")
    check_files([*args.prompts, *args.answers, *args.copy])
    _check_kind(args)
    if args.quantize and not args.prompts:
        raise ValueError("--quantize is of the model that answers --prompts, and there are none")
    if args.start == "ridge" and args.kind == "medusa" and not args.aux_layers:
        raise ValueError("--start ridge needs an input layer: --kind hydra, or --aux-layers")
    if args.init and not Path(args.init).exists():
        raise FileNotFoundError(f"--init {args.init} does not exist")

    import torch

    from medusa_apar.finetune.corpus import Drops
    from medusa_apar.heads.answers import AnswerFile
    from medusa_apar.heads.ask import read_prompts
    from medusa_apar.heads.eagle3 import train as eagle3
    from medusa_apar.heads.train import check_out, train
    from medusa_apar.job import Job, cores, fast_dtype, quiet, slow
    from medusa_apar.loading import load
    from medusa_apar.models.families import unembedding_size

    quiet()
    if args.kind == "eagle3":
        eagle3.check_torch()
    launched = _launched(args)
    threads = args.threads or max(cores() // launched.num_processes, 1)
    torch.set_num_threads(threads)
    check_out(args.out)
    drops = Drops(skip_bad=args.bad_lines == "skip")
    with slow("reading answers, prompts and corpora"):
        given = AnswerFile.read(*args.answers, drops=drops)
        prompts = read_prompts(args.prompts, drops) if args.prompts else []
        examples = _examples(args, drops)
    alone = "cuda" if torch.cuda.is_available() else "cpu"
    usual = alone if launched.num_processes == 1 else str(launched.device)
    device = _device(usual if args.device is None else args.device)
    settings = _settings(args, threads)
    dtype = fast_dtype(device.type) if args.dtype == "auto" else args.dtype
    # Without guesses: what a thread writes beyond an answer's end is kept, and they would change how much.
    options = {"speculation": "off", "dtype": dtype, "trust_remote_code": args.trust_remote_code}
    with slow(f"loading {args.model}"):
        apar = load(args.model, heads=None, device=device, **options)
    given.check_ids(unembedding_size(apar.model)[0])
    with Job(args.out, "train-heads", vars(args), launched.is_main_process) as job:
        file = _records(apar, args, prompts, given.records, examples, drops, job)
        torch.set_num_threads(1 if threads > 1 else threads)  # workers are single-threaded and side by side
        if isinstance(settings, eagle3.Settings):
            eagle3.train(apar.model, file, args.out, settings, job)
        else:
            train(apar.model, file, args.out, settings, job)
        job.say(f"heads are in {args.out}")
    return 0


def _check_kind(args: argparse.Namespace) -> None:
    """ValueError for an option that the kind of heads would ignore."""
    foreign = OF_HEADS if args.kind == "eagle3" else OF_DRAFTERS
    if args.kind == "eagle3" and args.init:
        foreign = foreign | OF_DRAFTERS
    for name, usual in foreign.items():
        if getattr(args, name) != usual:
            why = "with --init" if name in OF_DRAFTERS and args.init else f"with --kind {args.kind}"
            raise ValueError(f"--{name.replace('_', '-')} means nothing {why}")


def _settings(args: argparse.Namespace, threads: int) -> Any:
    """The settings that the kind's own trainer takes."""
    from medusa_apar.heads.eagle3 import train as eagle3
    from medusa_apar.heads.train import Settings

    shared = {name: getattr(args, name) for name in ("draft_vocab", "init", "max_minutes", "epochs", "lr", "seed")}
    if args.draft_vocab is None and not args.init:
        shared["draft_vocab"] = DRAFT_VOCAB
    shared |= {"batch": args.batch, "eval_every": args.eval_every, "threads": threads}
    if args.kind == "eagle3":
        return eagle3.Settings(boundaries=tuple(args.boundaries), **shared)
    return Settings(
        kind=args.kind,
        num_heads=args.num_heads,
        num_layers=args.num_layers,
        aux_layers=tuple(args.aux_layers),
        start=args.start,
        hard=args.hard,
        temperature=args.temperature,
        **shared,
    )


def _launched(args: argparse.Namespace) -> Accelerator:
    """This process's part in a launch. ValueError where several could not share the work."""
    from medusa_apar.job import launched

    found = launched(args.out)
    if found.num_processes > 1 and args.kind != "eagle3":
        raise ValueError(f"several processes train --kind eagle3 together, and no --kind {args.kind}")
    if found.num_processes > 1 and args.prompts:
        raise ValueError(
            "several processes cannot answer --prompts: give --answers, which `train-heads` has kept, or --copy"
        )
    if found.num_processes > 1 and args.device is not None:
        raise ValueError("several processes have a device each: leave out --device")
    return found


def _device(name: str) -> torch.device:
    """ValueError for one that is not there."""
    import torch

    try:
        return torch.empty(0, device=torch.device(name)).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"--device {name} is none that torch can use here ({why})") from error


def _examples(args: argparse.Namespace, drops: Drops) -> list[Any]:
    import random

    from medusa_apar.finetune.corpus import read_examples

    examples = list(read_examples(args.copy, drops)) if args.copy else []
    random.Random(args.seed).shuffle(examples)
    return examples


def _answering(apar: MedusaApar, args: argparse.Namespace) -> MedusaApar:
    """What answers the prompts: the model that is trained on, or with --quantize the same one rounded."""
    from medusa_apar.attaching import attach

    if args.quantize is None:
        return apar
    options: dict[str, Any] = {"speculation": "off", "max_depth": apar.max_depth, "quantize": args.quantize}
    return attach(apar.model, apar=apar.control_token_ids, tokenizer=apar.tokenizer, **options)


def _records(
    apar: MedusaApar,
    args: argparse.Namespace,
    prompts: list,
    given: list[dict],
    examples: list,
    drops: Drops,
    job: Job,
) -> AnswerFile:
    """All records to learn from: the model's own answers, those given, then the corpora's."""
    from itertools import islice

    from medusa_apar.heads.answers import AnswerFile, loops
    from medusa_apar.heads.ask import ANSWERS, Limits, ask, copied_records, fitting_prompts, keep_settings
    from medusa_apar.models.families import unembedding_size
    from medusa_apar.models.fingerprint import fingerprint

    copied: list[dict] = []
    if examples:
        with job.bar("copying corpus answers", args.copy_count or len(examples)) as bar:
            for record in islice(copied_records(apar, examples, args.max_copied, drops), args.copy_count):
                copied.append(record)
                bar.advance()
    own: list[dict] = []
    too_long = 0
    if prompts:
        minutes = float("inf") if args.answer_minutes is None else args.answer_minutes
        limits = Limits(args.count, args.max_prompt, args.max_new_tokens, args.answer_batch, minutes, args.seed)
        fitting, too_long = fitting_prompts(apar.tokenizer, prompts, limits, job, drops)
        names = ("prompts", "max_prompt", "max_new_tokens", "seed", "quantize")
        settings = {name: str(getattr(args, name)) for name in names}
        keep_settings(args.out, settings | {"model_fingerprint": fingerprint(apar.model)[:16]})
        path = args.out / ANSWERS
        # Once training has begun its answers are settled, even if --answer-minutes cut them short.
        if not ((args.out / "train" / "state.pt").exists() and path.exists()):
            ask(_answering(apar, args), fitting, path, limits, job)
        answered = AnswerFile.read(path)
        answered.check_ids(unembedding_size(apar.model)[0])
        own = answered.records

    sound = [record for record in own + given if not loops(record)]
    looping = len(own) + len(given) - len(sound)
    counts = {"answered": len(own), "given": len(given), "copied": len(copied), "looping": looping}
    job.log("records", **counts, too_long=too_long, left_out=drops.as_report())
    if drops.counts:
        job.say(f"left out: {drops}")
    job.say(f"{len(sound)} answers ({looping} more loop and are left out) and {len(copied)} corpus answers")
    if not sound and not copied:
        raise ValueError("there is nothing to learn from: every answer is empty, too long or loops")
    max_depth = None if apar.control_token_ids is None else apar.max_depth
    return AnswerFile(sound + copied, own=len(sound) if copied and sound else None, max_depth=max_depth)
