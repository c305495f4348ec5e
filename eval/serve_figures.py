"""What a setting of the load benchmark came to: arithmetic over exchanges and samples, nothing else.

A setting's window is from the first measured question to the last measured answer. Latencies are those of measured
answers. Tokens per second are of all tokens that arrived within the window, whoever had asked for them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np

from .loops import looping_share
from .serve_client import Exchange

PERCENTILES = (50, 95, 99)
DIGITS = 6  # of seconds
_WORD = re.compile(r"\w+|[^\w\s]|\n")
KEPT = 0.97  # of the uncapped tokens per second: what a capped pool must keep


class Counts(NamedTuple):
    """What a server has counted since it started.

    steps: forward passes. shown: tokens of its answers. ended: those of answers that have come to an end. written: by
    threads, for whoever reads it or not. unread: of these, in requests that run and not in their answers so far.
    queries, hits: tokens that were looked for in its prefix cache, and those that were there: of prompts, and over vLLM
    of the paths of children too.
    """

    steps: float = 0.0
    shown: float = 0.0
    ended: float = 0.0
    written: float = 0.0
    unread: float = 0.0
    queries: float = 0.0
    hits: float = 0.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What the server said of itself at some time.

    live_slots: that threads need. unfreed_slots: that they would need, had none been freed before its request ended.
    """

    at: float
    live_slots: float
    threads: float = 0.0
    unfreed_slots: float | None = None
    counts: Counts = Counts()


@dataclass(frozen=True, slots=True)
class ServerSays:
    """A server's own counts over one setting; without anything where it tells nothing of the kind."""

    samples: Sequence[Sample] = ()
    peak_slots: float | None = None  # since it started


def figures(exchanges: Sequence[Exchange], server: ServerSays | None = None) -> dict[str, Any]:
    """The row of one setting; null wherever nothing was measured."""
    server = ServerSays() if server is None else server
    measured = [exchange for exchange in exchanges if exchange.measured]
    right = [exchange for exchange in measured if exchange.answered]
    began = min(exchange.sent for exchange in measured)
    ended = max(_end(exchange) for exchange in measured)
    seconds = ended - began
    every = [exchange for exchange in exchanges if exchange.answered and _end(exchange) <= ended]
    tokens = sum(tokens_within(exchanges, began, ended))
    latencies = [_end(exchange) - exchange.sent for exchange in right]
    first = [exchange.chunks[0].at - exchange.sent for exchange in right if exchange.chunks]
    loops = [looping(exchange) for exchange in right]
    within = [sample for sample in server.samples if began <= sample.at <= ended]
    return {
        "requests": len(right),
        "errors": dict(Counter(exchange.error or "cut off" for exchange in measured if not exchange.answered)),
        "seconds": round(seconds, DIGITS),
        "tokens": round(tokens, 3),
        "tokens_per_second": tokens / seconds if seconds else None,
        "requests_per_second": len(every) / seconds if seconds else None,
        "latency": summary(latencies),
        "first_token": summary(first),
        "inter_token": weighted_summary([gap for exchange in right for gap in token_gaps(exchange)]),
        "longest_pause": summary([pause for exchange in right if (pause := longest_pause(exchange)) is not None]),
        "looping": _mean(loops),
        "answer_tokens": _mean(exchange.tokens for exchange in right),
        "prompt_tokens": _mean(exchange.prompt_tokens for exchange in right),
        "cached_tokens": _mean(exchange.cached_tokens for exchange in right),
        "chunks": _mean(len(exchange.chunks) for exchange in right),
        "stopped": _mean(exchange.finish_reason == "stop" for exchange in right),
        "mean_slots": _mean(sample.live_slots for sample in within),
        "peak_slots": server.peak_slots,
        "threads": _mean(sample.threads for sample in within),
        "early_freed": _early_freed(within),
        **work(within),
        "latencies": [round(value, 4) for value in latencies],
        "loops": [round(share, 3) for share in loops],
    }


def work(samples: Sequence[Sample]) -> dict[str, float | None]:
    """What a server has computed between the first sample and the last, beside what it has shown.

    `steps`; `tokens_per_step`, shown ones; `generated_per_100`: tokens written for a hundred shown, of the answers that
    ended meanwhile, since of one that runs nobody knows yet what will be read; `prefix_hits`: a share of 1.
    """
    found: dict[str, float | None] = dict.fromkeys(("steps", "tokens_per_step", "generated_per_100", "prefix_hits"))
    if not samples:
        return found
    first, last = samples[0].counts, samples[-1].counts
    more = Counts(*(after - before for before, after in zip(first, last, strict=True)))
    if more.steps:
        found |= {"steps": more.steps, "tokens_per_step": more.shown / more.steps}
    if more.written and more.ended:
        in_vain = more.written - more.unread - more.shown
        found["generated_per_100"] = 100 * (1 + in_vain / more.ended)
    if more.queries:
        found["prefix_hits"] = more.hits / more.queries
    return found


def tokens_by_chunk(exchange: Exchange) -> list[float]:
    """How many tokens each chunk of an answer brought.

    Counted where the server counts with every chunk, one each where there are as many chunks as tokens; else the tokens
    are shared out by bytes of text, which is exact for the sum and an estimate for the single chunk.
    """
    chunks = exchange.chunks
    if chunks and all(chunk.tokens is not None for chunk in chunks):
        so_far = [0, *(chunk.tokens or 0 for chunk in chunks)]
        return [float(now - before) for before, now in zip(so_far, so_far[1:], strict=False)]
    if len(chunks) == exchange.tokens:
        return [1.0] * len(chunks)
    size = sum(chunk.size for chunk in chunks)
    return [(exchange.tokens or 0) * chunk.size / size for chunk in chunks]


def tokens_within(exchanges: Sequence[Exchange], began: float, ended: float) -> list[float]:
    """The tokens of every exchange that came in between.

    Those of an answer that was cut off are not counted by anybody: its bytes are, at what a byte is worth in the
    answers that were not.
    """
    whole = [exchange for exchange in exchanges if exchange.answered]
    size = sum(chunk.size for exchange in whole for chunk in exchange.chunks)
    worth = sum(exchange.tokens or 0 for exchange in whole) / size if size else 0.0
    found = []
    for exchange in exchanges:
        told = exchange.answered or (exchange.chunks and exchange.chunks[0].tokens is not None)
        shares = tokens_by_chunk(exchange) if told else [worth * chunk.size for chunk in exchange.chunks]
        arrived = zip(exchange.chunks, shares, strict=True)
        found.append(math.fsum(tokens for chunk, tokens in arrived if began <= chunk.at <= ended))
    return found


def token_gaps(exchange: Exchange) -> list[tuple[float, float]]:
    """(seconds per token, tokens) of every chunk but the first: its tokens share the wait for it alike.

    Tokens may have no text and make no chunk: the last chunk's share the wait for the answer's finish too.
    """
    gaps, waited = [], 0.0
    pairs = zip(exchange.chunks, exchange.chunks[1:], strict=False)
    for (before, chunk), tokens in zip(pairs, tokens_by_chunk(exchange)[1:], strict=True):
        waited += chunk.at - before.at
        if tokens > 0:
            gaps.append((waited / tokens, tokens))
            waited = 0.0
    if gaps:
        seconds, tokens = gaps[-1]
        gaps[-1] = (seconds + (waited + _silence(exchange)) / tokens, tokens)
    return gaps


def longest_pause(exchange: Exchange) -> float | None:
    """Seconds from one chunk to the next, or from the last to the answer's finish; None for an answer without text."""
    times = [chunk.at for chunk in exchange.chunks]
    if not times:
        return None
    return max(
        later - earlier for earlier, later in zip(times, [*times[1:], times[-1] + _silence(exchange)], strict=True)
    )


def _silence(exchange: Exchange) -> float:
    """Seconds from the last text to the chunk that says that nothing follows."""
    return 0.0 if exchange.finished is None else max(exchange.finished - exchange.chunks[-1].at, 0.0)


def looping(exchange: Exchange) -> float:
    """`looping_share` of an answer by its words, marks and line breaks, since few servers tell of tokens."""
    numbers: dict[str, int] = {}
    return looping_share([numbers.setdefault(word, len(numbers)) for word in _WORD.findall("".join(exchange.texts))])


def summary(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles, these interpolated between neighbours."""
    if not values:
        return None
    found = np.percentile(values, PERCENTILES)
    return {"mean": fmean(values)} | {f"p{p}": float(value) for p, value in zip(PERCENTILES, found, strict=True)}


def weighted_summary(values: Sequence[tuple[float, float]]) -> dict[str, float] | None:
    """Of (value, weight): the weighted mean; a percentile is the least value that so much of the weight lies at or
    below."""
    if not values:
        return None
    ordered = sorted(values)
    numbers, weights = np.asarray(ordered, dtype=float).T
    below = np.cumsum(weights)
    places = np.searchsorted(below, np.asarray(PERCENTILES) / 100 * below[-1] * (1 - 1e-12))
    found = {f"p{p}": float(numbers[place]) for p, place in zip(PERCENTILES, places, strict=True)}
    return {"mean": float(numbers @ weights / below[-1])} | found


@dataclass(frozen=True, slots=True)
class SmallestPool:
    """The smallest pool that was measured to keep enough, and where the line between it and the next crosses.

    crossing: in slots; None where every pool that was measured keeps enough.
    """

    slots: int
    crossing: float | None


def smallest_pool(
    points: Iterable[tuple[int, float | None]], uncapped: float, kept: float = KEPT
) -> SmallestPool | None:
    """points: (slots, tokens per second), None where requests failed. A pool counts if all larger ones keep enough too.

    None where even the largest does not.
    """
    last: tuple[int, float] | None = None
    for slots, speed in sorted(points, reverse=True, key=lambda point: point[0]):
        share = (speed or 0.0) / uncapped
        if share < kept:
            if last is None:
                return None
            part = (last[1] - kept) / (last[1] - share)
            return SmallestPool(last[0], last[0] - part * (last[0] - slots))
        last = slots, share
    return None if last is None else SmallestPool(last[0], None)


def median_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The middle of several turns, figure by figure; errors are all of theirs."""
    found: dict[str, Any] = {}
    for key in rows[0]:
        values = [row[key] for row in rows if row.get(key) is not None]
        if key == "errors":
            found[key] = dict(sum((Counter(row[key]) for row in rows), Counter()))
        elif not values:
            found[key] = None
        elif isinstance(values[0], dict):
            found[key] = {name: median(each[name] for each in values) for name in values[0]}
        elif isinstance(values[0], (int, float)):
            found[key] = median(values)
        else:
            found[key] = values[0]
    return found


def _early_freed(samples: Sequence[Sample]) -> float | None:
    """Share of the slots that are free only because a thread has ended before its request, on average over time."""
    known = [sample for sample in samples if sample.unfreed_slots is not None]
    unfreed = sum(sample.unfreed_slots or 0.0 for sample in known)
    return 1 - sum(sample.live_slots for sample in known) / unfreed if unfreed else None


def _end(exchange: Exchange) -> float:
    return math.inf if exchange.ended is None else exchange.ended


def _mean(values: Iterable[float | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return fmean(known) if known else None
