"""Requests in flight in one engine:  python -m medusa_apar.eval.engine [--in-flight 1 4 16 64] [--out FILE]

Tokens per second, seconds per answer (median and slowest of ten), seconds to the first token and peak KV slots of N
requests that are answered side by side, for the plain model, with threads, with heads, and with both. The systems take
turns, so that a busy moment harms no single one; ratios to "plain" are those of the same turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import medusa_apar
from medusa_apar.generate import MedusaApar
from medusa_apar.job import machine, write_text
from medusa_apar.models.chat import encode

from . import prompts

SYSTEMS = ("plain", "threads", "heads", "both")


@dataclass(slots=True)
class Measured:
    """One system with so many requests in flight.

    latency: median seconds from `add` to the last token; slowest: what nine in ten stay below. first_token: median.
    """

    system: str
    in_flight: int
    requests: int
    tokens: int
    tokens_per_second: float
    latency: float
    slowest: float
    first_token: float
    peak_slots: int
    steps: int
    preemptions: int
    ratio: float = 1.0  # tokens per second by those of "plain" in the same turn


def measure(apar: MedusaApar, system: str, prompt_ids: Sequence[list[int]], in_flight: int, limit: int) -> Measured:
    """Answers all prompts, never more than so many at once: one joins as soon as one has ended."""
    ours = apar if system in ("heads", "both") else apar.without_heads()
    fork = "auto" if system in ("threads", "both") else "off"
    todo = [ours.request(str(n), ids, max_new_tokens=limit, fork=fork) for n, ids in enumerate(prompt_ids)]
    requests = list(todo)
    with ours.engine(max_requests=in_flight) as engine:
        started = time.perf_counter()
        while todo or engine.unfinished:
            while todo and engine.unfinished < in_flight:
                engine.add(todo.pop(0))
            for output in engine.step():
                if output.error is not None:
                    raise output.error
        seconds = time.perf_counter() - started
    tokens = sum(len(request.text_ids) for request in requests)
    latencies = sorted(float(request.stats.finished or 0) for request in requests)
    first = statistics.median(float(request.stats.first_token or 0) for request in requests)
    return Measured(
        *(system, in_flight, len(requests), tokens, tokens / seconds, statistics.median(latencies)),
        *(latencies[int(0.9 * (len(latencies) - 1))], first),
        *(engine.stats.peak_slots, engine.stats.steps, engine.stats.preemptions),
    )


def run(apar: MedusaApar, texts: Sequence[str], in_flight: Sequence[int], limit: int, turns: int) -> list[Measured]:
    """The median turn of each system and number in flight; every turn answers each prompt at least once."""
    ids = [encode(apar.tokenizer, text)["input_ids"][0].tolist() for text in texts]
    measure(apar, "both", ids[:1], 1, 16)  # compiles, packs and measures what has to be
    found: list[Measured] = []
    for number in in_flight:
        asked = [ids[n % len(ids)] for n in range(max(len(ids), number))]
        turned: dict[str, list[Measured]] = {system: [] for system in SYSTEMS}
        for _ in range(turns):
            turn = {system: measure(apar, system, asked, number, limit) for system in SYSTEMS}
            for system, its in turn.items():
                its.ratio = its.tokens_per_second / turn["plain"].tokens_per_second
                turned[system].append(its)
        for system in SYSTEMS:
            middle = sorted(turned[system], key=lambda its: its.ratio)[turns // 2]
            found.append(middle)
            print(line(middle), flush=True)
    return found


HEADER = (
    f"{'system':8} {'in flight':>9} {'tokens/s':>9} {'ratio':>6} {'latency':>8} {'slowest':>8} {'first':>7} "
    f"{'slots':>6} {'steps':>6}"
)


def line(its: Measured) -> str:
    return (
        f"{its.system:8} {its.in_flight:9} {its.tokens_per_second:9.1f} {its.ratio:6.2f} {its.latency:8.2f} "
        f"{its.slowest:8.2f} {its.first_token:7.3f} {its.peak_slots:6} {its.steps:6}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("medusa_apar.eval.engine", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="as `medusa_apar.load` takes it (default: %(default)s)")
    parser.add_argument("--quantize", choices=["int8"], help="weights in 8 bits (CPU)")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 4, 16, 64], metavar="N")
    parser.add_argument("--prompts", default="default", help="a set of `bench`, or a file (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=8, help="prompts (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=1, help="of all systems; the median counts (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where the figures go as JSON")
    args = parser.parse_args(arguments)
    if min(args.in_flight) < 1 or args.turns < 1 or args.limit < 1:
        parser.error("--in-flight, --turns and --limit take numbers from 1 on.")
    apar = medusa_apar.load(args.model, quantize=args.quantize)
    texts = [prompt.text for prompt in prompts.read(args.prompts, args.limit)]
    about: dict[str, Any] = {"model": args.model, "runs on": apar.runtime.description, **machine()}
    print(json.dumps(about))
    print(HEADER, flush=True)
    found = run(apar, texts, args.in_flight, args.max_new_tokens, args.turns)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        options = {name: value for name, value in vars(args).items() if name != "out"}
        content = {"machine": about, "options": options, "found": [asdict(its) for its in found]}
        write_text(args.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
