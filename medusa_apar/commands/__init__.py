"""The subcommands of `medusa-apar` that have a file each: `HELP`, `add_arguments(parser)` and `run(args)`.

A file's docstring is what `--help` prints. Nothing heavy is imported before `run`, so that `--help` answers at once.
"""

from __future__ import annotations

from types import ModuleType

from . import answer, bench, calibrate, convert, data, finetune, merge, train_heads

SUBCOMMANDS: dict[str, ModuleType] = {
    "answer": answer,
    "bench": bench,
    "data": data,
    "finetune": finetune,
    "train-heads": train_heads,
    "merge": merge,
    "convert": convert,
    "calibrate": calibrate,
}
