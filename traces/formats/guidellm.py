"""guidellm's report (`benchmarks.json`; github.com/vllm-project/guidellm, 0.3 to 0.5): one JSON object.

`benchmarks`, each with `requests`, which has lists `successful`, `incomplete` and `errored`. A successful request has
`prompt_tokens`, `output_tokens` and, in seconds since 1970, `request_start_time` (before 0.4 `start_time`). Benchmarks
of a report, such as the rates of a sweep, ran one after the other, and are replayed so. Nothing is known of the
prompts, so each is a text of its own. Time 0 is the first successful request.
"""

from __future__ import annotations

from twinserve.traces.formats.reading import Reading, Rows, private_prompt
from twinserve.traces.lines import Line
from twinserve.traces.request import Request

NAME = "guidellm"
KEYS = {"benchmarks"}


def rows(report: Line, reading: Reading) -> Rows:
    """The successful requests, by the time they were sent; others are counted."""
    found: list[tuple[Line, Request]] = []
    for benchmark in report.items("benchmarks"):
        groups = benchmark.child("requests")
        for status in ("incomplete", "errored"):
            if groups.values.get(status):
                reading.dropped[status] += len(groups.items(status))
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
