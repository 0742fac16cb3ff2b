"""guidellm's report (`benchmarks.json`; github.com/vllm-project/guidellm, 0.3 to 0.5): one JSON object.

`benchmarks`, each with `requests`, which has lists `successful`, `incomplete` and `errored`. A successful request has
`prompt_tokens`, `output_tokens` and, in seconds since 1970, `request_start_time` (before 0.4 `start_time`). Benchmarks
of a report, such as the rates of a sweep, ran one after the other, and are replayed so. Nothing is known of the
prompts, so each is a text of its own. Time 0 is the first successful request.
"""

from __future__ import annotations

from typing import Any

from twinserve.traces.formats.reading import Reading, Rows, private_prompt
from twinserve.traces.lines import Line
from twinserve.traces.request import Request

NAME = "guidellm"
FIELDS = ("benchmarks",)

_TOTALS = ("request_totals", "metrics.request_totals", "run_stats.requests_made", "scheduler_metrics.requests_made")
"""Where reports of one version or another say how many requests there were."""


def rows(reports: list[Line], reading: Reading) -> Rows:
    """The successful requests, by the time they were sent; others are counted.

    Raises:
        InputError: a report holds a sample of its requests.
    """
    found: list[tuple[Line, Request]] = []
    for benchmark in (benchmark for report in reports for benchmark in report.items("benchmarks")):
        groups = benchmark.child("requests")
        totals = _totals(benchmark.values)
        held = len(groups.items("successful"))
        if totals.get("successful", 0) > held:
            problem = f"holds a sample, {held} of {totals['successful']} requests: expected a report of all of them"
            raise groups.error(problem, "successful", f"{held} requests")
        for status in ("incomplete", "errored"):
            listed = len(groups.items(status)) if groups.values.get(status) else 0
            if count := max(listed, totals.get(status, 0)):
                reading.dropped[status] += count
        for line in groups.items("successful"):
            time = "request_start_time" if "request_start_time" in line.values else "start_time"
            if any(line.get(name) is None for name in (time, "prompt_tokens", "output_tokens")):
                reading.dropped["without_time_or_lengths"] += 1
                continue
            parts = private_prompt(len(found), line.integer("prompt_tokens", 1))
            output_tokens = reading.output_tokens(line, "output_tokens")
            found.append((line, Request(len(found), reading.time_ns(line, time), parts, output_tokens)))
    reading.epoch_ns = min((request.arrival_ns for _, request in found), default=None)
    yield from reading.sent(found, "request_start_time")


def _totals(benchmark: dict[str, Any]) -> dict[str, int]:
    """How many requests ended in each way, as far as a benchmark says it."""
    for place in _TOTALS:
        value: Any = benchmark
        for name in place.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, dict):
            return {status: number for status, number in value.items() if type(number) is int}
    return {}
