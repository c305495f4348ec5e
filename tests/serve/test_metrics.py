"""What Prometheus reads, against what was asked and answered."""

import json
import re
from collections import Counter

import pytest
from prometheus_client.parser import text_string_to_metric_families

from medusa_apar.engine.stats import Stats
from medusa_apar.serve.metrics import Metrics
from tests.support.serving import running, sent, tiny_apar, wait_until

PROMPT = [7, 8, 9, 10]


@pytest.fixture(scope="module")
def server():
    apar = tiny_apar()
    with running(lambda: apar, max_requests=1) as server:
        yield server


def read(server):
    with server.client() as client:
        page = client.get("/metrics")
    assert page.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    samples = [sample for family in text_string_to_metric_families(page.text) for sample in family.samples]
    return {(its.name.removeprefix("medusa_apar:"), *its.labels.values()): its.value for its in samples}


def test_names_are_those_that_dashboards_read(server):
    page = Metrics(Stats).page().decode()
    names = (
        *("num_requests_running", "num_requests_waiting", "prompt_tokens_total", "generation_tokens_total"),
        *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
        *("kv_cache_usage_perc", "request_success_total", "kv_slots", "kv_slots_peak", "prefix_cache_queries_total"),
        *("prefix_cache_hits_total", "threads_running", "forks_total", "forward_tokens_total", "steps_total"),
        *("written_tokens_total", "unread_tokens"),
        *("request_queue_time_seconds", "request_prompt_tokens", "request_generation_tokens", "num_preemptions_total"),
        *("spec_decode_num_drafts_total", "spec_decode_num_draft_tokens_total", "iteration_tokens_total"),
        *("spec_decode_num_accepted_tokens_total", "spec_decode_num_accepted_tokens_per_pos_total"),
    )
    assert set(re.findall(r"^# TYPE (\S+)", page, re.M)) >= {f"medusa_apar:{name}" for name in names}
    histograms = set(re.findall(r"^# TYPE medusa_apar:(\S+) histogram", page, re.M))
    assert histograms >= {"request_queue_time_seconds", "iteration_tokens_total", "request_prompt_tokens"}


def test_tokens_times_and_ends_are_counted(server):
    before = read(server)
    answers = [server.ask(PROMPT, max_tokens=5).json(), server.ask(PROMPT, stream=True, max_tokens=40)]
    ids = answers[0]["token_ids"] + sum(map(json.loads, answers[1].text.splitlines()), [])
    server.wait_until_idle()
    now = read(server)
    more = {key: value - before.get(key, 0) for key, value in now.items()}
    assert more["prompt_tokens_total",] == 2 * len(PROMPT)
    assert more["generation_tokens_total",] == len(ids)
    assert more["time_to_first_token_seconds_count",] == more["e2e_request_latency_seconds_count",] == 2
    assert more["inter_token_latency_seconds_count",] == len(ids) - 2
    assert more["e2e_request_latency_seconds_sum",] >= more["time_to_first_token_seconds_sum",] > 0
    assert more["request_success_total", "length"] + more.get(("request_success_total", "stop"), 0) == 2
    assert more["steps_total",] > 4 and more["forward_tokens_total",] >= len(ids)
    assert now["kv_slots_peak",] > len(PROMPT)
    assert more["request_queue_time_seconds_count",] == more["request_prompt_tokens_count",] == 2
    assert 0 < more["request_queue_time_seconds_sum",] < more["e2e_request_latency_seconds_sum",]
    assert more["request_prompt_tokens_sum",] == 2 * len(PROMPT) and more["request_prompt_tokens_bucket", "2.0"] == 0
    assert more["request_generation_tokens_sum",] == len(ids)
    steps = more["iteration_tokens_total_count",]
    assert steps == more["iteration_tokens_total_bucket", "+Inf"] == more["steps_total",]
    # Without guesses a row is fed, or gains a token, or both: a prompt's last one.
    assert len(ids) < more["iteration_tokens_total_sum",] <= more["forward_tokens_total",] + 2


def test_steps_and_drafts_are_told_by_their_tokens():
    stats = Stats(drafts=Counter({0: 2, 1: 3, 3: 1}))
    for tokens in (0, 1, 2, 8, 9, 20_000):
        stats.count_iteration(tokens)
    page = Metrics(lambda: stats).page().decode()
    found = {
        (its.name.removeprefix("medusa_apar:"), *its.labels.values()): its.value
        for family in text_string_to_metric_families(page)
        for its in family.samples
    }
    assert found["spec_decode_num_drafts_total",] == 6
    per_position = [found["spec_decode_num_accepted_tokens_per_pos_total", str(n)] for n in range(3)]
    assert per_position == [4, 1, 1] and ("spec_decode_num_accepted_tokens_per_pos_total", "3") not in found
    buckets = {bound: found["iteration_tokens_total_bucket", bound] for bound in ("1.0", "8.0", "16.0", "16384.0")}
    assert buckets == {"1.0": 2, "8.0": 4, "16.0": 5, "16384.0": 5}
    assert found["iteration_tokens_total_bucket", "+Inf"] == found["iteration_tokens_total_count",] == 6
    assert found["iteration_tokens_total_sum",] == 20_020


def test_what_runs_and_waits_is_told(server):
    before = read(server)["request_queue_time_seconds_count",]
    first = sent(server, PROMPT, max_tokens=200, held=True)
    server.hold.allowed.release()
    wait_until(lambda: server.hold.asked == 2)  # a step is over, and the next one is held
    assert read(server)["num_requests_running",] == 1
    second = sent(server, PROMPT)
    wait_until(lambda: server.service.engine._calls.qsize() == 1)
    server.hold.allowed.release()
    wait_until(lambda: server.hold.asked == 3)
    now = read(server)
    assert now["num_requests_running",] == now["num_requests_waiting",] == 1
    assert now["kv_cache_usage_perc",] > 0
    assert now["threads_running",] == 1 and now["kv_slots", "live"] >= len(PROMPT) and now["kv_slots", "free"] > 0
    first.close()
    second.close()
    wait_until(lambda: server.service.engine._calls.qsize() == 2)
    server.hold.allowed.release()  # the step that runs comes to its end
    server.wait_until_idle()
    now = read(server)
    assert now["request_success_total", "abort"] >= 1
    assert now["num_requests_running",] == now["num_requests_waiting",] == now["kv_slots", "live"] == 0
    assert now["request_queue_time_seconds_count",] == before + 1  # nobody knows how long the other would have waited


def test_two_servers_count_apart():
    one, other = Metrics(Stats), Metrics(Stats)
    one.measure(0.0).wrote(3)
    assert b"generation_tokens_total 3.0" in one.page() and b"generation_tokens_total 0.0" in other.page()
