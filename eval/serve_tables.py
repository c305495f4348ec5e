"""A load benchmark's figures as Markdown: the servers side by side under each load, pools, and what was aimed at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any, NamedTuple

from .serve_bench import KEPT_OF, Asking, Load, Results, kept, pools_of
from .serve_figures import KEPT, SmallestPool, smallest_pool
from .serve_launch import Launch
from .serve_servers import LLAMA_Q4, LLAMA_Q8
from .serve_vllm import PLAIN, THREADS, VLLM

COLUMNS = (
    *("server", "weights", "tokens/s", "times", "answers/s", "latency, s: mean", "times", "p50", "p95", "p99"),
    *(
        "first token, s: mean",
        "p95",
        "ms per token: mean",
        "p99",
        "longest pause, s: p95",
        "tokens",
        "looping",
        "engine steps",
        "tokens per step",
        "generated per 100 shown",
        "prefix hits",
        "slots: mean",
        "peak",
        "freed early",
    ),
    "failed",
)
WORK = (("steps", 0), ("tokens_per_step", 2), ("generated_per_100", 0))
TABLE = "load.md"
UNDER_LOAD = 16  # clients, at which most goals are set
UNLIKE = 0.5  # tokens of a prompt by which servers may differ on average


class Aim(NamedTuple):
    """What threads over vLLM are to reach, times what one thread does; generated: tokens per 100 shown, at most."""

    clients: int
    per_step: float
    speed: float
    sooner: float
    generated: int | None = None


AIMS = (Aim(1, 1.72, 1.45, 1.45, 125), Aim(4, 1.32, 1.3, 1.4), Aim(16, 1.0, 1.0, 1.05, 115))


def times(results: Results, system: str, other: str, load: Load, *path: str) -> float | None:
    """A figure of one server by that of another: the median of the turns' ratios."""
    ratios, others = [], results.turns(other, load)
    for turn, row in results.turns(system, load).items():
        value, base = _at(row, path), _at(others.get(turn), path)
        if value is not None and base:
            ratios.append(value / base)
    return median(ratios) if ratios else None


def smallest(results: Results, system: str, clients: int) -> SmallestPool | None:
    """The smallest pool with which a server keeps 97 % of its uncapped tokens per second at so many clients."""
    shares = [(load.slots or 0, kept(results, system, load)) for load in pools_of(results, clients)
              if results.middle(system, load) is not None]  # fmt: skip
    return smallest_pool(shares, 1.0)


def table(results: Results, launches: Sequence[Launch], asking: Asking, turns: int) -> str:
    ends = "whose ends are ignored" if asking.ignore_eos else "that may stop"
    chosen = f"sampled at temperature {asking.temperature:g}" if asking.temperature else "greedy"
    lines = [
        f"{asking.model}, {asking.cpu}; {chosen} answers of at most {asking.max_tokens} tokens {ends}; "
        f"{'medians of ' + str(turns) + ' turns' if turns > 1 else 'one turn'}, prefix caches "
        f"{_caches(launches, asking)}. Times are against {launches[0].name}, in the same turn.",
        "",
        *(_engine(launch) for launch in launches),
        "",
    ]
    for load in results.loads():
        if load.slots is None and load.beside is None:
            lines += [f"**{load}**", "", _row(COLUMNS), _row(["---"] * len(COLUMNS))]
            lines += [_row(cells) for launch in launches if (cells := _cells(results, launch, launches[0].name, load))]
            lines.append("")
    return "\n".join([*lines, *_doubts(results, launches, asking), *_pools(results, launches), *_goals(results)])


def summary(results: Results, launches: Sequence[Launch]) -> dict[str, Any]:
    """For `report.json`: the middle row of each server under each load, and the smallest pools."""
    names = [launch.name for launch in launches]
    rows: list[dict[str, Any]] = []
    for load in results.loads():
        middles = ((name, results.middle(name, load)) for name in names)
        rows += [{"system": name} | asdict(load) | row for name, row in middles if row is not None]
    pools = {
        name: {str(clients): asdict(found)}
        for clients in _capped_clients(results)
        for name in names
        if (found := smallest(results, name, clients)) is not None
    }
    engines = {launch.name: {"weights": launch.weights, "software": launch.software} for launch in launches}
    return {"systems": engines, "loads": rows, "smallest_pools": pools, "kept": KEPT}


def _caches(launches: Sequence[Launch], asking: Asking) -> str:
    cached = [launch.name for launch in launches if launch.cached]
    if asking.prefix_cache or not cached:
        return "on" if asking.prefix_cache else "off"
    return (
        f"off, but on in {' and '.join(cached)}: prompts differ, so that beside a chat's fixed beginning, and the few "
        "prompts that had warmed it up, an answer finds there what its own threads have left"
    )


def _engine(launch: Launch) -> str:
    software = f", {launch.software}" if launch.software else ""
    return f"- {launch.name}: {launch.about} ({launch.weights}{software})"


def _cells(results: Results, launch: Launch, first: str, load: Load) -> list[str]:
    row = results.middle(launch.name, load)
    if row is None:
        return []
    failed = sum(row["errors"].values())
    return [
        launch.name,
        launch.weights,
        _number(row["tokens_per_second"], 1),
        _number(times(results, launch.name, first, load, "tokens_per_second"), 2),
        _number(row["requests_per_second"], 2),
        _number(_at(row, ("latency", "mean")), 2),
        _number(times(results, launch.name, first, load, "latency", "mean"), 2),
        *(_number(_at(row, ("latency", p)), 2) for p in ("p50", "p95", "p99")),
        *(_number(_at(row, ("first_token", p)), 2) for p in ("mean", "p95")),
        *(_number(_at(row, ("inter_token", p)), 1, 1000) for p in ("mean", "p99")),
        _number(_at(row, ("longest_pause", "p95")), 2),
        _number(row["answer_tokens"], 0),
        _share(row["looping"]),
        *(_number(row.get(key), digits) for key, digits in WORK),
        _share(row.get("prefix_hits")),
        _number(row["mean_slots"], 0),
        _number(row["peak_slots"], 0),
        _share(row["early_freed"]),
        str(failed) if failed else "-",
    ]


def _doubts(results: Results, launches: Sequence[Launch], asking: Asking) -> list[str]:
    """What makes servers unlike each other that should have done the same work."""
    lines = []
    for load in results.loads():
        rows = {launch.name: row for launch in launches if (row := results.middle(launch.name, load)) is not None}
        read = {name: row["prompt_tokens"] for name, row in rows.items() if row["prompt_tokens"] and not row["errors"]}
        if read and max(read.values()) - min(read.values()) > UNLIKE:
            told = ", ".join(f"{name} {tokens:.1f}" for name, tokens in read.items())
            lines.append(f"- {load}: prompts have unlike numbers of tokens, {told} on average.")
        uncached = [launch.name for launch in launches if launch.name in rows and not launch.cached]
        cached = [f"{name} {tokens:.1f}" for name in uncached if (tokens := rows[name]["cached_tokens"])]
        if cached and not asking.prefix_cache:
            lines.append(f"- {load}: prompt tokens came from a cache, which was to be off: {', '.join(cached)}.")
    return ["**Not alike**", "", *lines, ""] if lines else []


def _pools(results: Results, launches: Sequence[Launch]) -> list[str]:
    lines = []
    names = [launch.name for launch in launches if launch.pooled]
    for clients in _capped_clients(results):
        lines += [
            f"**Pools capped**, {clients} clients: tokens per second, and the share of what is reached uncapped in the "
            "same turn; and the share of the tokens that a step brings.",
            "",
            _row(["slots", *names]),
            _row(["---"] * (len(names) + 1)),
        ]
        for load in pools_of(results, clients):
            cells = [str(load.slots)]
            for name in names:
                row = results.middle(name, load)
                cells.append("-" if row is None else _capped(results, name, load, row))
            lines.append(_row(cells))
        found = {name: smallest(results, name, clients) for name in names}
        told = [f"{name} {_pool(pool)}" for name, pool in found.items() if pool is not None]
        if told:
            lines += ["", f"Smallest pool that keeps {KEPT:.0%}: {', '.join(told)}."]
        lines.append("")
    return lines


def _capped(results: Results, name: str, load: Load, row: dict[str, Any]) -> str:
    if row["errors"]:
        return f"{sum(row['errors'].values())} failed"
    by_time, by_step = (kept(results, name, load, figure) for figure in KEPT_OF)
    counted = f", {by_step:.0%} for a step" if by_step else ""
    return f"{_number(row['tokens_per_second'], 1)} ({by_time:.0%}{counted})"


def _pool(pool: SmallestPool) -> str:
    return (
        f"at most {pool.slots}" if pool.crossing is None else f"{pool.slots} (the line crosses at {pool.crossing:.0f})"
    )


def _goals(results: Results) -> list[str]:
    """What was aimed at, wherever both sides were measured."""
    at, rows = Load(UNDER_LOAD), []

    def add(goal: str, found: str | None, load: Load, *systems: str) -> None:
        if found is not None:
            rows.append(_row([goal, found + _failures(results, load, systems)]))

    def speed(system: str, other: str, load: Load = at) -> str | None:
        found = times(results, system, other, load, "tokens_per_second")
        return None if found is None else f"{found:.2f}x"

    add("both against vLLM, tokens/s: 3x", speed("both", VLLM), at, "both", VLLM)
    llamas = {name: times(results, "both", name, at, "tokens_per_second") for name in (LLAMA_Q4, LLAMA_Q8)}
    known = {name: found for name, found in llamas.items() if found}
    if known:
        better = min(known, key=lambda name: known[name])
        goal = "both against llama.cpp, the better one, tokens/s: 2x"
        add(goal, speed("both", better), at, "both", better)
    latency = times(results, "threads", "plain", at, "latency", "mean")
    shown = None if latency is None else f"{latency - 1:+.0%}"
    add("threads against plain, mean latency: -20 to -35 %", shown, at, "threads", "plain")
    add("threads against plain, tokens/s: no lower", speed("threads", "plain"), at, "threads", "plain")
    if (shown := _pool_goal(*(smallest(results, name, UNDER_LOAD) for name in ("threads", "plain")))) is not None:
        rows.append(_row(["threads against plain, smallest pool: -50 %", shown]))
    for on, off in (("heads", "plain"), ("both", "threads")):
        for clients in (1, UNDER_LOAD, 32):
            goal = f"guesses ({on} against {off}), {clients} clients: 0.97x or more"
            add(goal, speed(on, off, Load(clients)), Load(clients), on, off)
    _goals_over_vllm(results, add)
    if not rows:
        return []
    return [f"**Goals**, {UNDER_LOAD} clients where none are named", "", "| goal | found |", "|---|---|", *rows, ""]


def _goals_over_vllm(results: Results, add: Callable[..., None]) -> None:
    """`add`: of a goal, what was found or None, the load, and the systems that it is about."""
    pair = THREADS, PLAIN
    for aim in AIMS:
        load = Load(aim.clients)
        what = f"threads against plain over vLLM, {load}"

        for figure, least, found in (
            ("tokens per engine step", aim.per_step, times(results, *pair, load, "tokens_per_step")),
            ("tokens/s", aim.speed, times(results, *pair, load, "tokens_per_second")),
            ("as soon, on average", aim.sooner, times(results, PLAIN, THREADS, load, "latency", "mean")),
        ):
            add(f"{what}, {figure}: {least:g}x", None if found is None else f"{found:.2f}x", load, *pair)
        written = (results.middle(THREADS, load) or {}).get("generated_per_100")
        if aim.generated is not None and written is not None:
            goal = f"threads over vLLM, {load}, generated per 100 shown: {aim.generated} at most"
            add(goal, f"{written:.0f}", load, THREADS)
    slots = times(results, *pair, Load(UNDER_LOAD), "mean_slots")
    shown = None if slots is None else f"{slots - 1:+.0%}"
    add("threads against plain over vLLM, mean slots: -20 %", shown, Load(UNDER_LOAD), *pair)


def _pool_goal(threads: SmallestPool | None, plain: SmallestPool | None) -> str | None:
    """Where the lines cross; where one has not, its smallest pool is only a bound."""
    if threads is None or plain is None:
        return None
    if threads.crossing is None and plain.crossing is None:
        return "not known: the smallest pools that were tried keep enough"
    ratio = (threads.crossing or threads.slots) / (plain.crossing or plain.slots)
    bound = "at most " if threads.crossing is None else "at least " if plain.crossing is None else ""
    return f"{bound}{ratio - 1:+.0%}"


def _failures(results: Results, load: Load, systems: Sequence[str]) -> str:
    """A server that has failed some has done less work."""
    rows = {system: results.middle(system, load) for system in systems}
    failed = {system: sum(row["errors"].values()) for system, row in rows.items() if row is not None and row["errors"]}
    told = ", ".join(f"{system} has failed {number}" for system, number in failed.items())
    return f" (not comparable: {told})" if told else ""


def _capped_clients(results: Results) -> list[int]:
    return sorted({load.clients for load in results.loads() if load.slots is not None and load.clients is not None})


def _at(row: dict[str, Any] | None, path: Sequence[str]) -> float | None:
    value: Any = row
    for name in path:
        value = None if value is None else value.get(name)
    figure: float | None = value
    return figure


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, digits: int, scale: float = 1.0) -> str:
    return "-" if value is None else f"{scale * value:.{digits}f}"
