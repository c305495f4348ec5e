"""Host time of a step, and tokens per second, in two checkouts that take turns:

    python -m medusa_apar.eval.host_time --against ../before [--turns 3] [--out FILE]

Host time is what a step takes beside its forward pass and its drafting: plan, forest, verify, commit, count. Batches of
1, 8 and 32 rows are that many threads. Tokens per second are of batches of one: a question, and 16 of Vicuna Bench.
Ratios are medians over turns of ours by theirs in the same turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROWS = (1, 8, 32)
QUESTION = "What are the most effective ways to deal with stress?"


def measure(questions: int, quantize: str | None) -> dict[str, float]:
    """Measures the checkout that Python finds, with nothing but what both have."""
    import torch

    import medusa_apar
    from medusa_apar.eval import prompts

    apar: Any = medusa_apar.load("smollm2-135m", quantize=quantize)

    def ids(text: str) -> list[int]:
        message = [{"role": "user", "content": text}]
        found: list[int] = apar.tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"]
        return found

    def generate(rows: int, text: str, tokens: int, **options: Any) -> tuple[Any, float]:
        inputs = torch.tensor([ids(text)] * rows)
        started = time.perf_counter()
        output = apar.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=tokens,
            do_sample=False,
            return_dict_in_generate=True,
            **options,
        )
        return output.stats, time.perf_counter() - started

    generate(1, QUESTION, 32)
    found = {}
    for rows in ROWS:
        best = float("inf")
        for _ in range(3):
            stats, _ = generate(rows, QUESTION, 96, fork=False)
            host = sum(seconds for name, seconds in stats.phase_seconds.items() if name not in ("forward", "draft"))
            best = min(best, 1e3 * host / stats.steps)
        found[f"host ms a step, {rows} threads"] = best
    stats, seconds = min((generate(1, QUESTION, 256) for _ in range(3)), key=lambda pair: pair[1])
    found["tokens/s, one question"] = stats.generated_tokens / seconds
    if questions:
        texts = [prompt.text for prompt in prompts.read("vicuna", questions)]
        answered = [generate(1, text, 256) for text in texts]
        tokens = sum(stats.generated_tokens for stats, _ in answered)
        found[f"tokens/s, {questions} Vicuna questions"] = tokens / sum(seconds for _, seconds in answered)
    return found


def run(checkout: Path, questions: int, quantize: str | None) -> dict[str, float]:
    """`measure` in a process of its own, of a checkout's code."""
    # -P: this folder has modules that are named like Python's own.
    command = [sys.executable, "-P", str(Path(__file__).resolve()), "--measure", "--questions", str(questions)]
    command += [] if quantize is None else ["--quantize", quantize]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    made = subprocess.run(command, env=environment, cwd=checkout, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(made.stdout.splitlines()[-1])
    return figures


def compare(ours: Path, theirs: Path, turns: int, questions: int, quantize: str | None) -> dict[str, Any]:
    turned = []
    for turn in range(turns):
        order = (ours, theirs) if turn % 2 == 0 else (theirs, ours)
        pair = {checkout: run(checkout, questions, quantize) for checkout in order}
        turned.append((pair[ours], pair[theirs]))
    found = {}
    for name in turned[0][0]:
        ratios = [mine[name] / other[name] for mine, other in turned]
        middle = [statistics.median(side[name] for side in sides) for sides in zip(*turned, strict=True)]
        found[name] = {"ours": middle[0], "theirs": middle[1], "ratio": statistics.median(ratios), "ratios": ratios}
        print(f"{name:32} {middle[0]:8.3f} {middle[1]:8.3f}  {found[name]['ratio']:.3f}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("medusa_apar.eval.host_time", description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="the other checkout")
    parser.add_argument("--turns", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--questions", type=int, default=16, help="of Vicuna Bench (default: %(default)s)")
    parser.add_argument("--quantize", choices=["int8"], help="weights in 8 bits")
    parser.add_argument("--out", type=Path, help="where the figures go as JSON")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.measure:
        print(json.dumps(measure(args.questions, args.quantize)))
        return
    if args.against is None or not (args.against / "setup.py").exists():
        parser.error("--against is to be a checkout of this project")
    from medusa_apar.job import machine, write_text

    here = Path(__file__).resolve().parents[1]
    print(json.dumps(machine()))
    print(f"{'':32} {'ours':>8} {'theirs':>8}  ratio")
    found = compare(here, args.against.resolve(), args.turns, args.questions, args.quantize)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        revision = ["git", "-C", str(args.against), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(revision, capture_output=True, text=True).stdout.strip()
        content = {"machine": machine(), "against": commit, "quantize": args.quantize, "found": found}
        write_text(args.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
