"""How fast int8 products are with each instruction set that this processor has, by how many rows go side by side.

  python -m medusa_apar.eval.tiles --out FILE

The compiled code is made anew for every instruction set and every size of a tile, and multiplies a matrix of 2 MiB,
which a core's caches hold, on one thread. What `int8.h` takes by itself is marked. FILE gets JSON, with machine,
versions, commit and date.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from medusa_apar.arguments import number
from medusa_apar.job import machine, write_text
from medusa_apar.runtimes.cpu import library
from medusa_apar.runtimes.cpu.weights import PackedMatrix

from .ceilings import INPUTS, MATRIX, best

# The compiler's name of a machine, what is special about it, and the processor's flags that its code needs.
MACHINES = {
    "haswell": ("AVX2", {"avx2", "fma"}),
    "alderlake": ("AVX-VNNI", {"avx2", "fma", "avx_vnni"}),
    "cascadelake": ("AVX-512 VNNI", {"avx512f", "avx512bw", "avx512_vnni"}),
    "sapphirerapids": ("AMX from 8 rows", {"amx_int8", "avx512_vnni", "avx512_fp16"}),
}
TURNS = 4  # in which all are measured, so that a busy moment harms no single one
TILES, ROWS = (2, 4, 6, 8, 12), (1, 2, 4, 8, 12, 16, 32)


def available() -> list[str]:
    """The names in MACHINES whose code this processor runs."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.is_file() else set()
    return [name for name, (_, needed) in MACHINES.items() if needed <= flags]


@contextmanager
def compiled_for(name: str, tile: int | None) -> Iterator[None]:
    """Within the block products run in code for this machine, with so many rows in a tile or as many as it takes."""
    command = [*library.compilers()[0], *([] if tile is None else [f"-DMAPAR_TILE_ROWS={tile}"])]
    opened = library._open(library._compiled(command, f"-march={name}"))
    before = library.library

    def instead() -> ctypes.CDLL:
        return opened

    library.library = instead
    try:
        yield
    finally:
        library.library = before


@torch.inference_mode()
def products(rows: tuple[int, ...], seconds: float) -> dict[int, float]:
    """GMAC/s by rows."""
    outputs = MATRIX // INPUTS
    matrix = PackedMatrix(torch.randn(outputs, INPUTS, device="cpu"), "int8")
    inputs = [torch.randn(count, INPUTS, device="cpu") for count in rows]
    times = best([partial(matrix, x) for x in inputs], seconds)
    return {count: count * INPUTS * outputs / 1e9 / time for count, time in zip(rows, times, strict=True)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("medusa_apar.eval.tiles", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=number(float, 0.0), default=1.0, help="for each (default: %(default)s)")
    parser.add_argument("--tiles", type=number(int, 1, 12), nargs="*", default=list(TILES), metavar="ROWS")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    names = available()
    if not names or not library.compilers():
        parser.error("this needs an x86 processor with AVX2, and a C++ compiler")
    torch.set_num_threads(1)
    found: dict[str, dict[str, dict[int, float]]] = {MACHINES[name][0]: {} for name in names}
    for _ in range(TURNS):
        for name in names:
            speeds = found[MACHINES[name][0]]
            for tile in (None, *args.tiles):
                with compiled_for(name, tile):
                    label, now = "its own" if tile is None else str(tile), products(ROWS, args.seconds / TURNS)
                before = speeds.setdefault(label, now)
                speeds[label] = {count: max(before[count], speed) for count, speed in now.items()}
    print(f"| instructions | rows of a tile | {' | '.join(map(str, ROWS))} rows |\n{'|---' * (len(ROWS) + 2)}|")
    for name, by_tile in found.items():
        for label, by_rows in by_tile.items():
            print(f"| {name} | {label} | {' | '.join(f'{speed:.0f}' for speed in by_rows.values())} |")
    if args.out is not None:
        write_text(args.out, json.dumps({**machine(), "gmac_per_second": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
