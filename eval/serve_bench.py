"""The load benchmark: so many clients, or so many questions a second, against each server in turn.

`load.jsonl` has a line per server, load and turn, and a killed run goes on where it stopped. All tables and pictures
are made of nothing but these lines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from medusa_apar.job import Job, machine

from .plan import keep_settings
from .prompts import Prompt
from .runs import Runs
from .serve_client import TIMEOUT, UNLIMITED, Exchange, ask, closed_loop, open_loop
from .serve_figures import figures, median_row
from .serve_metrics import watching
from .serve_servers import Launch, NotStarted, Running, running

RESULTS = "load.jsonl"
WARM_UP_TOKENS = 32
# Pools that are tried where nobody says which: shares of the most slots that any server had in use without a cap.
POOLS = (1.0, 0.85, 0.7, 0.6, 0.5, 0.42, 0.35, 0.29, 0.24, 0.2)
KEPT_OF = ("tokens_per_second", "tokens_per_step")
LOST = 0.9  # a server that has kept less than this is not tried with still smaller pools


@dataclass(frozen=True, slots=True)
class Asking:
    """What is asked, the same of every server; a folder holds results of one kind only."""

    prompts: str  # digest of ids and texts
    max_tokens: int
    ignore_eos: bool  # or answers stop where they end
    temperature: float
    top_p: float
    prefix_cache: bool
    model: str
    heads: str
    quantize: str | None
    dtype: str | None  # of ours
    cpu: str
    weights: str  # fingerprints of what our servers load; "" where none of ours or of the peers is started
    software: str  # versions of the engines
    room: int  # answers at once that the servers are started for; 0 where none is started
    url_model: str | None
    per_client: int
    least: int
    seconds: float  # of an open loop
    seed: int


@dataclass(frozen=True, slots=True)
class Load:
    """One setting: clients of a closed loop, or questions a second of an open one; slots of a capped pool."""

    clients: int | None = None
    rate: float | None = None
    slots: int | None = None
    beside: int | None = None  # an uncapped pool, measured in the same turn as one of so many slots

    @property
    def key(self) -> tuple[int | None, float | None, int | None, int | None]:
        return self.clients, self.rate, self.slots, self.beside

    def questions(self, asking: Asking) -> int:
        """How many are measured: some for each client, or what comes in so many seconds, and not too few in all."""
        closed = self.clients is not None
        some = asking.per_client * (self.clients or 0) if closed else round(asking.seconds * (self.rate or 0))
        return max(some, asking.least)

    def __str__(self) -> str:
        what = _plural(self.clients, "client") if self.clients is not None else f"{self.rate:g} questions a second"
        if self.beside is not None:
            what += f", uncapped beside {self.beside} slots"
        return what if self.slots is None else f"{what}, {self.slots} slots"


def _plural(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


KEYS = ("system", "clients", "rate", "slots", "beside", "turn")
Measure = Callable[[Launch, Load], dict[str, Any]]


class Results:
    """The rows of a folder."""

    def __init__(self, folder: Path, asking: Asking) -> None:
        """ValueError where the folder holds results of something else."""
        keep_settings(folder, asdict(asking), {})
        self.runs = Runs(folder / RESULTS, KEYS)
        self._now = {name: value for name, value in machine().items() if name in ("date", "commit")}

    def row(self, system: str, load: Load, turn: int) -> dict[str, Any] | None:
        return self.runs.rows.get((system, *load.key, turn))

    def add(self, system: str, load: Load, turn: int, found: dict[str, Any]) -> None:
        self.runs.add([dict(zip(KEYS, (system, *load.key, turn), strict=True)) | self._now | found])

    def middle(self, system: str, load: Load) -> dict[str, Any] | None:
        """The median of its turns."""
        rows = list(self.turns(system, load).values())
        return median_row(rows) if rows else None

    def turns(self, system: str, load: Load) -> dict[int, dict[str, Any]]:
        """The row of each turn."""
        return {key[-1]: row for key, row in self.runs.rows.items() if key[:-1] == (system, *load.key)}

    def loads(self) -> list[Load]:
        """Every load that was measured, with any server."""
        found = {Load(*key[1:-1]) for key in self.runs.rows}
        return sorted(found, key=lambda load: tuple((value is not None, value or 0) for value in load.key))


def measure_all(
    job: Job,
    results: Results,
    launches: Sequence[Launch],
    loads: Sequence[Load],
    turns: int,
    measure: Measure,
    first: int = 0,
) -> None:
    """Measures what the results do not hold yet. The servers take turns at every load, and no one is always first.

    first: which of them is, at the first load of the first turn.
    """
    wanted = []
    for turn in range(turns):
        for place, load in enumerate(loads):
            start = (first + turn + place) % len(launches)
            wanted += [(turn, load, launch) for launch in (*launches[start:], *launches[:start])]
    done = [(turn, load, launch) for turn, load, launch in wanted if results.row(launch.name, load, turn)]
    with job.bar("settings", len(wanted), len(done)) as bar:
        for turn, load, launch in wanted:
            if (turn, load, launch) not in done:
                _measure(job, results, launch, load, turn, measure)
                bar.advance(shown=f"{launch.name}, {load}")


def measure_pools(
    job: Job,
    results: Results,
    launches: Sequence[Launch],
    clients: int,
    pools: Sequence[int],
    turns: int,
    measure: Measure,
) -> None:
    """The same load with ever smaller pools, largest first, until a server has lost too much.

    Beside each of them, in the same turn, it is measured without a cap: what the machine does meanwhile is in both.

    pools: in slots; without any, shares of the most that a server had in use when nothing capped it.
    """
    pooled = [launch for launch in launches if launch.pooled]
    if not pools:
        uncapped = Load(clients)
        measure_all(job, results, pooled, [uncapped], turns, measure)
        middle = [results.middle(launch.name, uncapped) or {} for launch in pooled]
        most = max((row.get("peak_slots") or 0.0 for row in middle), default=0.0)
        pools = sorted({int(most * share) for share in POOLS} - {0}, reverse=True)
    left = list(pooled)
    for place, slots in enumerate(sorted(pools, reverse=True)):
        if not left:
            break
        load = Load(clients, slots=slots)
        measure_all(job, results, left, [load, Load(clients, beside=slots)], turns, measure, first=place)
        left = [
            launch for launch in left if max(kept(results, launch.name, load, figure) for figure in KEPT_OF) >= LOST
        ]


def kept(results: Results, system: str, load: Load, figure: str = KEPT_OF[0]) -> float:
    """Share of an uncapped pool's figure that a capped one keeps, the median of the turns' shares; 0 where a request
    failed.

    figure: one of `KEPT_OF`. Tokens for each step are counted, so that a busy moment of the machine is not in them; a
    step of fewer rows is faster too, so that less of them is kept than of the tokens per second.
    """
    capped, uncapped = (results.turns(system, each) for each in (load, Load(load.clients, beside=load.slots)))
    if any(row["errors"] for row in capped.values()):
        return 0.0
    shares = [
        (row.get(figure) or 0.0) / base
        for turn, row in capped.items()
        if turn in uncapped and (base := uncapped[turn].get(figure))
    ]
    return median(shares) if shares else 0.0


def _measure(job: Job, results: Results, launch: Launch, load: Load, turn: int, measure: Measure) -> None:
    found = measure(launch, load)
    if not found["requests"] and load.slots is None:
        raise RuntimeError(f"{launch.name} has answered nothing: {next(iter(found['errors']))} (its log: {launch.log})")
    results.add(launch.name, load, turn, found)
    shown = {key: found[key] for key in ("requests", "errors", "seconds", "tokens_per_second")}
    job.log("measured", system=launch.name, load=str(load), turn=turn, **shown)
    speed = found["tokens_per_second"] or 0.0
    failed = f", {sum(found['errors'].values())} failed" if found["errors"] else ""
    job.say(f"{launch.name}, {load}: {speed:.1f} tokens/s{failed}")


class HttpMeasure:
    """Starts the server, warms it up, asks, and stops it again."""

    def __init__(self, asking: Asking, prompts: Sequence[Prompt]) -> None:
        self.asking, self.prompts = asking, prompts

    def __call__(self, launch: Launch, load: Load) -> dict[str, Any]:
        try:
            with running(launch.capped(load.slots)) as server:
                return asyncio.run(self.measure(launch, server, load))
        except NotStarted as error:
            if load.slots is None:
                raise
            return figures([Exchange(0, ended=0.0, error=str(error))])  # the pool is too small for anything

    async def measure(self, launch: Launch, server: Running, load: Load) -> dict[str, Any]:
        async with httpx.AsyncClient(
            timeout=TIMEOUT, limits=UNLIMITED, headers=server.headers, trust_env=not server.local
        ) as http:

            async def warm(exchange: Exchange) -> None:
                body = self.body(launch, server, exchange.number) | {"max_tokens": WARM_UP_TOKENS}
                await ask(http, server.url, body, exchange)

            async def question(exchange: Exchange) -> None:
                await ask(http, server.url, self.body(launch, server, exchange.number), exchange)

            # All of them end here: one that hung up would still be computed when the first measured question comes.
            clock = asyncio.get_running_loop().time
            await asyncio.gather(*(warm(Exchange(number, sent=clock())) for number in range(load.clients or 4)))
            async with watching(http, server.url) as watch:
                number = load.questions(self.asking)
                if load.clients is not None:
                    exchanges = await closed_loop(question, load.clients, number)
                else:
                    exchanges = await open_loop(question, load.rate or 0.0, number, self.asking.seed)
            return figures(exchanges, watch.says())

    def body(self, launch: Launch, server: Running, number: int) -> dict[str, Any]:
        """The prompts one after the other, from the first on again when all have been asked."""
        asking = self.asking
        body: dict[str, Any] = {
            "model": server.model,
            "messages": [{"role": "user", "content": self.prompts[number % len(self.prompts)].text}],
            "max_tokens": asking.max_tokens,
            "temperature": asking.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if asking.ignore_eos:
            body["ignore_eos"] = True
        if asking.temperature:
            # Some servers have defaults of their own for what is not said.
            body |= {"top_p": asking.top_p, "top_k": -1, "min_p": 0.0, "seed": number}
        return body | launch.body


def loads_of(clients: Sequence[int], rates: Sequence[float]) -> list[Load]:
    return [*(Load(number) for number in clients), *(Load(rate=rate) for rate in rates)]


def pools_of(results: Results, clients: int) -> Iterator[Load]:
    """The capped loads that were measured, smallest first."""
    return (load for load in results.loads() if load.clients == clients and load.slots is not None)
