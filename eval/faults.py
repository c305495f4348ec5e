"""A campaign of faults against a real server:  python -m medusa_apar.eval.faults [--seconds 600] [--seed 0]

Clients hang up, say half of what they wanted, read slowly or not at all, come in floods, under equal names and with
bodies that are wrong, while others ask honest questions. Round by round a server starts with other limits (a tiny pool,
a short queue, prefix cache or none) and ends in another way: idle, drained as by SIGTERM, or with its engine's thread
killed. Every accepted question must have its right text, as an engine alone gives it, or a clear error; at the end of a
round free + cached slots are all slots and no thread or socket is left. The memory at the end is no more than 32 MiB
above what it was after a warm-up, a quarter of the rounds; the report says both, and how much it rose with a thousand
faults.

Exits with 1, and says what was wrong, where that is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from medusa_apar.arguments import number
from medusa_apar.engine.admission import check_fits
from medusa_apar.generate import MedusaApar
from medusa_apar.job import machine, quiet, write_text
from medusa_apar.loading import load
from medusa_apar.serve.options import ServeOptions

from . import prompts
from .fault_cases import Case, cases_of
from .fault_host import PATIENCE, Host, Wrong, resident
from .fault_judge import Gone
from .fault_kinds import FAULTS, GOOD, Kind, World, ask, together, whole_answer
from .fault_memory import BOUND, Growth, growth
from .serve_client import UNLIMITED
from .serve_metrics import LIVE, PREFIX, parse

ENDINGS = ("idle", "kill", "drain", "idle", "kill")
DYING = 0.3  # seconds for which clients go on coming while a server is brought to its end
LONG = 200  # tokens of an answer in whose middle somebody hangs up, where the pool has room for it
MOST_WRONG = 20  # after so many the campaign stops


@dataclass(frozen=True, slots=True)
class Pace:
    """seconds: of the campaign. cases: questions that are asked. at_once: clients, as many good ones as bad ones.

    round_faults: after so many a round ends even before its time is over.
    """

    seconds: float = 600.0
    round_seconds: float = 15.0
    cases: int = 40
    at_once: int = 8
    round_faults: int | None = None


@dataclass
class Report:
    """events: how often each kind of client came. counts: what honest questions came to. memory: bytes after each
    round. growth: of these; None where there were too few rounds to tell."""

    seed: int
    seconds: float = 0.0
    faults: int = 0
    rounds: int = 0
    events: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)
    growth: Growth | None = None
    wrong: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        tables = {"events": dict(self.events.most_common()), "counts": dict(self.counts.most_common())}
        rest = {name: getattr(self, name) for name in ("seed", "seconds", "faults", "rounds", "memory", "wrong")}
        grown = None if self.growth is None else {**asdict(self.growth), "bound": BOUND}
        return rest | tables | {"growth": grown}


@dataclass(frozen=True, slots=True)
class Round:
    apar: MedusaApar
    cases: list[Case]
    options: ServeOptions
    ending: str
    pace: Pace
    rng: random.Random
    report: Report


def campaign(apar: MedusaApar, pace: Pace, seed: int) -> Report:
    """All of it, until its time is over and every way to end a round was taken once."""
    rng, report, began = random.Random(seed), Report(seed), time.monotonic()
    cases = cases_of(apar, prompts.read(prompts.DEFAULT), pace.cases, rng)
    endings: list[str] = []
    faults: list[int] = []  # after each round
    while time.monotonic() - began < pace.seconds or len(endings) < len(set(ENDINGS)):
        if len(report.wrong) >= MOST_WRONG:
            break
        ending = ENDINGS[len(endings) % len(ENDINGS)]
        options = _options(apar, cases, rng)
        try:
            _round(Round(apar, cases, options, ending, pace, rng, report))
        except Exception as error:  # whatever it is, it is no reason to throw the report away
            report.wrong.append(f"round {len(endings)} ({ending}, {options}): {_said(error)}")
        endings.append(ending)
        report.memory.append(resident())
        faults.append(report.events["kill"] + report.events["drain"] + _faults(report.events))
    report.rounds, report.seconds = len(endings), round(time.monotonic() - began, 1)
    report.faults = faults[-1] if faults else 0
    report.growth = growth(report.memory, faults)
    if report.growth is not None and report.growth.too_much:
        report.wrong.append(str(report.growth))
    return report


def _faults(events: Counter[str]) -> int:
    return sum(events[kind.__name__] for kind in FAULTS)


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, AssertionError) else repr(error)


def _options(apar: MedusaApar, cases: list[Case], rng: random.Random) -> ServeOptions:
    """Limits that hurt, but let every case be answered."""
    least = _least_slots(apar, cases)
    return ServeOptions(
        max_requests=rng.choice([2, 4, 16]),
        max_queue=rng.choice([4, 16]),
        pool_slots=rng.choice([None, least, 2 * least]),
        prefix_cache=rng.random() < 0.5,
        max_body_bytes=1 << 16,
        shutdown_timeout=PATIENCE / 2,
        access_log=False,
    )


def _least_slots(apar: MedusaApar, cases: list[Case]) -> int:
    """The smallest pool of a power of two slots that admission lets every case into."""
    slots = 64
    while not all(_fits(apar, case, case.body["max_tokens"], slots) for case in cases):
        slots *= 2
    return slots


def _room(apar: MedusaApar, case: Case, slots: int | None) -> int:
    """Tokens that a case may ask for so that it fits: many, so that somebody can hang up in the middle of them."""
    context = apar.facts.context
    most = LONG if context is None else min(LONG, context - len(case.prompt_ids))
    return next((limit for limit in range(most, 1, -1) if _fits(apar, case, limit, slots)), 1)


def _fits(apar: MedusaApar, case: Case, limit: int, slots: int | None) -> bool:
    request = apar.request("fits", case.prompt_ids, max_new_tokens=limit)
    try:
        check_fits(apar.model, slots, [case.prompt_ids], request.options)
    except ValueError:
        return False
    return True


def _round(its: Round) -> None:
    host = Host(its.apar, its.options)
    host.start()
    try:
        asyncio.run(_talk(host, its))
    finally:
        host.stop()


async def _talk(host: Host, its: Round) -> None:
    options, report = its.options, its.report
    flood = (options.max_requests or 0) + (options.max_queue or 0) + 20
    room = {id(case): _room(its.apar, case, options.pool_slots) for case in its.cases}
    async with httpx.AsyncClient(timeout=PATIENCE, limits=UNLIMITED, trust_env=False) as http:
        world = World(
            host.url, host.port, http, its.cases, lambda case: room[id(case)], its.rng, flood, "", report.counts,
            report.events,
        )  # fmt: skip
        await _event(world, "alone", ask(world, world.case(), stream=False, alone=True), report)
        over = asyncio.Event()
        clients = [_client(world, kinds, report, over) for kinds in (GOOD, FAULTS) for _ in range(its.pace.at_once)]
        busy = [asyncio.create_task(client) for client in clients]
        try:
            await _until_over(its.pace, report)
            if its.ending != "idle":
                await _end(host, world, its.ending)
        finally:
            over.set()
            await asyncio.gather(*busy)
        if its.ending == "kill":
            await _is_dead(world)
        elif its.ending == "idle":
            await _is_idle(world)
            for case in its.cases:  # after all that has happened the server is as good as new
                await _event(world, "alone", ask(world, case, its.rng.random() < 0.5, alone=True), report)


async def _until_over(pace: Pace, report: Report) -> None:
    clock = asyncio.get_running_loop().time
    until, before = clock() + pace.round_seconds, _faults(report.events)
    most = math.inf if pace.round_faults is None else pace.round_faults
    while clock() < until and _faults(report.events) - before < most and len(report.wrong) < MOST_WRONG:
        await asyncio.sleep(0.01)


async def _end(host: Host, world: World, ending: str) -> None:
    """Brings the server to its end while clients go on coming."""
    world.ending = ending
    for _ in range(3):  # what was sent before has been read by the server when it has answered what is sent now
        await world.http.get(f"{world.url}/health", headers={"Connection": "close"})
    world.events[ending] += 1
    host.kill() if ending == "kill" else host.drain()
    await asyncio.sleep(DYING)


async def _client(world: World, kinds: dict[Kind, int], report: Report, over: asyncio.Event) -> None:
    while not over.is_set() and len(report.wrong) < MOST_WRONG:
        kind = world.rng.choices(list(kinds), list(kinds.values()))[0]
        if not await _event(world, kind.__name__, kind(world), report):
            await asyncio.sleep(0.05)


async def _event(world: World, name: str, event: Awaitable[object], report: Report) -> bool:
    """Whether it has reached the server; only then it counts."""
    try:
        await event
    except Gone:
        return False
    except Exception as error:
        report.wrong.append(f"{name}: {_said(error)}")
    world.events[name] += 1
    return True


async def _is_dead(world: World) -> None:
    """A server whose engine has died says so, and answers nothing."""
    before = world.counts["right"]
    await together(whole_answer(world) for _ in range(3))
    health = await world.http.get(f"{world.url}/health")
    if health.status_code != 503:
        raise Wrong(f"the engine has died, and /health is {health.status_code}")
    if world.counts["right"] != before:
        raise Wrong("the engine has died, and still there was an answer")


async def _is_idle(world: World) -> None:
    """Nobody asks any more: no request runs, and no slot is live."""
    until = asyncio.get_running_loop().time() + PATIENCE
    while True:
        found = parse((await world.http.get(f"{world.url}/metrics")).text)
        names = (LIVE, f"{PREFIX}num_requests_running", f"{PREFIX}num_requests_waiting")
        if missing := [name for name in names if name not in found]:
            raise Wrong(f"/metrics tells nothing of {', '.join(missing)}")
        left = {name: found[name] for name in names}
        if not any(left.values()):
            return
        if asyncio.get_running_loop().time() > until:
            raise Wrong(f"nobody asks, but the server has {left}")
        await asyncio.sleep(0.02)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("medusa_apar.eval.faults", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--seconds", type=number(float, 0, open_low=True), default=600.0, help="of the campaign (default: %(default)g)")
    add("--seed", type=number(int, 0), default=0, help="of what happens; when it does depends on the machine")
    add("--model", default="smollm2-135m", help="as `medusa_apar.load` takes it (default: %(default)s)")
    add("--quantize", choices=["int8"], help="weights in 8 bits (CPU)")
    add("--out", type=Path, help="where the report goes as JSON")
    args = parser.parse_args(arguments)
    quiet()
    report = campaign(load(args.model, quantize=args.quantize), Pace(args.seconds), args.seed)
    content = json.dumps({"model": args.model, "quantize": args.quantize, **machine(), **report.as_json()}, indent=1)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.out, content + "\n")
    print(content)
    return 1 if report.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
