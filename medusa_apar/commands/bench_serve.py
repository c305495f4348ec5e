"""`bench --serve`: what servers do under load. Not a subcommand of its own: `bench.py` passes on."""

from __future__ import annotations

import argparse
from typing import Any

from medusa_apar.arguments import number

SYSTEMS = ("plain", "threads", "heads", "both")
CLIENTS = (1, 2, 4, 8, 16, 32)
MAX_NEW_TOKENS = 256
PER_CLIENT, LEAST, SECONDS = 4, 16, 60.0
UNDER_LOAD = 16
AT_A_RATE = 64  # questions that a server has room for at once where they come at a rate

# What `bench` has and a server's client has not, with what it is where nobody asks for it.
FOREIGN: dict[str, Any] = {
    "check": False, "profile": False, "kernels": False, "judge": None, "judge_model": None, "judge_against": None,
    "ceilings": None, "budget": None, "runtime": "auto", "trust_remote_code": False, "quality": False, "base": None,
    "batch": None,
}  # fmt: skip
OWN = ("clients", "rates", "url", "url_model", "may_stop", "pool_slots_sweep", "sweep_clients", "requests_per_client",
       "min_requests", "seconds", "prefix_cache", "seed")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--serve", action="store_true", help="measure servers under load instead, see above")
    add = parser.add_argument_group("with --serve").add_argument
    listed = " ".join(map(str, CLIENTS))
    add("--clients", type=number(int, 1, 4096), nargs="*", metavar="N",
        help=f"numbers of clients at once (default: {listed}, none with --rates)")  # fmt: skip
    add("--rates", type=number(float, 0, 1e4, open_low=True), nargs="+", metavar="R",
        help="questions per second, Poisson")  # fmt: skip
    add("--url", metavar="URL",
        help="of a server that runs already, as in http://localhost:8000 (key: $OPENAI_API_KEY)")  # fmt: skip
    add("--url-model", metavar="NAME", help="which of its models (default: the only one)")
    add("--may-stop", action="store_true", default=None, help="let answers end where the model ends them")
    add("--pool-slots-sweep", type=number(int, 1), nargs="*", metavar="N",
        help="KV pools to try (default: shares of the most that was in use)")  # fmt: skip
    add("--sweep-clients", type=number(int, 1, 4096), metavar="N",
        help=f"clients of the sweep (default: {UNDER_LOAD})")  # fmt: skip
    add("--requests-per-client", type=number(int, 1), metavar="N",
        help=f"questions measured for each client (default: {PER_CLIENT})")  # fmt: skip
    add("--min-requests", type=number(int, 1), metavar="N",
        help=f"questions measured of every load, at least (default: {LEAST})")  # fmt: skip
    add("--seconds", type=number(float, 0, open_low=True), metavar="S",
        help=f"of each of --rates (default: {SECONDS:g})")  # fmt: skip
    add("--prefix-cache", action="store_true", default=None, help="leave the servers' prefix caches on")
    add("--seed", type=number(int, 0), metavar="N", help="of the times of --rates (default: 0)")


def refuse_without(args: argparse.Namespace) -> None:
    """ValueError where an option of --serve is there without it."""
    for name in OWN:
        if getattr(args, name) is not None:
            raise ValueError(f"{_flag(name)} is for --serve")


def run(args: argparse.Namespace) -> int:
    names = _checked(args)
    from medusa_apar.eval import prompts, serve_servers

    serve_servers.check(names, args.model)
    asked = prompts.read(args.prompts, args.limit)
    turns = args.repeat

    import torch

    from medusa_apar.eval import serve_bench, serve_tables
    from medusa_apar.job import Job, machine, quiet, write_text

    quiet()
    if args.threads:
        torch.set_num_threads(args.threads)
    clients = CLIENTS if args.clients is None and args.rates is None else args.clients or ()
    sweep_clients = args.sweep_clients or UNDER_LOAD
    limit = args.max_new_tokens or MAX_NEW_TOKENS
    swept = [] if args.pool_slots_sweep is None else [sweep_clients]
    longest = max(len(prompt.text.encode()) for prompt in asked)
    serving = serve_servers.Serving(
        args.model,
        args.heads,
        args.quantize,
        args.dtype,
        torch.get_num_threads(),
        clients=max([*clients, *swept, *(AT_A_RATE for _ in args.rates or ())]),
        context=-(-(longest + limit + 128) // 256) * 256,  # a token is a byte at least, and templates add some
        prefix_cache=bool(args.prefix_cache),
    )
    started = [name for name in names if name != serve_servers.URL]
    url_model = None if args.url is None else serve_servers.asked_model(args.url, args.url_model)
    asking = serve_bench.Asking(
        *(prompts.digest(asked), limit, not args.may_stop, args.temperature, args.top_p, serving.prefix_cache),
        *(args.model, args.heads, args.quantize, args.dtype, machine()["cpu"]),
        *(serve_servers.weights_of(serving) if started else "", serve_servers.software()),
        *(serving.clients if started else 0, url_model),
        *(args.requests_per_client or PER_CLIENT, args.min_requests or LEAST),
        *(args.seconds or SECONDS, args.seed or 0),
    )
    with serve_servers.ended_by_signals(), Job(args.out, "bench", vars(args)) as job:
        results = serve_bench.Results(args.out, asking)
        launches = serve_servers.prepare(names, serving, args.out, args.url, url_model)
        measure = serve_bench.HttpMeasure(asking, asked)
        serve_bench.measure_all(job, results, launches, serve_bench.loads_of(clients, args.rates or ()), turns, measure)
        if args.pool_slots_sweep is not None:
            serve_bench.measure_pools(job, results, launches, sweep_clients, args.pool_slots_sweep, turns, measure)
        job.report(**serve_tables.summary(results, launches))
        text = serve_tables.table(results, launches, asking, turns)
        write_text(args.out / serve_tables.TABLE, text)
        _plot(job, results, [launch.name for launch in launches])
        print(text)
    return 0


def _checked(args: argparse.Namespace) -> list[str]:
    """The servers' names. ValueError, in one sentence and before anything is loaded, for what cannot be asked."""
    from medusa_apar.eval.serve_servers import NAMES, OURS, URL, base_of

    for name, value in FOREIGN.items():
        if getattr(args, name) != value:
            raise ValueError(f"{_flag(name)} is not for --serve")
    names = list(args.systems if args.systems is not None else () if args.url else SYSTEMS)
    for name in names:
        if name not in NAMES:
            raise ValueError(f"server {name!r} is none of {', '.join(NAMES)}; others are named by --url")
    if len(set(names)) < len(names):
        raise ValueError(f"--systems names one twice: {' '.join(names)}")
    if args.url is not None:
        base_of(args.url)
        names.append(URL)
    elif args.url_model is not None:
        raise ValueError("--url-model needs --url, the server that has it")
    if args.pool_slots_sweep is None and args.sweep_clients is not None:
        raise ValueError("--sweep-clients needs --pool-slots-sweep")
    if args.pool_slots_sweep is not None and not set(names) & set(OURS):
        raise ValueError(f"--pool-slots-sweep is for our servers: name one of {', '.join(OURS)} in --systems")
    if args.clients is not None and not args.clients and args.rates is None and args.pool_slots_sweep is None:
        raise ValueError("--clients names no number, and there is no --rates")
    for flag, values in (("--clients", args.clients), ("--rates", args.rates)):
        if values is not None and len(set(values)) < len(values):
            raise ValueError(f"{flag} names one twice: {' '.join(f'{value:g}' for value in values)}")
    if args.top_p < 1 and not args.temperature:
        raise ValueError(f"--top-p {args.top_p:g} needs a --temperature above 0: answers are greedy without one")
    return names


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _plot(job: Any, results: Any, names: list[str]) -> None:
    try:
        from medusa_apar.eval.serve_plots import plot
    except ImportError:
        job.say("No plots: they need matplotlib (pip install 'medusa-apar[eval]').")
        return
    plot(job.folder, results, names)
