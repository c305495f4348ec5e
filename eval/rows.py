"""What a forward pass costs by its number of rows, alone and with neighbours on the same cores.

  python -m medusa_apar.eval.rows --quantize int8 --neighbours 0 1 3 --out FILE

Rows are a root and draft nodes below 512 slots, three below each; the prefill is of those 512. Sizes take turns, so
that a busy moment harms no single one: of a quiet machine the least time of each counts, of a busy one the median. A
neighbour is a process that computes without end. FILE gets JSON, with machine, versions, commit and date.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from medusa_apar.arguments import MAX_THREADS, number
from medusa_apar.drafting.drafter import Reads
from medusa_apar.job import machine, write_text
from medusa_apar.loading import load
from medusa_apar.runtimes.measure import StepTimer

SLOTS = 512
ROWS = (1, 2, 4, 8, 16, 32, 64)
ENDLESS = "while True: pass"


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that compute beside this one within the block."""
    running = [subprocess.Popen([sys.executable, "-c", ENDLESS]) for _ in range(count)]
    try:
        time.sleep(0.3 * bool(running))  # until they do
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def measure(timer: StepTimer, rows: tuple[int, ...], seconds: float) -> dict[str, dict[str, float]]:
    """By number of rows and "prefill": the least and the median milliseconds within so many seconds, twice at least."""
    found: dict[str, list[float]] = {"prefill": [timer.prefill(), timer.prefill()]}
    timer.fill()
    until, turns = time.perf_counter() + seconds, 0
    while time.perf_counter() < until or turns < 2:
        for count in rows:
            found.setdefault(str(count), []).append(timer.rows(count))
        turns += 1
    return {
        name: {"least_ms": 1e3 * min(times), "median_ms": 1e3 * statistics.median(times)}
        for name, times in found.items()
    }


def table(measured: dict[int, dict[str, dict[str, float]]]) -> str:
    """A line for each number of neighbours: milliseconds of one row, and what more rows cost as multiples of it."""
    first = next(iter(measured.values()))
    names = [name for name in first if name != "prefill"]
    lines = [
        f"| neighbours | one row, ms | {' | '.join(f'{name} rows' for name in names[1:])} | prefill {SLOTS} |",
        "|---" * (len(names) + 2) + "|",
    ]
    for count, found in measured.items():
        key = "median_ms" if count else "least_ms"
        one = found[names[0]][key]
        cells = [f"{found[name][key] / one:.1f}" for name in (*names[1:], "prefill")]
        lines.append(f"| {count} | {one:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("medusa_apar.eval.rows", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="smollm2-135m")
    add("--quantize", choices=["int8"], help="weights rounded to 8 bits")
    add("--dtype", choices=["float32", "bfloat16"], help="of the weights (default: float32)")
    add("--neighbours", type=number(int, 0), nargs="+", default=[0], metavar="N", help="processes beside (default: 0)")
    add("--rows", type=number(int, 1, 256), nargs="+", default=list(ROWS), metavar="N")
    add("--seconds", type=number(float, 0.0), default=8.0, help="for each number of neighbours (default: %(default)s)")
    add("--threads", type=number(int, 1, MAX_THREADS), metavar="N", help="CPU threads for torch")
    add("--out", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.out is not None and not args.out.absolute().parent.is_dir():
        parser.error(f"{args.out.parent} is no folder")
    if args.threads:
        torch.set_num_threads(args.threads)
    apar = load(args.model, quantize=args.quantize, dtype=args.dtype, speculation="off")
    measured: dict[int, dict[str, dict[str, float]]] = {}
    with torch.no_grad(), apar.runtime.session():
        for count in args.neighbours:
            with neighbours(count):
                timer = StepTimer(apar.model, apar.runtime, Reads(), SLOTS)
                measured[count] = measure(timer, tuple(args.rows), args.seconds)
    print(f"{machine()['cpu']}, {apar.runtime.description}")
    print(table(measured))
    if args.out is not None:
        facts: dict[str, Any] = {**machine(), "model": args.model, "runtime": apar.runtime.description}
        write_text(args.out, json.dumps({**facts, "slots": SLOTS, "neighbours": measured}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
