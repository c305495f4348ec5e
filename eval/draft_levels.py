"""What drafting costs, by how deep the draft tree is and for how many threads, beside a step of the base.

  python -m medusa_apar.eval.draft_levels --quantize int8 --heads auto DIR --out FILE

Each kind of heads drafts its likeliest tree of so many nodes, cut at each depth, behind threads of `--path` tokens.
Everything is looked at, which the engine does only where a path is likely enough to pay. Heads, depths and sizes take
turns, so that a busy moment harms no single one: of a quiet machine the least time counts. FILE gets JSON, with
machine, versions, commit and date.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from medusa_apar.arguments import number
from medusa_apar.checks import expected_acceptance
from medusa_apar.drafting.draft_tree import DraftTree
from medusa_apar.drafting.drafter import Reads
from medusa_apar.generate import MedusaApar
from medusa_apar.job import machine, write_text
from medusa_apar.loading import load
from medusa_apar.runtimes.measure import StepTimer, draft

Key = tuple[str, int, int]  # heads; threads; depth of the tree, 0 for a step of so many rows without drafts
Times = dict[Key, Callable[[], float]]


def times_of(apar: MedusaApar, name: str, threads: tuple[int, ...], nodes: int, path: int) -> Times:
    """By key: what takes the time once, in seconds."""
    assert apar.heads is not None
    drafter = apar.runtime.drafter(apar.heads)
    timer = StepTimer(apar.model, apar.runtime, Reads.of(apar.heads, drafter), path)
    timer.fill()
    acceptance = expected_acceptance(apar.heads)
    trees = {depth: DraftTree.likeliest(nodes, acceptance[:depth]) for depth in range(1, len(acceptance) + 1)}
    found: Times = {}
    for count in threads:
        written = timer.written(count)
        found[name, count, 0] = partial(timer.rows, count)
        for depth, tree in trees.items():
            found[name, count, depth] = partial(draft, apar.model, drafter, tree, apar.heads.input_size, written)
    return found


def measure(every: Times, seconds: float) -> dict[Key, dict[str, float]]:
    """The least and the median milliseconds of each within so many seconds, twice at least."""
    found: dict[Key, list[float]] = {key: [] for key in every}
    until, turns = time.perf_counter() + seconds, 0
    while time.perf_counter() < until or turns < 2:
        for key, run in every.items():
            found[key].append(1e3 * run())
        turns += 1
    return {key: {"least_ms": min(times), "median_ms": statistics.median(times)} for key, times in found.items()}


def table(measured: dict[Key, dict[str, float]]) -> str:
    """A line for each kind of heads and number of threads: the least milliseconds."""
    depths = sorted({depth for _, _, depth in measured if depth})
    lines = [
        f"| heads | threads | step without drafts, ms | {' | '.join(f'{depth} levels' for depth in depths)} |",
        "|---" * (3 + len(depths)) + "|",
    ]
    for name, threads in dict.fromkeys((name, threads) for name, threads, _ in measured):
        cells = [measured.get((name, threads, depth)) for depth in (0, *depths)]
        shown = " | ".join("-" if cell is None else f"{cell['least_ms']:.2f}" for cell in cells)
        lines.append(f"| {name} | {threads} | {shown} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "medusa_apar.eval.draft_levels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="smollm2-135m")
    add("--heads", nargs="+", default=["auto"], metavar="NAME|DIR", help="as `load` takes them (default: %(default)s)")
    add("--quantize", choices=["int8"], help="weights rounded to 8 bits")
    add("--dtype", choices=["float32", "bfloat16"], help="of the weights (default: float32)")
    add("--threads", type=number(int, 1), nargs="+", default=[1, 4, 8], metavar="N", help="of answers (default: 1 4 8)")
    add("--nodes", type=number(int, 1), default=24, metavar="N", help="of a thread's tree (default: %(default)s)")
    add("--path", type=number(int, 2), default=256, metavar="N", help="tokens of a thread (default: %(default)s)")
    add("--seconds", type=number(float, 0.0), default=10.0, help="of measuring (default: %(default)s)")
    add("--out", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.out is not None and not args.out.absolute().parent.is_dir():
        parser.error(f"{args.out.parent} is no folder")
    kinds = {}
    for heads in args.heads:
        apar = load(args.model, heads=heads, quantize=args.quantize, dtype=args.dtype)
        if apar.heads is None:
            parser.error(f"{args.model} has no heads {heads}")
        name = apar.heads.kind
        kinds[name if name not in kinds else f"{name} ({heads})"] = apar
    every: Times = {}
    with torch.no_grad():
        for kind, apar in kinds.items():
            with apar.runtime.session():
                every |= times_of(apar, kind, tuple(args.threads), args.nodes, args.path)
        measured = measure(every, args.seconds)
    first = next(iter(kinds.values()))
    print(f"{machine()['cpu']}, {first.runtime.description}")
    print(table(measured))
    if args.out is not None:
        facts: dict[str, Any] = {**machine(), "model": args.model, "runtime": first.runtime.description}
        facts |= {"nodes": args.nodes, "path": args.path}
        rows = [{"heads": key[0], "threads": key[1], "levels": key[2], **its} for key, its in measured.items()]
        write_text(args.out, json.dumps({**facts, "times": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
