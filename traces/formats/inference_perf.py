"""inference-perf's `per_request_lifecycle_metrics.json` (github.com/kubernetes-sigs/inference-perf): one JSON list.

An object a request: `start_time` (seconds), `error`, which is null where it was answered, and `info` with
`input_tokens` and the output's tokens, in `response_metrics` (before that, beside it). What the server counted goes
before what the client did. Nothing is known of the prompts, so each is a text of its own. Time 0 is the first request
that was answered.
"""

from __future__ import annotations

from twinserve.traces.formats.reading import Reading, Rows, private_prompt
from twinserve.traces.lines import Line
from twinserve.traces.request import Request

NAME = "inference-perf"
FIELDS = ("start_time", "end_time", "info")


def rows(requests: list[Line], reading: Reading) -> Rows:
    """The requests that were answered, by the time they were sent; those that failed are counted."""
    found: list[tuple[Line, Request]] = []
    for line in requests:
        if line.values.get("error") is not None:
            reading.dropped["failed"] += 1
            continue
        info = line.child("info")
        tokens = reading.output_tokens(*_output(info))
        parts = private_prompt(len(found), info.integer("input_tokens", 1))
        found.append((line, Request(len(found), reading.time_ns(line, "start_time"), parts, tokens)))
    yield from reading.sent(found, "start_time")


def _output(info: Line) -> tuple[Line, str]:
    """Where the output's length stands."""
    if info.values.get("response_metrics") is None:
        return info, "output_tokens"
    response = info.child("response_metrics")
    usage = response.values.get("server_usage")
    if isinstance(usage, dict) and usage.get("completion_tokens") is not None:
        return response.child("server_usage"), "completion_tokens"
    return response, "output_tokens"
