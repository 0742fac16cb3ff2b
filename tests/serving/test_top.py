"""`twinserve top`: what a metrics page says, for a person."""

from __future__ import annotations

import pytest
from live_servers import simulated
from shell import twinserve  # noqa: F401 - a fixture

from twinserve.serving.top import Reading, quantile, rows
from twinserve.settings.errors import InputError

VLLM = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total{engine="0",model_name="m"} %s
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{le="0.1",model_name="m"} %s
vllm:time_to_first_token_seconds_bucket{le="0.2",model_name="m"} 10.0
vllm:time_to_first_token_seconds_bucket{le="+Inf",model_name="m"} 10.0
# TYPE process_cpu_seconds counter
process_cpu_seconds_total 5.0
"""


def test_a_page_of_vllm_is_read_its_engines_together():
    before, now = Reading.of(VLLM % (100, 10), 1.0, "u"), Reading.of(VLLM % (400, 10), 3.0, "u")
    said = dict(rows(now, before))
    assert (said["running"], said["generated tokens/s"], said["waiting"]) == ("7", "150.0", "-")
    assert said["TTFT p50 / p95 / p99"] == "- / - / -"
    assert dict(rows(now, None))["TTFT p50 / p95 / p99"] == "50.0 ms / 95.0 ms / 99.0 ms"


def test_quantiles_lie_within_their_bucket():
    buckets = {1.0: 2.0, 2.0: 6.0, float("inf"): 8.0}
    assert [quantile(buckets, share) for share in (0.125, 0.25, 0.5, 0.75, 0.99)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert quantile({}, 0.5) is quantile({1.0: 0.0}, 0.5) is None


@pytest.mark.parametrize("page", ["", "<html>", "up 1\n", "vllm:x{ 1"])
def test_what_is_no_metrics_page_is_refused(page):
    with pytest.raises(InputError, match="expected a metrics page"):
        Reading.of(page, 0.0, "http://x/metrics")


def test_the_command_shows_a_servers_numbers_and_refuses_what_is_not_there(serving, twinserve):  # noqa: F811
    running = serving(simulated())
    running.client().completions.create(model="round", prompt="a", max_tokens=5)
    shown = twinserve("top", running.url, "--once")
    assert shown.code == 0 and "running" in shown.out and "TTFT p50 / p95 / p99" in shown.out
    missing = twinserve("top", "http://127.0.0.1:9", "--once")
    assert missing.code == 2 and missing.err.startswith("twinserve: http://127.0.0.1:9/metrics: cannot be read")
    assert missing.err.count("\n") == 1
    assert twinserve("top", "no url", "--once").code == 2
