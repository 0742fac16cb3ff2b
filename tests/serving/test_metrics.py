"""The metrics page: what vLLM's public dashboard asks of it, and that it says what the record says."""

from __future__ import annotations

import random
import threading
from bisect import bisect_left
from collections import Counter
from typing import Any

import httpx
import numpy as np
import pytest
from live_servers import TinyModel, simulated
from prometheus_client.parser import text_string_to_metric_families

from twinserve.serving.top import Reading, quantile
from twinserve.traces.runs.metrics import token_gaps
from twinserve.traces.runs.record import load_record

# What vLLM's dashboards ask for: grafana.json of its examples/observability/prometheus_grafana, and the five of
# examples/observability/dashboards/grafana that are about more than drafts, but for their rows of what is not served
# here: drafts, adapters, images, KV from elsewhere, sleep, block residency and model FLOPs.
QUANTILES = (
    "e2e_request_latency_seconds",
    "inter_token_latency_seconds",
    "time_to_first_token_seconds",
    "request_time_per_output_token_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_prefill_kv_computed_tokens",
    "iteration_tokens_total",
)
GAUGES = (
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_waiting_by_reason",
    "kv_cache_usage_perc",
    "cache_config_info",
)
PROCESS = ("cpu_seconds_total", "resident_memory_bytes", "open_fds", "max_fds", "start_time_seconds")
RATES = (
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_queue_time_seconds_sum",
    "request_prefill_time_seconds_sum",
    "request_decode_time_seconds_sum",
    "request_max_num_generation_tokens_sum",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "prompt_tokens_cached_total",
    "prompt_tokens_by_source_total",
    "prompt_tokens_cached_by_source_total",
)


def ask(url: str, number: int) -> None:
    draws = random.Random(number)
    for _ in range(4):
        body = {"prompt": "once upon a time " * draws.randrange(1, 12), "max_tokens": draws.randrange(1, 30)}
        body["ignore_eos"] = True
        if draws.random() < 0.25:
            body |= {"max_tokens": 900, "stream": True}
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=None) as response:
                next(response.iter_lines())
        else:
            httpx.post(f"{url}/v1/completions", json=body, timeout=None)


@pytest.fixture(scope="module", params=[TinyModel, simulated])
def served(request, serving_all, tmp_path_factory) -> tuple[dict[tuple[str, str], Any], Reading, Any]:
    """The samples of a page, the page as a reading, and the record of what was served by then."""
    folder = tmp_path_factory.mktemp("served") / "run"
    running = serving_all(request.param({"num_gpu_blocks": 70} if request.param is TinyModel else 1.0), folder)
    threads = [threading.Thread(target=ask, args=(running.url, number)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    running.settle()
    page = httpx.get(f"{running.url}/metrics", timeout=60).text
    running.stop()
    families = list(text_string_to_metric_families(page))
    samples = {(sample.name, sample.labels.get("le", "")): sample for one in families for sample in one.samples}
    assert {family.type for family in families} >= {"counter", "gauge", "histogram"}
    return samples, Reading.of(page, 0.0, running.url), load_record(folder)


def test_every_expression_of_vllms_dashboard_has_an_answer(served):
    samples, reading, record = served
    names = [f"{name}_{part}" for name in QUANTILES for part in ("bucket", "sum", "count")]
    names += [*GAUGES, *RATES, "num_preemptions_total", "request_success_total"]
    found = {name.removeprefix("vllm:") for name, _ in samples}
    assert set(names) <= found
    model = record.run["facts"].get("model") or "round"
    for name in names:
        labels = [sample.labels for (own, _), sample in samples.items() if own == f"vllm:{name}"]
        assert {one["model_name"] for one in labels} == {model.rpartition("/")[2]}
        assert not name.endswith("_bucket") or {one["le"] for one in labels} > {"+Inf"}
    for name in RATES:
        assert reading.values[name] > 0, name
    assert {f"process_{name}" for name in PROCESS} <= {name for name, _ in samples}
    reasons = Counter(row["finish_reason"] for row in record.requests)
    assert reasons["abort"] and reasons["length"] and None not in reasons
    assert sum(reasons.values()) == reading.values["request_success_total"]


def test_the_thresholds_that_vllms_dashboard_offers_are_bounds_of_buckets(served):
    """As text: that is what they are looked up by."""
    samples, _, _ = served
    offered = {
        "time_to_first_token_seconds": "0.1 0.25 0.5 0.75 1.0 2.5 5.0 10.0",
        "request_time_per_output_token_seconds": "0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.5",
        "inter_token_latency_seconds": "1.0",
    }
    for name, bounds in offered.items():
        assert all((f"vllm:{name}_bucket", bound) in samples for bound in bounds.split())


def test_sources_and_reasons_add_up(served):
    samples, reading, record = served
    values = reading.values
    assert values["prompt_tokens_by_source_total"] == values["prompt_tokens_total"]
    assert values["prompt_tokens_cached_by_source_total"] == values["prefix_cache_hits_total"]
    ended = [row for row in record.requests if row["finish_reason"] in ("stop", "length")]
    assert values["request_num_preemptions_sum"] == sum(row["preemptions"] for row in ended)


def test_requests_over_http_are_counted_by_path_and_status(serving):
    """But for probes; also those that are refused before a path is found, and those whose client goes away."""
    running = serving(simulated(5.0), api_key=["one"])
    key = {"authorization": "Bearer one"}
    url = f"{running.url}/v1/completions"
    for body, headers, status in (({"prompt": "a"}, key, 200), ({"prompt": 5}, key, 400), ({"prompt": "a"}, {}, 401)):
        assert httpx.post(url, json=body, headers=headers, timeout=60).status_code == status
    assert httpx.get(f"{running.url}/nowhere", timeout=60).status_code == 404
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json={"prompt": "a", "max_tokens": 900}, headers=key, timeout=1.0)
    running.settle()
    page = httpx.get(f"{running.url}/metrics", timeout=60).text
    samples = [one for family in text_string_to_metric_families(page) for one in family.samples]
    counted = {tuple(sorted(one.labels.items())): one.value for one in samples if one.name == "http_requests_total"}

    def labels(handler: str, method: str, status: str) -> tuple[tuple[str, str], ...]:
        return ("handler", handler), ("method", method), ("status", status)

    assert counted == {
        labels("/v1/completions", "POST", "2xx"): 1,
        labels("/v1/completions", "POST", "4xx"): 2,
        labels("none", "POST", "4xx"): 1,
        labels("none", "GET", "4xx"): 1,
    }
    durations = {one.labels["handler"] for one in samples if one.name == "http_request_duration_seconds_count"}
    assert durations == {"/v1/completions", "none"}


def test_the_buckets_hold_what_the_record_says(served):
    _, reading, record = served
    ended = [row for row in record.requests if row["finish_reason"] in ("stop", "length")]
    begun = [row for row in record.requests if row["first_token_ns"] is not None]
    values = {
        "e2e_request_latency_seconds": [(row["finish_ns"] - row["arrival_ns"]) / 1e9 for row in ended],
        "time_to_first_token_seconds": [(row["first_token_ns"] - row["arrival_ns"]) / 1e9 for row in begun],
        "request_queue_time_seconds": [(row["first_scheduled_ns"] - row["arrival_ns"]) / 1e9 for row in ended],
        "request_prompt_tokens": [row["prompt_tokens"] for row in ended],
        "request_generation_tokens": [row["output_tokens"] for row in ended],
        "request_params_max_tokens": [row["max_tokens"] for row in record.requests],
        "iteration_tokens_total": [step["tokens"] for step in record.steps if step["tokens"]],
    }
    gaps = token_gaps({row["id"]: row["output_tokens"] for row in record.requests}, record.steps)
    values["inter_token_latency_seconds"] = [gap / 1e9 for gap, count in gaps.items() for _ in range(count)]
    for name, recorded in values.items():
        bounds = sorted(reading.buckets[name])
        counts = [sum(value <= bound for value in recorded) for bound in bounds]
        assert [reading.buckets[name][bound] for bound in bounds] == counts, name
        if name.endswith("_seconds") and name != "request_queue_time_seconds":
            said, exact = quantile(reading.buckets[name], 0.9), np.quantile(recorded, 0.9, method="inverted_cdf")
            assert said is not None and bisect_left(bounds, said) == bisect_left(bounds, exact)
