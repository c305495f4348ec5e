"""The arithmetic of the load benchmark, on schedules whose figures are known."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medusa_apar.eval.serve_client import Chunk, Exchange
from medusa_apar.eval.serve_figures import (
    Counts,
    Sample,
    ServerSays,
    SmallestPool,
    figures,
    longest_pause,
    looping,
    median_row,
    smallest_pool,
    summary,
    token_gaps,
    tokens_by_chunk,
    tokens_within,
    weighted_summary,
    work,
)
from medusa_apar.eval.serve_metrics import LIVE, Watch, parse
from tests.support.stand_in import METRICS


def exchange(number, sent, chunks, ended=None, tokens=None, **more):
    return Exchange(
        number,
        sent=sent,
        chunks=[Chunk(*chunk) for chunk in chunks],
        ended=ended,
        tokens=tokens,
        prompt_tokens=10,
        finish_reason=None if tokens is None else "length",
        **more,
    )


def two_clients():
    """Two clients, three measured questions; the second client's next one is cut off half way."""
    return [
        exchange(0, 10.0, [(11.0, 4), (12.0, 4), (14.0, 8)], 14.0, tokens=8),
        exchange(1, 10.0, [(12.0, 2), (18.0, 6)], 18.0, tokens=4),
        exchange(2, 14.0, [(15.0, 8), (16.0, 8)], 16.0, tokens=8),
        exchange(3, 16.0, [(17.0, 4), (19.0, 100)], measured=False),
    ]


def test_a_settings_figures():
    says = ServerSays([Sample(9, 1000.0), Sample(11, 6.0, 2.0, 8.0), Sample(13, 10.0, 4.0, 12.0)], 20.0)
    found = figures(two_clients(), says)
    assert found["requests"] == 3 and found["errors"] == {} and found["seconds"] == 8.0
    # Two bytes a token: 20 tokens of answers, and four bytes of the one that was cut off before the end.
    assert found["tokens"] == 22.0 and found["tokens_per_second"] == 2.75 and found["requests_per_second"] == 3 / 8
    assert found["latencies"] == [4.0, 8.0, 2.0]
    assert found["latency"] == pytest.approx({"mean": 14 / 3, "p50": 4.0, "p95": 7.6, "p99": 7.92})
    assert found["first_token"] == pytest.approx({"mean": 4 / 3, "p50": 1.0, "p95": 1.9, "p99": 1.98})
    # Seconds per token and tokens: 0.5 of 2, 0.5 of 4, 2 of 3, 0.25 of 4.
    assert found["inter_token"] == pytest.approx({"mean": 10 / 13, "p50": 0.5, "p95": 2.0, "p99": 2.0})
    assert (found["answer_tokens"], found["prompt_tokens"], found["chunks"]) == (20 / 3, 10.0, 7 / 3)
    assert (found["mean_slots"], found["peak_slots"], found["threads"]) == (8.0, 20.0, 3.0)
    assert found["early_freed"] == pytest.approx(1 - 16 / 20) and found["stopped"] == 0.0


def test_what_failed_is_counted_by_its_reason_and_is_in_no_latency():
    rows = two_clients()
    rows[1].error = "HTTP 429: full"
    rows[2].tokens = None
    found = figures(rows)
    assert found["requests"] == 1 and found["errors"] == {"HTTP 429: full": 1, "cut off": 1}
    assert found["latencies"] == [4.0] and found["seconds"] == 8.0 and found["requests_per_second"] == 1 / 8
    assert found["mean_slots"] is None and found["early_freed"] is None and found["peak_slots"] is None


def test_nothing_that_was_answered_leaves_no_figures():
    found = figures([exchange(0, 1.0, [], ended=1.0, error="ConnectError: nobody")])
    assert found["latency"] is None and found["inter_token"] is None and found["tokens_per_second"] is None
    assert found["requests"] == 0 and found["tokens"] == 0


def test_what_a_server_computed_is_told_beside_what_it_showed():
    """Two answers of 10 shown tokens, for which 12 and 15 were written; others ran before and run on."""
    before = Counts(steps=5, shown=4, ended=0, written=6, unread=2, queries=8, hits=0)
    after = Counts(steps=21, shown=30, ended=20, written=39, unread=2, queries=48, hits=10)
    samples = [Sample(1, 0.0, counts=before), Sample(2, 0.0), Sample(3, 0.0, counts=after)]
    found = work(samples)
    assert found == {
        "steps": 16,
        "tokens_per_step": 26 / 16,
        "generated_per_100": pytest.approx(135),
        "prefix_hits": 0.25,
    }
    says = ServerSays([Sample(9, 0.0), *(Sample(10 + its.at, 0.0, counts=its.counts) for its in samples)])
    assert {name: figures(two_clients(), says)[name] for name in found} == found


def test_a_server_that_does_not_count_computes_nobody_knows_what():
    nothing = dict.fromkeys(("steps", "tokens_per_step", "generated_per_100", "prefix_hits"))
    assert work([]) == work([Sample(1, 0.0), Sample(2, 0.0)]) == nothing
    some = [Sample(1, 0.0), Sample(2, 0.0, counts=Counts(steps=3, shown=6, ended=6))]  # as vLLM's would, say
    assert work(some) == nothing | {"steps": 3, "tokens_per_step": 2}


answers = st.tuples(st.integers(1, 50), st.integers(0, 20))  # tokens shown, and written in vain


@given(st.lists(answers, min_size=1), st.lists(st.tuples(st.integers(0, 50), st.integers(0, 30))), st.integers(0, 99))
def test_answers_that_run_make_no_difference_to_what_is_generated_for_100(ended, running, before):
    """Neither those that run at the end, with tokens shown and tokens ahead, nor what was written `before`."""
    shown, in_vain, more, ahead = (sum(its[place] for its in which) for which in (ended, running) for place in (0, 1))
    written = shown + in_vain + more + ahead
    before = min(before, written - 1)
    first = Counts(written=before, unread=before)
    last = Counts(shown=shown + more, ended=shown, written=written, unread=ahead)
    found = work([Sample(1, 0.0, counts=first), Sample(2, 0.0, counts=last)])["generated_per_100"]
    assert found == pytest.approx(100 * (shown + in_vain) / shown)


def test_tokens_of_a_chunk_are_counted_else_one_each_else_by_bytes():
    assert tokens_by_chunk(exchange(0, 0, [(1, 9, 2), (2, 1, 5), (3, 1, 5)], 3, tokens=5)) == [2, 3, 0]
    assert tokens_by_chunk(exchange(0, 0, [(1, 9), (2, 1)], 3, tokens=2)) == [1, 1]
    assert tokens_by_chunk(exchange(0, 0, [(1, 9), (2, 3)], 3, tokens=4)) == [3, 1]
    assert tokens_by_chunk(exchange(0, 0, [], 3, tokens=4)) == []


def test_a_chunk_without_a_token_waits_with_the_next():
    counted = exchange(0, 0, [(1, 1, 1), (2, 1, 1), (5, 1, 3)], 5, tokens=3)
    assert token_gaps(counted) == [(2.0, 2.0)]


def test_tokens_without_text_wait_for_the_finish():
    told = exchange(0, 0, [(1, 4), (2, 4)], 9, tokens=4, finished=6.0)
    assert token_gaps(told) == [(2.5, 2.0)] and longest_pause(told) == 4.0
    assert longest_pause(exchange(0, 0, [(1, 4), (4, 4), (5, 1)], 9, tokens=4, finished=5.0)) == 3.0
    assert longest_pause(exchange(0, 0, [], 9, tokens=4)) is None
    assert figures([told])["longest_pause"]["p95"] == 4.0


def test_answers_that_loop_are_told_of():
    rows = [exchange(n, 0, [(1, 4), (2, 4)], 2, tokens=4) for n in range(2)]
    rows[0].texts, rows[1].texts = ["Say it ", "again.\n" * 1, *["Say it again.\n"] * 4], ["one two", " three, four"]
    assert looping(rows[0]) == pytest.approx(0.8) and looping(rows[1]) == 0.0
    found = figures(rows)
    assert found["loops"] == [0.8, 0.0] and found["looping"] == pytest.approx(0.4)


chunks = st.lists(st.tuples(st.floats(0, 50), st.integers(1, 9)), min_size=1, max_size=8)


@given(st.lists(st.tuples(chunks, st.integers(1, 40), st.booleans()), min_size=1, max_size=6), st.floats(0, 100))
def test_tokens_within_parts_of_a_window_add_up(answers, middle):
    rows, total = [], 0
    for number, (parts, tokens, whole) in enumerate(answers):
        parts = sorted(parts)
        rows.append(exchange(number, 0, parts, parts[-1][0], tokens=tokens if whole else None))
        total += tokens if whole else 0
    every = tokens_within(rows, 0, 100)
    assert math.isclose(sum(its for its, row in zip(every, rows, strict=True) if row.answered), total)
    before, after = tokens_within(rows, 0, middle), tokens_within(rows, math.nextafter(middle, math.inf), 100)
    assert np.allclose(np.add(before, after), every)


@given(chunks, st.integers(1, 40))
def test_gaps_make_up_the_time_between_the_first_token_and_the_last(parts, tokens):
    parts = sorted(parts)
    row = exchange(0, 0, parts, parts[-1][0], tokens=tokens)
    assert math.isclose(sum(a * b for a, b in token_gaps(row)), parts[-1][0] - parts[0][0], abs_tol=1e-9)


@given(st.lists(st.tuples(st.floats(0, 9), st.integers(1, 5)), min_size=1, max_size=20))
def test_a_weight_counts_as_so_many_of_the_same(pairs):
    many = sorted(value for value, weight in pairs for _ in range(weight))
    found = weighted_summary(pairs)
    assert math.isclose(found["mean"], np.mean(many), abs_tol=1e-9)
    for p in (50, 95, 99):
        assert found[f"p{p}"] == many[math.ceil(p * len(many) / 100) - 1]


def test_nothing_has_no_summary():
    assert summary([]) is None and weighted_summary([]) is None


@pytest.mark.parametrize(
    ("points", "found"),
    [
        ([(100, 99.0), (80, 98.0), (60, 97.0), (40, 57.0)], SmallestPool(60, 60.0)),
        ([(60, 98.0), (100, 99.0), (40, 96.0), (20, None)], SmallestPool(60, 50.0)),
        ([(100, 99.0), (80, 90.0), (60, 99.0)], SmallestPool(100, 100 - 20 * 2 / 9)),  # a smaller one was lucky
        ([(100, 99.0), (80, 98.0)], SmallestPool(80, None)),
        ([(100, 90.0), (80, 98.0)], None),
        ([(100, None)], None),
        ([], None),
    ],
)
def test_the_smallest_pool_is_the_last_of_those_that_keep_enough(points, found):
    got = smallest_pool(points, uncapped=100.0)
    assert (got is None) == (found is None)
    assert got is None or (got.slots == found.slots and got.crossing == pytest.approx(found.crossing))


def test_a_middle_row_is_the_median_of_each_figure():
    def row(speed, mean, errors):
        latency = None if mean is None else {"mean": mean, "p50": 2 * mean}
        return {"tokens_per_second": speed, "latency": latency, "errors": errors, "latencies": [mean], "slots": None}

    found = median_row([row(1.0, 5.0, {"a": 1}), row(9.0, None, {}), row(2.0, 7.0, {"a": 2, "b": 1})])
    assert found["tokens_per_second"] == 2.0 and found["latency"] == {"mean": 6.0, "p50": 12.0}
    assert found["errors"] == {"a": 3, "b": 1} and found["slots"] is None
    older = row(3.0, 1.0, {})
    assert median_row([row(1.0, 5.0, {}) | {"steps": 4.0}, older])["steps"] == 4.0  # which had not told yet


# ---- what a server tells


def test_metrics_are_read_by_name_and_labels():
    assert parse(METRICS)[LIVE] == 30.0 and parse(METRICS)["medusa_apar:threads_running"] == 3.0
    assert parse('a{b="c d"} 1e3 1700000000\nx NaN\n# y 4\nbroken\nz\n')['a{b="c d"}'] == 1000.0
    assert set(parse("# y 4\nbroken\nx 1.5\n")) == {"x"}


def test_a_server_without_slots_tells_nothing():
    watch = Watch()
    watch.see({"vllm:num_requests_running": 1.0}, 1.0)
    assert watch.says() == ServerSays()
    watch.see(parse(METRICS), 2.0)
    counts = Counts(steps=20, shown=50, ended=40, written=70, unread=6)
    assert watch.says() == ServerSays((Sample(2.0, 30.0, 3.0, 40.0, counts),), 55.0)
