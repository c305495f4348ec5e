"""`bench --quality`: how good answers are, without a judge. Not a subcommand of its own: `bench.py` passes on."""

from __future__ import annotations

import argparse
from functools import cache
from typing import Any

from medusa_apar.arguments import number

BATCH = 16
# What `bench` has and quality has not, with what it is where nobody asks for it.
FOREIGN: dict[str, Any] = {
    "check": False, "profile": False, "kernels": False, "judge": None, "judge_model": None, "judge_against": None,
    "ceilings": None, "budget": None, "heads": "auto",
}  # fmt: skip
OWN = ("base", "batch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quality", action="store_true", help="measure what answers are like instead, see above")
    add = parser.add_argument_group("with --quality").add_argument
    add("--base", metavar="NAME", help="the untuned model (default: --model without its adapter)")
    add("--batch", type=number(int, 1, 1024), metavar="N", help=f"questions answered at once (default: {BATCH})")


def refuse_without(args: argparse.Namespace) -> None:
    """ValueError where an option of --quality is there without it."""
    for name in OWN:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} is for --quality")


def run(args: argparse.Namespace, max_new_tokens: int) -> int:
    """max_new_tokens: where nobody says how many."""
    names = _checked(args)
    from medusa_apar.eval import instructions, prompts, quality
    from medusa_apar.eval.quality_answers import QualityPlan, Question, answer_all, open_answers

    sets = {name: prompts.read(name, args.limit) for name in dict.fromkeys((args.prompts, prompts.INSTRUCTIONS))}
    instructions.validate(prompt for asked in sets.values() for prompt in asked)
    _check_ids(sets)

    import torch

    from medusa_apar.eval import systems
    from medusa_apar.job import Job, quiet, slow
    from medusa_apar.loading import load
    from medusa_apar.models.fingerprint import fingerprint

    quiet()
    if args.threads:
        torch.set_num_threads(args.threads)
    options: dict[str, Any] = {"dtype": args.dtype, "quantize": args.quantize, "runtime": args.runtime}
    options |= {"trust_remote_code": args.trust_remote_code, "heads": None, "speculation": "off"}
    base_name = args.base or args.model
    with slow(f"loading {args.model}"):
        apar = load(args.model, **options)
        base = load(base_name, apar=None, **options)
    make = cache(lambda name: systems.make(name, apar, untuned=base))
    for name in names:
        make(name)  # refuses what cannot be, before anything is written
    left_out = ""
    try:
        sets[args.prompts] = quality.with_references(args.prompts, sets[args.prompts])
    except ConnectionError as error:
        left_out = f"No answers of GPT-4 to compare with: {error}"
    questions = [Question(name, prompt) for name, asked in sets.items() for prompt in asked]
    facts = apar.runtime.facts
    plan = QualityPlan(
        *(args.model, fingerprint(apar.model)[:12], base_name, fingerprint(base.model)[:12]),
        *(str(apar.model.dtype).removeprefix("torch."), f"{facts.backend}, {facts.kind}"),
        prompts.digest([question.prompt for question in questions]),
        *(args.max_new_tokens or max_new_tokens, args.temperature, args.top_p),
    )
    with Job(args.out, "bench", vars(args)) as job:
        if left_out:
            job.say(left_out)
        answers = open_answers(args.out, plan, questions)
        answer_all(job, answers, names, make, questions, plan, args.repeat, args.batch or BATCH)
        job.report(**quality.measure(job, base))
        print((args.out / quality.REPORT).read_text(encoding="utf-8"))
    return 0


def _checked(args: argparse.Namespace) -> list[str]:
    """The systems' names. ValueError, in one sentence and before anything is loaded, for what cannot be asked."""
    from medusa_apar.eval.quality_compare import SYSTEMS
    from medusa_apar.models.sources import locate

    for name, value in FOREIGN.items():
        if getattr(args, name) != value:
            raise ValueError(f"--{name.replace('_', '-')} is not for --quality")
    names = args.systems or list(SYSTEMS)
    for name in names:
        if name not in SYSTEMS:
            raise ValueError(f"system {name!r} is none of {', '.join(SYSTEMS)}, whose answers --quality measures")
    if len(set(names)) < len(names):
        raise ValueError(f"--systems names one twice: {' '.join(names)}")
    if args.top_p < 1 and not args.temperature:
        raise ValueError(f"--top-p {args.top_p:g} needs a --temperature above 0: answers are greedy without one")
    if args.base is None and locate(args.model).adapter is None:
        raise ValueError(
            f"--quality needs the untuned base, and {args.model} is tuned by no adapter: name its base with --base"
        )
    return names


def _check_ids(sets: dict[str, Any]) -> None:
    """ValueError where two sets have an id in common, by which their answers could not be told apart."""
    seen: dict[str, str] = {}
    for name, asked in sets.items():
        for prompt in asked:
            if prompt.id in seen:
                raise ValueError(f"{seen[prompt.id]} and {name} both have a question {prompt.id}: rename one")
            seen[prompt.id] = name
