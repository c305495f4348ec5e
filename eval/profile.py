"""Where a step's time goes: by phase over real answers, and by the number of rows over a given number of slots.

`attribution` answers prompts with threads and heads. The phases of the engine are timed inside it (`Stats`), the
forward pass of the CPU runtime is split once more by the compiled code's own clocks; what none of them saw is said.
`curve` times one forward pass over draft trees of growing size below a single thread, the least of several runs.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from medusa_apar.drafting.drafter import Reads
from medusa_apar.generate import MedusaApar
from medusa_apar.job import Job, write_text
from medusa_apar.models.chat import encode
from medusa_apar.requests import Sampling
from medusa_apar.runtimes.cpu import library
from medusa_apar.runtimes.cpu.runtime import CpuRuntime
from medusa_apar.runtimes.measure import StepTimer, draft

from .prompts import Prompt
from .systems import chosen_by, seeded

ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
SLOTS, REPEATS = 512, 15
WARM_UP_TOKENS = 16
MAX_PROMPTS = 10


def attribution(
    apar: MedusaApar,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    fork: bool = True,
    sampling: Sampling | None = None,
) -> dict[str, Any]:
    """Seconds by phase over the prompts' answers, their sum as a share of all, steps and rows.

    sampling: temperature and top-p; None decodes greedily.
    """
    sampling = Sampling() if sampling is None else sampling
    runtime = apar.runtime
    phases: dict[str, float] = {}
    inside: dict[str, float] = {}
    steps = rows = 0
    whole = 0.0
    options = {"fork": fork, "return_dict_in_generate": True, **chosen_by(sampling, apar.model.generation_config)}
    if isinstance(runtime, CpuRuntime):
        apar = copy.copy(apar)  # its clocks run, and nobody else's
        apar.runtime = runtime = runtime.profiled()
    for number, prompt in enumerate([prompts[0], *prompts]):
        inputs = encode(apar.tokenizer, prompt.text)
        if sampling.temperature:
            options["seed"] = seeded(sampling, prompt.id, 0).seed
        if isinstance(runtime, CpuRuntime):
            runtime.seconds = library.Seconds()
        started = time.perf_counter()
        limit = max_new_tokens if number else min(WARM_UP_TOKENS, max_new_tokens)
        stats = apar.generate(**inputs, max_new_tokens=limit, **options).stats
        seconds = time.perf_counter() - started
        if not number:  # warm-up
            continue
        whole += seconds
        steps, rows = steps + stats.steps, rows + stats.forward_tokens
        _add(phases, stats.phase_seconds)
        if isinstance(runtime, CpuRuntime):
            _add(inside, dict(zip(library.PHASES, runtime.seconds, strict=True)))
    if inside:
        phases["forward, around the compiled code"] = phases.pop("forward") - sum(inside.values())
        phases.update({f"forward: {name}": value for name, value in inside.items()})
    return {
        "seconds": whole,
        "steps": steps,
        "rows_per_step": rows / steps,
        "phases": dict(sorted(phases.items(), key=lambda item: -item[1])),
        "attributed": sum(phases.values()) / whole,
    }


def _add(sums: dict[str, float], seconds: dict[str, float]) -> None:
    for name, value in seconds.items():
        sums[name] = sums.get(name, 0.0) + value


def curve(apar: MedusaApar, rows: Sequence[int] = ROWS, slots: int = SLOTS) -> dict[str, Any]:
    """Seconds of one forward pass by its rows, of prefilling `slots` tokens, and of the draft for so many threads."""
    runtime = apar.runtime
    found: dict[str, Any] = {"slots": slots, "rows": {}, "draft": {}}
    with torch.no_grad(), runtime.session():
        drafter = None if apar.heads is None else runtime.drafter(apar.heads)
        timer = StepTimer(apar.model, runtime, Reads.of(apar.heads, drafter), slots)
        found["prefill"] = least(timer.prefill, 3)
        timer.fill()
        for size in rows:
            found["rows"][size] = least(partial(timer.rows, size), REPEATS)
        if apar.heads is not None and drafter is not None and len(apar.options.draft_tree):
            about = drafter, apar.options.draft_tree, apar.heads.input_size
            for threads in (1, 2, 4, 8):
                found["draft"][threads] = least(partial(draft, apar.model, *about, timer.written(threads)), REPEATS)
    return found


def least(run: Callable[[], float], repeats: int) -> float:
    return min(run() for _ in range(repeats))


def run(job: Job, apar: MedusaApar, asked: Sequence[Prompt], max_new_tokens: int, sampling: Sampling) -> None:
    """profile.md and profile.json in the job's folder; the table is printed too."""
    found = attribution(apar, asked[:MAX_PROMPTS], max_new_tokens, sampling=sampling)
    costs = curve(apar)
    text = table(found, costs, apar.runtime.facts.kind)
    write_text(job.folder / "profile.md", text)
    write_text(job.folder / "profile.json", json.dumps({"attribution": found, "curve": costs}, indent=2) + "\n")
    print(text)


def table(profile: dict[str, Any], costs: dict[str, Any], kind: str) -> str:
    """Both as Markdown."""
    steps = profile["steps"]
    lines = [
        f"{steps} steps of {profile['rows_per_step']:.1f} rows, {profile['seconds'] / steps * 1e3:.1f} ms each, "
        f"{kind} weights; {profile['attributed']:.1%} of the time is accounted for.",
        "",
        "| phase | ms per step | share |",
        "|---|---|---|",
        *(
            f"| {name} | {seconds / steps * 1e3:.2f} | {seconds / profile['seconds']:.1%} |"
            for name, seconds in profile["phases"].items()
        ),
        "",
        f"One forward pass over {costs['slots']} slots; prefilling them takes {costs['prefill'] * 1e3:.0f} ms.",
        "",
        f"| rows | {' | '.join(str(n) for n in costs['rows'])} |",
        "|---" * (len(costs["rows"]) + 1) + "|",
        f"| ms | {' | '.join(f'{seconds * 1e3:.1f}' for seconds in costs['rows'].values())} |",
    ]
    if costs["draft"]:
        drafts = ", ".join(f"{seconds * 1e3:.2f} for {threads}" for threads, seconds in costs["draft"].items())
        lines += ["", f"Drafting takes, in ms by threads: {drafts}."]
    return "\n".join(lines) + "\n"
