"""Measures a tuned model and its heads against the goals for shipped weights.

python -m medusa_apar.eval.weights --model smollm2-135m --prompts vicuna=vicuna_bench.jsonl mt=mt_bench.jsonl \\
    --corpus corpus_sharegpt.jsonl.gz --base smollm2-135m --out DIR

Every prompt (first turn) is answered greedily by the tuned model with threads and in a single thread, and by the
untuned base; held-out corpus prompts with threads. Heads never change a token, so their steps are taken from those
answers (`replay.py`): "heads" from the single thread's, "both" from the threads'; --decode runs them instead, which
takes many times as long. How each figure is taken:

tokens per step     visible tokens of an answer over the steps its request was alive, the prompt's own step included.
                    Mean over answers, and `pooled`: all tokens over all steps. Batching does not change it, since a
                    request is in every step of its batch until it is done; draft nodes are the same per thread in
                    any batch, because the budget given is room for all threads there could be.
accepted tokens     tokens a thread gains in a step, the model's own token included.
looping             more than half of an answer's tokens are covered by repeats (`looping_share`). Looping answers are
                    counted, and left out of the means with "no loops".
forks               held-out corpus prompts whose answer here has at least one fork, by what the corpus's answer is.
ends by itself      threads (children) that wrote an end token within 256 tokens. A thread that the limit of the whole
                    answer cut before that says nothing and is left out; since endless threads are cut sooner, "at
                    least" is the share with every cut thread counted as one that would not have ended.
loss                cross-entropy per answer token of held-out plain dialogues, one thread, no control tokens.
repeated 4-grams    share of an answer's 4-grams that it had before, in reading order, mean over answers.

runs.jsonl gets a line per answer, so that a killed run goes on where it stopped. A table is printed, report.json holds
the figures. Steps and tokens are counted, nothing is timed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from medusa_apar.arguments import number
from medusa_apar.attaching import attach
from medusa_apar.checks import expected_acceptance
from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.generate import MedusaApar
from medusa_apar.heads import DraftHeads, load_heads
from medusa_apar.job import Job, write_text
from medusa_apar.json_files import json_object
from medusa_apar.loading import heads_name, load
from medusa_apar.models import head_files
from medusa_apar.models.chat import encode_messages
from medusa_apar.models.fingerprint import fingerprint
from medusa_apar.models.sources import locate
from medusa_apar.threads.control_tokens import ControlTokens

from .answering import answer, answer_loss
from .goals import figures, table
from .questions import CORPUS, Question, corpus_questions, held_out, plain_dialogues, read_questions
from .replay import Drafting, as_answer, replay
from .runs import Runs

SYSTEMS = ("threads", "single", "heads", "both", "base")
OF = {"heads": "single", "both": "threads"}  # whose answers are the same, token for token
MAX_THREADS = 64  # of a request: what the node budget has room for


def run_system(
    job: Job,
    runs: Runs,
    system: str,
    make: Callable[[], MedusaApar],
    questions: list[Question],
    args: argparse.Namespace,
    fork: bool,
    drafted_by: str | None = None,
) -> None:
    """Answers what is not answered yet; `make` is only called where there is something."""
    for question in questions:
        row = runs.rows.get((system, question.set, question.id))
        if row is not None and row["asked"] != question.digest:
            raise ValueError(
                f"{runs.path} answers another question {question.id} of {question.set}: give another --out"
            )
    todo = [question for question in questions if (system, question.set, question.id) not in runs]
    if not todo:
        return
    apar = make()
    encoded = [_prompt_ids(apar, question) for question in todo]
    with job.bar(system, len(questions), len(questions) - len(todo)) as bar:
        for first in range(0, len(todo), args.batch):
            batch = todo[first : first + args.batch]
            records = answer(apar, encoded[first : first + args.batch], args.max_new_tokens, fork)
            tokenizer: Any = apar.tokenizer
            runs.add(
                [
                    {"system": system, "set": question.set, "id": question.id, "kind": question.kind}
                    | {"asked": question.digest}
                    | ({} if drafted_by is None else {"drafted_by": drafted_by})
                    | {"text": tokenizer.decode(record["ids"], skip_special_tokens=True), **record}
                    for question, record in zip(batch, records, strict=True)
                ]
            )
            ratio = sum(len(record["ids"]) for record in records) / sum(record["steps"] for record in records)
            bar.advance(len(batch), f"{ratio:.2f} tokens a step")
            if not job.console.is_terminal:
                job.say(f"{system}: {len(questions) - len(todo) + first + len(batch)}/{len(questions)}, {ratio:.2f}")


def replay_system(
    job: Job,
    runs: Runs,
    system: str,
    heads: DraftHeads,
    drafting: Drafting,
    questions: list[Question],
    args: argparse.Namespace,
    apar: MedusaApar,
    drafted_by: str,
) -> None:
    """Steps of answers that another system has given; what that one has not answered is left out."""
    source = OF[system]
    name = f"{system} {heads.kind}"
    todo = [q for q in questions if (name, q.set, q.id) not in runs and (source, q.set, q.id) in runs]
    control, eos_ids = apar.control_token_ids, _eos_ids(apar)
    with job.bar(name, len(questions), len(questions) - len(todo)) as bar:
        for first in range(0, len(todo), args.batch):
            batch = todo[first : first + args.batch]
            rows = [runs.rows[source, question.set, question.id] for question in batch]
            answers = [
                as_answer(_prompt_ids(apar, question), row["threads"], -1 if control is None else control.child_id)
                for question, row in zip(batch, rows, strict=True)
            ]
            ids = frozenset() if control is None else frozenset({control.fork_id, control.child_id})
            found = replay(heads, answers, drafting, eos_ids, [args.max_new_tokens] * len(batch), ids)
            runs.add(
                [
                    {**row, **asdict(replayed), "system": name, "replayed": source, "drafted_by": drafted_by}
                    for row, replayed in zip(rows, found, strict=True)
                ]
            )
            bar.advance(len(batch))
            if not job.console.is_terminal:
                job.say(f"{name}: {len(questions) - len(todo) + first + len(batch)}/{len(questions)}")


def _prompt_ids(apar: MedusaApar, question: Question) -> list[int]:
    ids: list[int] = encode_messages(apar.tokenizer, question.messages)["input_ids"][0].tolist()
    return ids


def _eos_ids(apar: MedusaApar) -> list[int]:
    eos: Any = apar.model.generation_config.eos_token_id
    return list(eos) if isinstance(eos, list) else [eos]


def run_losses(
    job: Job,
    runs: Runs,
    name: str,
    make: Callable[[], MedusaApar],
    dialogues: list[tuple[str, list[int], int]],
    banned: list[int],
) -> None:
    todo = [dialogue for dialogue in dialogues if (name, CORPUS, dialogue[0]) not in runs]
    if not todo:
        return
    model = make().model
    with job.bar(name, len(dialogues), len(dialogues) - len(todo)) as bar:
        for id, ids, prompt_length in todo:
            raw, without = answer_loss(model, ids, prompt_length, banned)
            row = {"system": name, "set": CORPUS, "id": id, "tokens": len(ids) - prompt_length}
            runs.add([row | {"loss": raw, "loss_without_control": without}])
            bar.advance()


# ---- the command


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="medusa_apar.eval.weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--model", default="smollm2-135m", help="tuned model: name or folder (default: %(default)s)")
    add(
        "--heads", nargs="+", default=["auto"], metavar="DIR", help="of different kinds, or none (default: the model's)"
    )
    add("--base", default="smollm2-135m", help="the untuned model (default: %(default)s without its tuning)")
    add("--prompts", nargs="+", type=named_file, required=True, metavar="NAME=FILE", help="JSONL with `turns`")
    add("--corpus", nargs="+", type=Path, default=[], metavar="FILE", help="chat JSONL: its held-out part is used")
    add("--out", type=Path, required=True, metavar="DIR", help="gets runs.jsonl, log.jsonl and report.json")
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="which answer (default: all)")
    add("--decode", action="store_true", help="run the heads instead of replaying them over given answers")
    add("--candidates", type=number(int, 1), metavar="N",
        help="replay trees of the likeliest --nodes of so many at each root (default: one tree for all)")  # fmt: skip
    add("--nodes", type=number(int, 1), default=24, help="draft nodes of every thread (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="default: %(default)s")
    add("--batch", type=number(int, 1), default=8, help="requests at once (default: %(default)s)")
    add("--max-new-tokens", type=number(int, 1), default=512, metavar="N", help="default: %(default)s")
    add("--corpus-count", type=number(int, 1), default=100, metavar="N", help="corpus prompts per side, and dialogues")
    add("--limit", type=number(int, 1), metavar="N", help="only the first N of every set, for a quick look")
    return made


def named_file(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not name or name == CORPUS:
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=FILE, such as vicuna=vicuna_bench.jsonl")
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{path!r} is no file")
    return name, Path(path)


def check_same_settings(args: argparse.Namespace) -> None:
    """ValueError where the folder's answers were made by another model or with another limit than these.

    Heads are another matter: they change no answer, and what was counted with them says which they were.
    """
    fixed = {name: str(getattr(args, name)) for name in ("model", "base", "dtype", "max_new_tokens")}
    for folder in (locate(args.model).adapter, Path(args.model)):
        if folder is not None and folder.is_dir():
            configs = [folder / name for name in ("adapter_config.json", "apar_config.json")]
            weights = [file for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".bin", ".pt")]
            for file in [*configs, *weights]:
                if file.is_file() and file.name not in head_files.FILES:
                    fixed[str(file)] = f"{file.stat().st_size} bytes of {file.stat().st_mtime_ns}"
    path = args.out / "settings.json"
    if path.exists() and (args.out / "runs.jsonl").exists():
        earlier = json_object(path)
        for name in fixed.keys() | earlier.keys():
            if fixed.get(name) != earlier.get(name):
                raise ValueError(
                    f"{args.out} holds answers made with another {name} ({earlier.get(name)}, now {fixed.get(name)}): "
                    "give another --out"
                )
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(fixed, indent=2) + "\n")


def check_same_heads(runs: Runs, system: str, drafted_by: str, folder: Path) -> None:
    """ValueError where steps of that system were counted with other heads, or other draft trees."""
    for (name, _, _), row in runs.rows.items():
        if name == system and row.get("drafted_by") != drafted_by:
            raise ValueError(
                f"{folder} holds steps of {system} with {row.get('drafted_by')}, now {drafted_by}: give another --out"
            )


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Runs what is missing, writes report.json, returns it."""
    questions = [q for name, path in args.prompts for q in read_questions(name, path)[: args.limit]]
    if missing := [path for path in args.corpus if not path.is_file()]:
        raise FileNotFoundError(f"{missing[0]} does not exist")
    source = locate(args.model)
    for name in args.heads:
        if name not in ("auto", "none"):
            heads_name(name, source)
    if args.candidates is not None and (args.decode or args.candidates < args.nodes):
        raise ValueError(f"--candidates {args.candidates} must be --nodes {args.nodes} at least, and are not decoded")
    check_same_settings(args)
    loaded: dict[str, MedusaApar] = {}

    def tuned() -> MedusaApar:
        if "tuned" not in loaded:
            loaded.clear()
            loaded["tuned"] = load(args.model, heads=None, speculation="off", dtype=args.dtype)
        return loaded["tuned"]

    def base() -> MedusaApar:
        if "base" not in loaded:
            loaded.clear()  # one model in memory at a time
            loaded["base"] = load(args.base, heads=None, speculation="off", apar=None, dtype=args.dtype)
        return loaded["base"]

    with Job(args.out, "eval.weights", vars(args)) as job:
        runs = Runs(args.out / "runs.jsonl")
        control, eos_ids = tuned().control_token_ids, _eos_ids(tuned())
        if control is None and {"threads", "both"} & set(args.systems):
            raise ValueError(f"{args.model} has no control tokens, so there are no threads to measure")
        examples = held_out(args.corpus, seed=0)
        count = args.corpus_count if args.limit is None else min(args.limit, args.corpus_count)
        corpus = corpus_questions(examples, count, tuned().tokenizer)
        dialogues = plain_dialogues(examples, count, tuned().tokenizer)
        banned = [] if control is None else [control.fork_id, control.child_id]
        kinds = run_tuned(job, runs, tuned(), questions, corpus, args)
        run_losses(job, runs, "tuned_loss", tuned, dialogues, banned)
        run_losses(job, runs, "base_loss", base, dialogues, banned)
        if "base" in args.systems:
            run_system(job, runs, "base", base, questions, args, fork=False)
        found = figures(runs, set(eos_ids))
        return job.report(
            command="python -m medusa_apar.eval.weights", heads=kinds, table=table(found).splitlines(), **found
        )


def run_tuned(
    job: Job, runs: Runs, apar: MedusaApar, questions: list[Question], corpus: list[Question], args: argparse.Namespace
) -> list[str]:
    """Everything the tuned model is asked; returns the kinds of its heads."""
    speculating = [name for name in OF if name in args.systems]
    every = heads_of(args, apar) if speculating else []
    needed = {OF[name] for name in speculating} if every and not args.decode else set()
    drafters = {heads.kind: drafted_by(args, heads) for heads in every}
    for name in speculating:
        for kind, by in drafters.items():
            check_same_heads(runs, f"{name} {kind}", by, args.out)
    for name in ("threads", "single"):
        if name in needed.union(args.systems):
            asked = questions + (corpus if name == "threads" else [])
            run_system(job, runs, name, partial(attached, apar, args), asked, args, fork=name == "threads")
    for heads in every:
        by = drafters[heads.kind]
        for name in speculating:
            if args.decode:
                make = partial(attached, apar, args, heads)
                run_system(job, runs, f"{name} {heads.kind}", make, questions, args, fork=name == "both", drafted_by=by)
            else:
                replay_system(job, runs, name, heads, drafting(args, heads), questions, args, apar, by)
    return [heads.kind for heads in every]


def heads_of(args: argparse.Namespace, apar: MedusaApar) -> list[DraftHeads]:
    """What --heads names, on the model; ValueError where two are of one kind, whose figures would fall together."""
    source = locate(args.model)
    folders = [source.heads if name == "auto" else heads_name(name, source) for name in args.heads if name != "none"]
    every = [load_heads(folder, apar.model) for folder in folders if folder is not None]
    kinds = [heads.kind for heads in every]
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"--heads names two of a kind ({', '.join(kinds)}): measure them one after the other")
    return every


def drafted_by(args: argparse.Namespace, heads: DraftHeads) -> str:
    """What steps depend on beside the answers: weights, draft vocabulary and tree, and whether they were replayed."""
    chosen = drafting(args, heads)
    vocabulary = None if heads.token_map is None else heads.token_map.tolist()
    rest = hashlib.sha256(repr((vocabulary, chosen.tree.choices)).encode()).hexdigest()[:8]
    trees = f"{args.nodes} nodes" + (f" of {args.candidates}" if args.candidates else "")
    return f"heads {fingerprint(heads)[:12]}-{rest}, {trees}, {'decoded' if args.decode else 'replayed'}"


def drafting(args: argparse.Namespace, heads: DraftHeads) -> Drafting:
    """The same tree at every root, or the likeliest nodes of a larger one."""
    tree = DraftTree.likeliest(args.candidates or args.nodes, expected_acceptance(heads))
    return Drafting(tree, args.nodes if args.candidates else None)


def attached(apar: MedusaApar, args: argparse.Namespace, heads: DraftHeads | None = None) -> MedusaApar:
    """The tuned model with a budget that leaves room for every thread's root and all of its nodes: nobody's tree
    shrinks because of others in the batch."""
    tree = None if heads is None else drafting(args, heads).tree
    budget = (args.nodes + 1) * args.batch * MAX_THREADS
    control: ControlTokens | None = apar.control_token_ids
    speculation = "off" if heads is None else "even"
    options = {"draft_tree": tree, "budget": budget, "speculation": speculation}
    return attach(apar.model, heads, control, tokenizer=apar.tokenizer, **options)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 2 for what the user got wrong."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    args = parser().parse_args(argv)
    try:
        report = evaluate(args)
    except (ValueError, OSError) as error:
        print(f"medusa_apar.eval.weights: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print("\n".join(report["table"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
