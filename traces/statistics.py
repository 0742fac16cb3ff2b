"""What a trace holds: lengths, rate, burstiness."""

from __future__ import annotations

from typing import Any

from twinserve.traces.request import Request


def trace_statistics(requests: list[Request]) -> dict[str, Any]:
    """Counts, lengths in tokens, rate in requests a second, and the gaps' coefficient of variation.

    The rate is (n - 1) / (last - first arrival); percentiles interpolate linearly; the coefficient of variation is
    the population standard deviation of the gaps divided by their mean. What is not defined is None.
    """
    import numpy as np

    arrivals = np.array([request.arrival_ns for request in requests], dtype=np.int64)
    span_ns = int(arrivals.max() - arrivals.min())
    gaps = np.diff(np.sort(arrivals))
    return {
        "requests": len(requests),
        "span_s": span_ns / 1e9,
        "rate": (len(requests) - 1) / (span_ns / 1e9) if span_ns else None,
        "gap_cv": float(gaps.std() / gaps.mean()) if span_ns else None,
        "sessions": len({request.session for request in requests if request.session is not None}),
        "prompt_tokens": _lengths(np.array([request.prompt_tokens for request in requests])),
        "output_tokens": _lengths(np.array([request.max_tokens for request in requests])),
    }


def _lengths(tokens: Any) -> dict[str, float]:
    import numpy as np

    p50, p90, p99 = (float(value) for value in np.percentile(tokens, (50, 90, 99)))
    summary = {"mean": float(tokens.mean()), "p50": p50, "p90": p90, "p99": p99}
    return summary | {"max": int(tokens.max()), "total": int(tokens.sum())}
