"""The subcommands of `medusa-apar` that have a file each: `HELP`, `add_arguments(parser)` and `run(args)`.

A file's docstring is what `--help` prints. Nothing heavy is imported before `run`, so that `--help` answers at once.

    cli.py            the command itself, `generate`, and the list of all subcommands
    demo.py           `demo`: an answer as it grows, and the time it took beside transformers'
    chat.py           `chat`: a conversation, and threads as they grow
    doctor.py         `doctor`: what this machine and this installation have to offer
    answer.py         `answer`: a model's own answers as a corpus
    data.py           `data`: chat corpora into training examples
    finetune.py       `finetune`: a chat model learns to fork
    train_heads.py    `train-heads`: draft heads for a model
    calibrate.py      `calibrate`: how often heads are right, and the draft tree that follows
    convert.py        `convert`: heads from one file layout into another
    merge.py          `merge`: an adapter and its base as one model
    bench.py          `bench`: the same prompts under several systems
    bench_serve.py    its `--serve`: servers under load
    bench_quality.py  its `--quality`: what answers are like
    serve.py          `serve`: answers over HTTP, as OpenAI's API does
"""

from __future__ import annotations

from types import ModuleType

from . import answer, bench, calibrate, convert, data, finetune, merge, serve, train_heads

SUBCOMMANDS: dict[str, ModuleType] = {
    "answer": answer,
    "bench": bench,
    "serve": serve,
    "data": data,
    "finetune": finetune,
    "train-heads": train_heads,
    "merge": merge,
    "convert": convert,
    "calibrate": calibrate,
}
