"""What Prometheus reads: counts and times of answers, and how the engine stands. Names are vLLM's under our prefix."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from medusa_apar.engine.stats import Stats

PREFIX = "medusa_apar:"
_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 320)
_TOKENS = tuple(part * 10**power for power in range(6) for part in (1, 2, 5))  # of a request
# Tokens of a step, each bound a power of two, as `Stats.iteration_tokens` counts them.
_ITERATION_TOKENS = (1, *(1 << power for power in range(3, 15)))


class Metrics:
    """Has a registry of its own, so that two servers in one process do not meet.

    Args:
        stats: the engine's; asked whenever the metrics are read.
    """

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_OfEngine(stats))

        def counter(name: str, said: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, said, labels, registry=self.registry)

        def histogram(name: str, said: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(PREFIX + name, said, registry=self.registry, buckets=buckets)

        self.prompt_tokens = counter(
            "prompt_tokens", "Tokens of the prompts that were taken, once for all choices of a request."
        )
        self.generation_tokens = counter("generation_tokens", "Tokens of the answers.")
        self.ended = counter("request_success", "Answers that came to an end.", "finished_reason")
        self.first_token = histogram("time_to_first_token_seconds", "From the request to its first readable token.")
        self.inter_token = histogram(
            "inter_token_latency_seconds", "Between an answer's tokens; several at once share."
        )
        self.whole = histogram("e2e_request_latency_seconds", "From the request to the end of its answer.")
        self.queued = histogram("request_queue_time_seconds", "In the engine's queue, up to the first step.")
        self.prompt_lengths = histogram("request_prompt_tokens", "Tokens of an answer's prompt.", _TOKENS)
        self.answer_lengths = histogram("request_generation_tokens", "Tokens of an answer, at its end.", _TOKENS)
        self._mean_seconds = 0.0  # of late

    def page(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def measure(self, began: float) -> Measure:
        """For one answer of an HTTP request that has begun then, by `time.perf_counter`."""
        return Measure(self, began)

    @property
    def mean_seconds(self) -> float:
        """How long answers have taken of late; 0 before the first."""
        return self._mean_seconds

    def _took(self, seconds: float) -> None:
        self.whole.observe(seconds)
        self._mean_seconds = 0.9 * self._mean_seconds + 0.1 * seconds if self._mean_seconds else seconds


class Measure:
    """Counts and times one answer. Times are those at which its reader takes the tokens."""

    def __init__(self, metrics: Metrics, began: float) -> None:
        self._metrics = metrics
        self._began = self._last = began
        self._waits, self._tokens = True, 0

    def taken(self, prompt_tokens: int, new: int) -> None:
        """new: as many of them as no other answer of the same request has counted."""
        self._metrics.prompt_lengths.observe(prompt_tokens)
        self._metrics.prompt_tokens.inc(new)

    def queued(self, seconds: float | None) -> None:
        """As an output says it; None: its first step has not begun."""
        if self._waits and seconds is not None:
            self._waits = False
            self._metrics.queued.observe(seconds)

    def wrote(self, tokens: int) -> None:
        if not tokens:
            return
        now, its = time.perf_counter(), self._metrics
        its.generation_tokens.inc(tokens)
        if not self._tokens:
            its.first_token.observe(now - self._began)
        waited_for = tokens if self._tokens else tokens - 1
        for _ in range(waited_for):
            its.inter_token.observe((now - self._last) / waited_for)
        self._tokens += tokens
        self._last = now

    def ended(self, reason: str) -> None:
        self._metrics.ended.labels("abort" if reason == "aborted" else reason).inc()
        self._metrics.answer_lengths.observe(self._tokens)
        self._metrics._took(time.perf_counter() - self._began)


class _OfEngine:
    """A collector that asks the engine when it is read."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats = stats

    def describe(self) -> list[Metric]:
        return []  # so that the engine is not asked at once

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        slots_there_are = stats.live_slots + stats.cached_slots + stats.free_slots
        for name, said, value in (
            ("num_requests_running", "Requests that run.", stats.running),
            ("num_requests_waiting", "Requests in the queue.", stats.waiting),
            ("threads_running", "Live threads of the requests that run.", stats.threads),
            ("kv_cache_usage_perc", "Live KV slots, of 1.", stats.live_slots / max(slots_there_are, 1)),
            ("kv_slots_peak", "Most KV slots in use at once so far.", stats.peak_slots),
            ("unread_tokens", "Written in requests that run, but not in their answers so far.", stats.unread_tokens),
            ("kv_slots_unfreed", "Live ones, had none been freed before its request ended.", stats.unfreed_slots),
        ):
            yield GaugeMetricFamily(PREFIX + name, said, value)
        slots = GaugeMetricFamily(PREFIX + "kv_slots", "KV slots by what they hold.", labels=["state"])
        for state, value in (("live", stats.live_slots), ("cached", stats.cached_slots), ("free", stats.free_slots)):
            slots.add_metric([state], value)
        yield slots
        for name, said, value in (
            ("forks", "Threads that were forked.", stats.forks),
            ("written_tokens", "Tokens that threads wrote, those included that nobody reads.", stats.written_tokens),
            ("forward_tokens", "Rows of all forward passes, prompts and draft nodes included.", stats.forward_tokens),
            ("steps", "Forward passes.", stats.steps),
            ("prefix_cache_queries", "Prompt tokens looked for in the prefix cache.", stats.prefix_cache_queries),
            ("prefix_cache_hits", "Prompt tokens found there.", stats.prefix_cache_hits),
            ("spec_decode_num_drafts", "Draft trees.", stats.drafts.total()),
            ("spec_decode_num_draft_tokens", "Draft nodes.", stats.drafted.total()),
            ("spec_decode_num_accepted_tokens", "Draft nodes that were right.", stats.accepted.total()),
            ("num_preemptions", "Requests whose slots were all taken back.", stats.preemptions),
        ):
            yield CounterMetricFamily(PREFIX + name, said, value)
        yield _by_position(stats.drafts)
        read = "Tokens of a step: fed beyond the roots of threads that decode, and gained."
        yield HistogramMetricFamily(
            PREFIX + "iteration_tokens_total", read, _cumulated(stats.iteration_tokens), stats.iteration_tokens_sum
        )


def _by_position(drafts: Mapping[int, int]) -> Metric:
    """drafts: as of `Stats`."""
    said = "Draft trees of which so many nodes and one more were accepted."
    found = CounterMetricFamily(PREFIX + "spec_decode_num_accepted_tokens_per_pos", said, labels=["position"])
    for position in range(max(drafts, default=0)):
        found.add_metric([str(position)], sum(count for accepted, count in drafts.items() if accepted > position))
    return found


def _cumulated(steps: Mapping[int, int]) -> list[tuple[str, float]]:
    """steps: by their tokens, a power of two."""
    bounds = [(str(float(bound)), bound) for bound in _ITERATION_TOKENS]
    found = [(name, sum(n for tokens, n in steps.items() if tokens <= bound)) for name, bound in bounds]
    return [*found, ("+Inf", sum(steps.values()))]
