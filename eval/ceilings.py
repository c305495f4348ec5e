"""What this machine's cores can read and multiply at most:  python -m medusa_apar.eval.ceilings FILE

Reading: torch adds up a buffer of floats four times as large as the last cache, and multiplies it with a vector; the
faster of the two, best of several passes, on as many threads as torch has. Products: this project's own, of a matrix
of 2 MiB (`PackedMatrix`, which a core's caches hold), at several rows; the time of a call with one panel of outputs is
taken off, so that what is left is products and no call. FILE gets both as JSON, with machine, versions, commit and
date, and with what other processes took of the machine; `medusa-apar bench --ceilings FILE` reads it.
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
CALL_SHARE = 0.5  # of the time of products that the call may be: past it, what is left is mostly noise
TRIES = 3  # at a call that is less
COLUMNS = 8192  # of the buffer as a matrix


@dataclass(frozen=True, slots=True)
class Ceilings:
    """gb_per_second: sustained, from memory. gmac_per_second: by kind of weights and number of rows, from the cache;
    without those at which the time was mostly that of a call. others_percent: of all cores, what other processes took
    just before or just after, whichever was more; None in files in which nobody has written it."""

    gb_per_second: float
    gmac_per_second: dict[str, dict[int, float]]
    others_percent: float | None

    def products(self, kind: str, rows: float) -> float | None:
        """GMAC/s at so many rows, between two measured numbers in proportion; None below all that were measured."""
        measured = self.gmac_per_second[kind]
        if not measured or rows < min(measured):
            return None
        return float(np.interp(rows, list(measured), list(measured.values())))

    @property
    def doubt(self) -> str | None:
        """Why these are not to be trusted, as a sentence; None where the machine was quiet."""
        if self.others_percent is None:
            return "Nobody looked whether the machine was busy when that was measured: measure again."
        if self.others_percent > BUSY:
            return (
                f"Other processes took {self.others_percent:.0f} % of the machine when that was measured, so it is not "
                "to be trusted: measure again when it is quiet."
            )
        return None


def others_share() -> float:
    """Per cent of all cores that are busy while this process only waits, over half a second."""
    busy: float = psutil.cpu_percent(interval=0.5)
    return busy


def measure(kinds: Iterable[str] = KINDS) -> Ceilings:
    """A few seconds. RuntimeError, in a sentence, where the compiled code cannot be had."""
    library.library()
    before = others_share()
    found = reading(), {kind: products(kind) for kind in kinds}
    return Ceilings(*found, max(before, others_share()))


def cache_bytes() -> int:
    """The size of the largest cache that a core has or shares."""
    sizes = [path.read_text().strip() for path in CACHES.glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20, "G": 30}[size[-1]] for size in sizes), default=UNKNOWN_CACHE)


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
    """GMAC/s by rows, without those at which a call stays the larger part of the time."""
    outputs = MATRIX // (INPUTS * BYTES[kind])
    matrix, panel = (PackedMatrix(torch.randn(count, INPUTS, device="cpu"), kind) for count in (outputs, PANEL))
    found = {}
    for rows in ROWS:
        x = torch.randn(rows, INPUTS, device="cpu")
        for _ in range(TRIES):
            whole, call = best((partial(matrix, x), partial(panel, x)), PRODUCT_SECONDS)
            if call <= CALL_SHARE * whole:
                found[rows] = rows * INPUTS * (outputs - PANEL) / 1e9 / (whole - call)
                break
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
        others = found.get("others_percent")
        others = None if others is None else float(others)
        ceilings, cpu = Ceilings(float(found["gb_per_second"]), products, others), found["cpu"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no file of `python -m medusa_apar.eval.ceilings` ({error!r})") from error
    if cpu != (here := machine()["cpu"]):
        raise ValueError(f"{path} was measured on {cpu}, and this is {here}: measure it here, with as many threads")
    return ceilings


def of_run(folder: Path, kinds: Iterable[str], given: Path | None = None) -> Ceilings:
    """A run's own: of the file that is given, else those that its folder keeps, else measured now.

    The folder gets a copy of what is given, and what was measured while others left the machine alone; where they did
    not, the next run measures again. ValueError where the given file says nothing of one of the kinds.
    """
    path, kinds = folder / FILE, sorted(kinds)
    if given is not None:
        ceilings = read(given)
        if missing := [kind for kind in kinds if kind not in ceilings.gmac_per_second]:
            raise ValueError(f"{given} says nothing of {missing[0]}, in which our systems run here: measure it again")
        write_text(path, given.read_text(encoding="utf-8"))
        return ceilings
    if path.exists() and not (kept := read(path)).doubt and set(kinds) <= set(kept.gmac_per_second):
        return kept
    measured = measure(kinds)
    if not measured.doubt:
        write(path, measured)
    return measured


def sentence(ceilings: Ceilings, kinds: Iterable[str]) -> str:
    """Both ceilings in words, and what is wrong with them."""
    kinds = list(kinds)
    products = [
        f"multiply {', '.join(f'{value:.0f}' for value in by_rows.values())} GMAC/s in {kind} at "
        f"{', '.join(map(str, by_rows))} rows"
        for kind in kinds
        if (by_rows := ceilings.gmac_per_second.get(kind))
    ]
    multiplied = f" and, from the cache, {'; '.join(products)}" if products else ""
    said = [f"Here the cores read {ceilings.gb_per_second:.1f} GB/s from memory{multiplied}."]
    for kind in kinds:
        if missing := sorted(set(ROWS) - set(ceilings.gmac_per_second.get(kind, ROWS))):
            said.append(f"In {kind} at {', '.join(map(str, missing))} rows calls took most of the time.")
    return " ".join([*said, *([ceilings.doubt] if ceilings.doubt else [])])


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
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
