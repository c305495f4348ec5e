"""What the subcommands' arguments have in common: types that say in one sentence what they take, and shared options."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .reading import expanded

MAX_THREADS = 1024  # of a CPU; OpenMP ends the process where it cannot start as many as were asked for
MOST = {int: 2**63 - 1, float: sys.float_info.max}  # what torch and C++ can hold


def number(kind: type, low: float, high: float | None = None, open_low: bool = False) -> Any:
    """An argparse type: `kind` within [low, high], or (low, high]; always finite."""
    most = MOST[kind] if high is None else high

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= most or (open_low and value == low):  # nan is within nothing
            limits = f"{'above' if open_low else 'at least'} {low}"
            if high is not None or (value is not None and value > most):
                limits += f" and at most {most}"
            raise argparse.ArgumentTypeError(
                f"{text[:40]!r} must be {'a whole number' if kind is int else 'a number'} {limits}"
            )
        return value

    return parse


def out_folder(text: str) -> Path:
    """An argparse type: a folder to write into, there already or not."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} names no folder")
    path = expanded(text)
    nearest = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise argparse.ArgumentTypeError(f"{nearest} is no folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{nearest} may not be written to")
    return path


def add_bad_lines(parser: argparse.ArgumentParser | argparse._ArgumentGroup, templated: bool = True) -> None:
    """`--bad-lines`, the same in every command that reads corpora.

    templated: whether the command has a model, whose chat template conversations must suit.
    """
    refused = ", or whose conversation the model's chat template refuses," if templated else ""
    parser.add_argument(
        "--bad-lines",
        choices=("fail", "skip"),
        default="fail",
        help=f"a line that cannot be read{refused} is an error before any work, or is left out and reported "
        "(default: %(default)s)",
    )


def check_files(paths: Iterable[Path]) -> None:
    """OSError, in one sentence, for the first that is no file to read."""
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder: name a file in it")
        if not path.is_file():
            raise OSError(f"{path} is no regular file: write what it gives into one first")
