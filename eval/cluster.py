"""Answers in threads on many engines of vLLM, without a model:  python -m medusa_apar.eval.cluster [--out FILE]

A discrete model over recorded paragraph trees. In every step of an engine each running thread gains a token, within
vLLM's own limits (`cluster_engine`); threads are started, cancelled and held back as `medusa_apar.engine.vllm` does it
(`cluster_answers`). It counts steps, and knows nothing of what one costs: where steps wait for memory they cost alike,
and where they compute, those with more rows cost more.

Each line of the table is a number of answers in flight, over all replicas, and a number of replicas, with threads
against one thread an answer. `--record FILE` records trees of one's own instead, with the native engine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from medusa_apar.arguments import number
from medusa_apar.engine.vllm.options import GPU_FREE_ROWS
from medusa_apar.job import machine, quiet, write_text

from . import prompts
from .cluster_answers import AFFINITIES, Figures, Setting, simulate
from .cluster_engine import EngineLimits
from .cluster_trees import RecordedAnswer, read, record, text_of

TREES = Path(__file__).with_name("results") / "vllm" / "trees.json"
HEADER = (
    f"{'flight':>6} {'repl.':>5} {'steps':>11} {'fewer':>6} {'latency':>11} {'sooner':>6} {'/100':>5} {'rows':>9} "
    f"{'most':>5} {'front':>6} {'KV':>13} {'most KV':>15} {'forks':>5} {'fed':>6} {'wait':>5} {'preempt':>9}"
)
LEGEND = """steps, latency, rows, KV, preempt: one thread/threads. fewer, sooner: how many times. /100: tokens written
for 100 shown. rows, most: sequences in an engine's step. front: tokens a step of all engines, threads. KV: tokens of
whole blocks in one engine. forks: of an answer. fed: prompt tokens computed for one. wait: steps until it writes."""
Pair = tuple[Setting, Figures, Figures]


def answers_for(in_flight: int, recorded: int, turns: int) -> int:
    """How many answers ask every place so many times, and every recorded question once at least."""
    return max(recorded, turns * in_flight)


def run(recorded: Sequence[RecordedAnswer], setting: Setting) -> Pair:
    """A setting, with one thread an answer and with threads."""
    plain, threads = (simulate(recorded, replace(setting, threads=threads)) for threads in (False, True))
    return setting, plain, threads


def line(pair: Pair) -> str:
    setting, plain, threads = pair
    return (
        f"{setting.in_flight:6} {setting.replicas:5} {plain.steps:5}/{threads.steps:5} "
        f"{plain.steps / threads.steps:6.2f} {plain.latency:5.0f}/{threads.latency:5.0f} "
        f"{plain.latency / threads.latency:6.2f} {threads.per_100:5.0f} {plain.rows:4.0f}/{threads.rows:4.0f} "
        f"{threads.most_rows:5} {threads.front:6.1f} {plain.kv:6.0f}/{threads.kv:6.0f} "
        f"{plain.most_kv:7}/{threads.most_kv:7} {threads.forks:5.1f} {threads.recomputed:6.1f} "
        f"{threads.fork_wait:5.1f} {plain.preemptions:4}/{threads.preemptions:4}"
    )


def told(pair: Pair) -> dict[str, Any]:
    setting, plain, threads = pair
    return {
        "setting": {name: value for name, value in asdict(setting).items() if name != "threads"},
        "plain": asdict(plain) | {"per_100": plain.per_100},
        "threads": asdict(threads) | {"per_100": threads.per_100},
    }


def settings(args: argparse.Namespace, recorded: int) -> list[Setting]:
    """ValueError for what cannot be."""
    blocks = None if args.kv_tokens is None else args.kv_tokens // args.block_size
    limits = EngineLimits(
        *(args.block_size, args.max_num_seqs, args.max_num_batched_tokens, blocks, args.scheduling == "priority")
    )
    common = Setting(
        threads=True,
        max_new_tokens=args.max_new_tokens,
        affinity=args.affinity,
        lag=1 + args.async_scheduling + args.round_trip,
        transfer=args.transfer,
        free_rows=args.free_rows or None,
        spread=args.spread,
        limits=limits,
    )
    return [
        replace(common, in_flight=many, replicas=replicas, answers=answers_for(many, recorded, args.turns))
        for many in args.in_flight
        for replicas in args.replicas
    ]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("medusa_apar.eval.cluster", description=(__doc__ or "").splitlines()[0])
    add, whole = made.add_argument, number(int, 1)
    add("--trees", type=Path, default=TREES, metavar="FILE", help="recorded ones (default: those of the repository)")
    add("--first", type=whole, metavar="N", help="only the first N recorded answers")
    add("--in-flight", type=whole, nargs="+", default=[1, 4, 16, 64, 256, 1000], metavar="N", help="answers, in all")
    add("--replicas", type=whole, nargs="+", default=[1, 4, 16], metavar="N", help="engines")
    add("--turns", type=whole, default=2, metavar="N", help="answers of each place in flight (default: %(default)s)")
    add("--spread", type=number(int, 0), default=0, metavar="STEPS", help="over which the first ones come")
    add("--max-new-tokens", type=whole, default=256, metavar="N")
    add("--block-size", type=whole, default=16, metavar="N", help="tokens (default: %(default)s, vLLM's on a GPU)")
    add("--max-num-seqs", type=whole, default=1024, metavar="N", help="of an engine (default: %(default)s)")
    add("--max-num-batched-tokens", type=whole, default=8192, metavar="N", help="of a step (default: %(default)s)")
    add("--kv-tokens", type=whole, metavar="N", help="of one engine's pool (default: as many as are asked for)")
    add("--scheduling", choices=("fcfs", "priority"), default="priority", help="default: %(default)s")
    add("--affinity", choices=AFFINITIES, default="rank", help="where an answer's threads go (default: %(default)s)")
    add("--async-scheduling", action="store_true", help="an engine plans one step ahead")
    add("--round-trip", type=number(int, 0), default=0, metavar="STEPS", help="to the engine and back")
    add("--transfer", type=number(int, 0), metavar="STEPS", help="all prefill is another engine's, KV travels so long")
    free = "as of VllmOptions; 0: no thread waits (default: %(default)s, a GPU's)"
    add("--free-rows", type=number(float, 0.0), default=GPU_FREE_ROWS, metavar="N", help=free)
    add("--out", type=Path, metavar="FILE", help="where the figures go as JSON")
    recording = made.add_argument_group("recording")
    add = recording.add_argument
    add("--record", type=Path, metavar="FILE", help="record trees and end")
    add("--model", default="smollm2-135m", help="as `medusa_apar.load` takes it (default: %(default)s)")
    add("--quantize", choices=["int8"], help="weights in 8 bits (CPU)")
    add("--prompts", default="vicuna", help="a set of `bench`, or a file (default: %(default)s)")
    add(
        "--every", type=whole, default=5, metavar="N", help="of its questions, from the first on (default: %(default)s)"
    )
    add("--recorded-tokens", type=whole, default=1024, metavar="N", help="of an answer (default: %(default)s)")
    return made


def record_to(path: Path, args: argparse.Namespace) -> None:
    from medusa_apar.loading import load
    from medusa_apar.models.chat import encode

    quiet()
    asked = prompts.read(args.prompts)[:: args.every][: args.first]
    apar = load(args.model, quantize=args.quantize, speculation="off")
    ids = [(its.id, encode(apar.tokenizer, its.text)["input_ids"][0].tolist()) for its in asked]
    answers = record(apar, ids, args.recorded_tokens)
    about = {
        "model": args.model,
        "runs on": apar.runtime.description,
        "prompts": args.prompts,
        "tokens": args.recorded_tokens,
        **machine(),
    }
    write_text(path, text_of(answers, about))


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser()
    args = made.parse_args(arguments)
    for path in (args.out, args.record):
        if path is not None and not path.absolute().parent.is_dir():
            made.error(f"{path.parent} is no folder")
    if args.record is not None:
        record_to(args.record, args)
        return 0
    try:
        recorded = read(args.trees)[: args.first]
        asked = settings(args, len(recorded))
    except (OSError, ValueError) as error:
        made.error(str(error))
    print(HEADER, flush=True)
    began, pairs = time.perf_counter(), []
    for setting in asked:
        try:
            pairs.append(run(recorded, setting))
        except ValueError as error:
            made.error(str(error))
        print(line(pairs[-1]), flush=True)
    print(LEGEND)
    written = sum(figures.written for _, *both in pairs for figures in both)
    print(f"{written} tokens, {written / (time.perf_counter() - began):.0f} a second on one core", file=sys.stderr)
    if args.out is not None:
        options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        content = {"options": options, "found": [told(pair) for pair in pairs]}
        write_text(args.out, json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
