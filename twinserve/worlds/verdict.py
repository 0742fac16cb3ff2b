"""What a person should know beside the figures of a run: the load it had, and whether the figures mean anything."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np

from twinserve.policies import Sequence
from twinserve.traces.requests import as_requests
from twinserve.traces.statistics import load_of as arrivals_load
from twinserve.worlds.workload import Workload

MOST_REFUSED = 0.05
"""Share of the requests; where more are refused, the figures are those of a selection."""
MOST_BACKLOG = 0.1
"""A deployment is overloaded if, when the last request comes, more than this share of all still waits for its first
token, and serving them takes more than this share of the time in which they came."""
FEWEST = 100
"""Of fewer requests nobody can say that a queue grows."""
DOUBTFUL = 3
"""The exit status of a command whose figures `Verdict` doubts."""


def load_of(workload: Workload) -> str:
    """The load of a workload in words: requests, rate, busiest minute, and what was left out of the trace.

    Where requests follow answers, the rate is not known before they are served, and not said.
    """
    requests = as_requests(workload.requests)
    left_out = f" of {len(requests) + workload.dropped:,} in the trace" if workload.dropped else ""
    text = f"load: {len(requests):,} requests{left_out}"
    arrivals = np.sort(requests.column("arrival_ns"))
    if any(request.after is not None for request in requests.others.values()):
        return f"{text}, some of which follow answers"
    span_s, rate, busiest = arrivals_load(arrivals)
    if not span_s:
        return f"{text}, all at once"
    peak = "" if busiest is None else f", {busiest:.3g}/s in the busiest minute"
    return f"{text}, {rate:.3g}/s over {span_s:,.0f} s{peak}"


class Verdict:
    """Watches the requests of a run end, and says which of its figures do not mean what they seem to."""

    def __init__(self) -> None:
        self._arrivals, self._first_tokens = array("q"), array("q")
        self._num_refused = 0
        self._last_finish = 0

    def ended(self, seq: Sequence) -> None:
        """Take in a sequence that has ended."""
        if seq.finish_reason == "refused":
            self._num_refused += 1
        elif seq.first_token_ns is not None and seq.finish_ns is not None:
            self._arrivals.append(seq.arrival_ns)
            self._first_tokens.append(seq.first_token_ns)
            self._last_finish = max(self._last_finish, seq.finish_ns)

    def doubts(self, summary: dict[str, Any]) -> list[str]:
        """Why the figures of a run are to be doubted, a line each; empty where they are not."""
        lines: list[str] = []
        num_requests = summary["requests"]
        if self._num_refused > MOST_REFUSED * num_requests:
            lines.append(
                f"refused: {self._num_refused:,} of {num_requests:,} requests; latencies are those of the others"
            )
        turned_away = summary.get("rejected", 0) + summary.get("timed_out", 0)
        if turned_away > MOST_REFUSED * (num_requests + summary.get("rejected", 0)):
            lines.append(
                f"turned away or given up: {turned_away:,} of {num_requests + summary.get('rejected', 0):,} requests; "
                "latencies are those of the others"
            )
        arrivals, first_tokens = np.asarray(self._arrivals), np.asarray(self._first_tokens)
        if len(arrivals) < FEWEST:
            return lines
        last = arrivals.max()
        span_ns, drain_ns = int(last - arrivals.min()), self._last_finish - int(last)
        backlog = int(np.count_nonzero(first_tokens > last))
        if span_ns and backlog > MOST_BACKLOG * len(arrivals) and drain_ns > MOST_BACKLOG * span_ns:
            took = f"{drain_ns / 1e9:,.0f} s more than the {span_ns / 1e9:,.0f} s in which they came"
            lines.append(
                f"overloaded: when the last request came, {backlog:,} of {len(arrivals):,} still waited for their "
                f"first token, and serving them took {took}; latencies grow with the length of the trace"
            )
        return lines
