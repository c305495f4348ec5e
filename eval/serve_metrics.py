"""What a server tells of itself at `/metrics`, looked at while it is under load."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import httpx

from .serve_figures import Counts, Sample, ServerSays

EVERY = 0.25  # seconds between two looks
PREFIX = "medusa_apar:"
LIVE, PEAK = f'{PREFIX}kv_slots{{state="live"}}', f"{PREFIX}kv_slots_peak"
THREADS = f"{PREFIX}threads_running"
UNFREED = f"{PREFIX}kv_slots_unfreed"
COUNTED = {  # what a server does not tell stays 0
    "steps": "steps_total",
    "shown": "generation_tokens_total",
    "ended": "request_generation_tokens_sum",
    "written": "written_tokens_total",
    "unread": "unread_tokens",
    "queries": "prefix_cache_queries_total",
    "hits": "prefix_cache_hits_total",
}
_LINE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*(?:\{.*\})?) (?P<value>\S+)", re.MULTILINE)


def parse(text: str) -> dict[str, float]:
    """Prometheus' text: `name{labels}`, as it is written, and its number."""
    found = {}
    for line in _LINE.finditer(text):
        with suppress(ValueError):
            found[line["name"]] = float(line["value"])
    return found


@dataclass(slots=True)
class Watch:
    """What was seen while watching."""

    samples: list[Sample] = field(default_factory=list)
    peak_slots: float | None = None

    def see(self, found: dict[str, float], at: float) -> None:
        if LIVE not in found:
            return
        self.peak_slots = found.get(PEAK)
        counts = Counts(**{name: found.get(PREFIX + metric, 0.0) for name, metric in COUNTED.items()})
        self.samples.append(Sample(at, found[LIVE], found.get(THREADS, 0.0), found.get(UNFREED), counts))

    def says(self) -> ServerSays:
        return ServerSays(tuple(self.samples), self.peak_slots)


@asynccontextmanager
async def watching(http: httpx.AsyncClient, url: str, every: float = EVERY) -> AsyncIterator[Watch]:
    """Looks at a server's metrics while the block runs; a server without any leaves the watch empty."""
    watch, clock = Watch(), asyncio.get_running_loop().time

    async def look() -> None:
        with suppress(httpx.HTTPError):  # what is asked matters here, not what is told beside
            answer = await http.get(f"{url}/metrics")
            if answer.status_code == 200:
                watch.see(parse(answer.text), clock())

    async def watch_on() -> None:
        while True:
            await look()
            await asyncio.sleep(every)

    task = asyncio.create_task(watch_on())
    try:
        yield watch
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await look()
