"""What rounding the weights costs in quality: loss on held-out text, and how many greedy answers stay the same.

python -m medusa_apar.eval.quantisation --corpus corpus_sharegpt.jsonl.gz --prompts vicuna --out eval/results/cpu/int8

Both runs go through the CPU runtime, of the same model in float32 and with int8 weights. The loss is over the answers
of plain dialogues that training never saw, predicted in one pass. Answers are written in one thread without drafts, so
that "the same" is a matter of the weights alone; one token that differs makes the rest of an answer another, so the
share of tokens before the first difference is given beside the share of equal answers. DIR gets report.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from medusa_apar.arguments import number
from medusa_apar.generate import MedusaApar
from medusa_apar.job import Job
from medusa_apar.loading import load
from medusa_apar.models.chat import encode

from . import prompts
from .check import logits_alone
from .questions import held_out, plain_dialogues

SEED = 11  # of the order of held-out examples
KINDS = (None, "int8")


def loss(apar: MedusaApar, dialogues: list[tuple[str, list[int], int]]) -> tuple[float, int]:
    """Sum of the answers' cross-entropies, in nats, and their number of tokens."""
    total, count = 0.0, 0
    for _, ids, prompt_length in dialogues:
        logits = logits_alone(apar.runtime, ids[:-1], prompt_length - 1)
        targets = torch.tensor(ids[prompt_length:])
        total += float(F.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
    return total, count


def answers(apar: MedusaApar, asked: list[prompts.Prompt], limit: int) -> list[list[int]]:
    options: dict[str, Any] = {"max_new_tokens": limit, "do_sample": False, "fork": False}
    found = []
    for prompt in asked:
        inputs = encode(apar.tokenizer, prompt.text)
        found.append(apar.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist())
    return found


def compare(before: list[list[int]], after: list[list[int]]) -> dict[str, float]:
    """Share of answers that are equal, and of the first ones' tokens that come before the first difference."""
    same = [next((i for i, (a, b) in enumerate(zip(x, y, strict=False)) if a != b), min(len(x), len(y)))
            for x, y in zip(before, after, strict=True)]  # fmt: skip
    return {
        "equal_answers": sum(x == y for x, y in zip(before, after, strict=True)) / len(before),
        "tokens_before_a_difference": sum(same) / sum(map(len, before)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2-135m")
    add("--corpus", type=Path, nargs="+", required=True, metavar="FILE", help="its held-out part is read")
    add("--dialogues", type=number(int, 1), default=60, metavar="N", help="default: %(default)s")
    add("--prompts", default="vicuna", metavar="NAME|FILE", help="as in `medusa-apar bench` (default: %(default)s)")
    add("--limit", type=number(int, 1), metavar="N", help="only the first N prompts")
    add("--max-new-tokens", type=number(int, 1), default=256, metavar="N", help="default: %(default)s")
    add("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    asked = prompts.read(args.prompts, args.limit)
    with Job(args.out, "quantisation", vars(args)) as job:
        measured: dict[str, Any] = {}
        written: list[list[list[int]]] = []
        for kind in KINDS:
            options: dict[str, Any] = {"speculation": "off", "runtime": "cpu", "quantize": kind}
            apar = load(args.model, heads=None, dtype="float32", device="cpu", **options)
            dialogues = plain_dialogues(held_out(args.corpus, SEED), args.dialogues, apar.tokenizer)
            total, count = loss(apar, dialogues)
            kind = apar.runtime.facts.kind
            measured[kind] = {"loss": total / count}
            measured["tokens"], measured["dialogues"] = count, len(dialogues)
            job.say(f"{kind}: loss {total / count:.4f} over {count} tokens of {len(dialogues)} answers")
            written.append(answers(apar, asked, args.max_new_tokens))
        change = measured["int8"]["loss"] / measured["float32"]["loss"] - 1
        found = {**measured, "loss_change": change, "prompts": len(asked), **compare(*written)}
        job.report(**found)
        job.say(
            f"int8: loss {change:+.2%}; {found['equal_answers']:.0%} of {len(asked)} answers equal, "
            f"{found['tokens_before_a_difference']:.0%} of the tokens come before a difference"
        )


if __name__ == "__main__":
    main()
