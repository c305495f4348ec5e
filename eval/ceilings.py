"""What this machine's cores can read and multiply at most:  python -m medusa_apar.eval.ceilings FILE

Reading: torch adds up a buffer of floats four times as large as the last cache, and multiplies it with a vector; the
faster of the two, best of several passes, on as many threads as torch has. Products: this project's own, of a matrix
of 2 MiB (`PackedMatrix`, which a core's caches hold), at several rows; the time of a call with one panel of outputs is
taken off, so that what is left is products and no call. FILE gets both as JSON, with machine, versions, commit and
date; `medusa-apar bench --ceilings FILE` reads it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from medusa_apar.arguments import MAX_THREADS, number
from medusa_apar.job import machine, write_text
from medusa_apar.json_files import json_object
from medusa_apar.runtimes.cpu import library
from medusa_apar.runtimes.cpu.weights import KINDS, PANEL, PackedMatrix

from .roofline import BYTES

FILE = "ceilings.json"
BUSY = 20.0  # per cent of the machine that others may use before it is said
ROWS = (1, 8, 32, 64)
MATRIX, INPUTS = 1 << 21, 1024  # bytes and inputs of the matrix
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNKNOWN_CACHE = 64 << 20  # bytes, where the system does not say
LEAST_BUFFER = 1 << 28  # bytes
MEMORY_SHARE = 0.25  # of what is free that the buffer may take
READING_SECONDS, PRODUCT_SECONDS = 1.0, 0.15  # for which each is repeated
COLUMNS = 8192  # of the buffer as a matrix


@dataclass(frozen=True, slots=True)
class Ceilings:
    """gb_per_second: sustained, from memory. gmac_per_second: by kind of weights and number of rows, from the cache."""

    gb_per_second: float
    gmac_per_second: dict[str, dict[int, float]]

    def products(self, kind: str, rows: float) -> float:
        """GMAC/s at so many rows, between two measured numbers in proportion."""
        measured = self.gmac_per_second[kind]
        return float(np.interp(rows, list(measured), list(measured.values())))


def others_share() -> float:
    """Per cent of all cores that are busy while this process only waits, over half a second."""
    return psutil.cpu_percent(interval=0.5)


def measure(kinds: Iterable[str] = KINDS) -> Ceilings:
    """A few seconds. RuntimeError, in a sentence, where the compiled code cannot be had."""
    library.library()
    return Ceilings(reading(), {kind: products(kind) for kind in kinds})


def cache_bytes() -> int:
    """Of the largest cache that a core has or shares."""
    sizes = [path.read_text().strip() for path in CACHES.glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=UNKNOWN_CACHE)


def buffer_bytes() -> int:
    wanted = max(4 * cache_bytes(), LEAST_BUFFER)
    return min(wanted, int(MEMORY_SHARE * psutil.virtual_memory().available))


@torch.inference_mode()
def reading() -> float:
    """GB/s."""
    matrix = torch.ones(buffer_bytes() // (4 * COLUMNS), COLUMNS, dtype=torch.float32, device="cpu")
    vector = torch.ones(COLUMNS, dtype=torch.float32, device="cpu")
    readers: tuple[Callable[[], Any], ...] = (matrix.sum, partial(torch.mv, matrix, vector))
    return matrix.nbytes / 1e9 / min(best(readers, READING_SECONDS))


@torch.inference_mode()
def products(kind: str) -> dict[int, float]:
    """GMAC/s by rows."""
    outputs = MATRIX // (INPUTS * BYTES[kind])
    matrix, panel = (PackedMatrix(torch.randn(count, INPUTS, device="cpu"), kind) for count in (outputs, PANEL))
    found = {}
    for rows in ROWS:
        x = torch.randn(rows, INPUTS, device="cpu")
        whole, call = best((partial(matrix, x), partial(panel, x)), PRODUCT_SECONDS)
        seconds = max(whole - call, whole / 4)  # a call is never most of it: there, something else ran
        found[rows] = rows * INPUTS * (outputs - PANEL) / 1e9 / seconds
    return found


def best(runs: Sequence[Callable[[], Any]], long: float) -> list[float]:
    """Least seconds of each, by turns for `long` seconds, so that a busy moment harms no single one; the first turn
    warms up."""
    least = [math.inf] * len(runs)
    started, turns = time.perf_counter(), 0
    while turns < 3 or time.perf_counter() - started < long:
        for place, run in enumerate(runs):
            begun = time.perf_counter()
            run()
            if turns:
                least[place] = min(least[place], time.perf_counter() - begun)
        turns += 1
    return least


def write(path: Path, ceilings: Ceilings) -> None:
    write_text(path, json.dumps({**machine(), **asdict(ceilings)}, indent=2) + "\n")


def read(path: Path) -> Ceilings:
    """ValueError where the file is none of ours, or of another machine or number of threads than this process has."""
    found = json_object(path)
    try:
        products = {
            kind: {int(rows): float(value) for rows, value in by_rows.items()}
            for kind, by_rows in found["gmac_per_second"].items()
        }
        ceilings, cpu = Ceilings(float(found["gb_per_second"]), products), found["cpu"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no file of `python -m medusa_apar.eval.ceilings` ({error!r})") from error
    if cpu != (here := machine()["cpu"]):
        raise ValueError(f"{path} was measured on {cpu}, and this is {here}: measure it here, with as many threads")
    return ceilings


def of_run(folder: Path, kinds: Iterable[str], given: Path | None = None) -> Ceilings:
    """A run's own, kept in its folder: a copy of the file that is given, else those that are there, else measured now.

    ValueError where the given file says nothing of one of the kinds.
    """
    path, kinds = folder / FILE, sorted(kinds)
    if given is not None:
        ceilings = read(given)
        if missing := [kind for kind in kinds if kind not in ceilings.gmac_per_second]:
            raise ValueError(f"{given} says nothing of {missing[0]}, in which our systems run here: measure it again")
        write_text(path, given.read_text(encoding="utf-8"))
        return ceilings
    if path.exists() and set(kinds) <= set((kept := read(path)).gmac_per_second):
        return kept
    measured = measure(kinds)
    write(path, measured)
    return measured


def sentence(ceilings: Ceilings, kinds: Iterable[str]) -> str:
    """Both ceilings in words."""
    products = [
        f"multiply {', '.join(f'{value:.0f}' for value in by_rows.values())} GMAC/s in {kind} at "
        f"{', '.join(map(str, by_rows))} rows"
        for kind in kinds
        if (by_rows := ceilings.gmac_per_second.get(kind))
    ]
    return (
        f"Here the cores read {ceilings.gb_per_second:.1f} GB/s from memory and, from the cache, {'; '.join(products)}."
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("medusa_apar.eval.ceilings", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, metavar="FILE", help="gets what was measured, as JSON")
    parser.add_argument("--threads", type=number(int, 1, MAX_THREADS), metavar="N", help="CPU threads for torch")
    args = parser.parse_args(argv)
    if not args.file.absolute().parent.is_dir():
        parser.error(f"{args.file.parent} is no folder")
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        ceilings = measure()
    except RuntimeError as error:
        parser.error(str(error))
    write(args.file, ceilings)
    print(f"{machine()['cpu']}. {sentence(ceilings, ceilings.gmac_per_second)}")
    if (busy := others_share()) > BUSY:
        print(f"Other processes take {busy:.0f} % of the machine: measure again when it is quiet.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
