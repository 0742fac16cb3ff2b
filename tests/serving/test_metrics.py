"""The metrics page: what vLLM's public dashboard asks of it, and that it says what the record says."""

from __future__ import annotations

import random
import threading
from bisect import bisect_left
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from live_servers import TinyModel, simulated
from prometheus_client.parser import text_string_to_metric_families

from twinserve.serving.top import Reading, quantile
from twinserve.traces.runs.metrics import token_gaps
from twinserve.traces.runs.record import load_record

# What vLLM's dashboard (examples/observability/prometheus_grafana) asks for, each by the label model_name.
QUANTILES = ("e2e_request_latency_seconds", "inter_token_latency_seconds", "time_to_first_token_seconds")
HEATMAPS = ("request_prompt_tokens", "request_generation_tokens")
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
RATES = (
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_queue_time_seconds_sum",
    "request_prefill_time_seconds_sum",
    "request_decode_time_seconds_sum",
    "request_max_num_generation_tokens_sum",
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


@pytest.fixture(params=[TinyModel, simulated])
def served(request, serving, tmp_path: Path) -> tuple[dict[tuple[str, str], Any], Reading, Any]:
    """The samples of a page, the page as a reading, and the record of what was served by then."""
    running = serving(request.param({"num_gpu_blocks": 70} if request.param is TinyModel else 1.0), tmp_path / "run")
    threads = [threading.Thread(target=ask, args=(running.url, number)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    running.settle()
    page = httpx.get(f"{running.url}/metrics").text
    running.stop()
    families = list(text_string_to_metric_families(page))
    samples = {(sample.name, sample.labels.get("le", "")): sample for one in families for sample in one.samples}
    assert {family.type for family in families} >= {"counter", "gauge", "histogram"}
    return samples, Reading.of(page, 0.0, running.url), load_record(tmp_path / "run")


def test_every_expression_of_vllms_dashboard_has_an_answer(served):
    samples, reading, record = served
    names = [f"{name}_{part}" for name in QUANTILES for part in ("bucket", "sum", "count")]
    names += [f"{name}_bucket" for name in HEATMAPS] + [*GAUGES, *RATES, "request_success_total"]
    found = {name.removeprefix("vllm:") for name, _ in samples}
    assert set(names) <= found
    model = record.run["facts"].get("model") or "round"
    for name in names:
        labels = [sample.labels for (own, _), sample in samples.items() if own == f"vllm:{name}"]
        assert {one["model_name"] for one in labels} == {model.rpartition("/")[2]}
        assert not name.endswith("_bucket") or {one["le"] for one in labels} > {"+Inf"}
    for name in RATES:
        assert reading.values[name] > 0
    reasons = Counter(row["finish_reason"] for row in record.requests)
    assert reasons["abort"] and reasons["length"] and None not in reasons
    assert sum(reasons.values()) == reading.values["request_success_total"]


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
        if name in QUANTILES:
            said, exact = quantile(reading.buckets[name], 0.9), np.quantile(recorded, 0.9, method="inverted_cdf")
            assert said is not None and bisect_left(bounds, said) == bisect_left(bounds, exact)
