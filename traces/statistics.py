"""What a trace holds: lengths, rate, burstiness, reuse."""

from __future__ import annotations

from typing import Any

from twinserve.traces.request import Part, Request, answer_text, merged

BLOCK_SIZES = (16, 32, 64, 128, 256, 512)
PEAK_WINDOWS_S = (1, 10, 60)


def trace_statistics(requests: list[Request]) -> dict[str, Any]:
    """Counts, lengths in tokens, rate in requests a second, burstiness, and reuse by block size.

    The rate is (n - 1) / (last - first arrival); percentiles interpolate linearly. Burstiness: `gap_cv`, the population
    standard deviation of the gaps between arrivals divided by their mean; `peak_to_mean`, the most arrivals in one of
    the windows of so many seconds from the first arrival on, divided by the mean over all windows. `reuse`: what a
    prefix cache without end would hit, in blocks of so many tokens, see `shared_tokens`; a request's last token is
    always computed. What is not defined is None.
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
        "peak_to_mean": {
            f"{seconds}s": _peak_to_mean(arrivals - arrivals.min(), seconds) for seconds in PEAK_WINDOWS_S
        },
        "sessions": len({request.session for request in requests if request.session is not None}),
        "prompt_tokens": _lengths(np.array([request.prompt_tokens for request in requests])),
        "output_tokens": _lengths(np.array([request.max_tokens for request in requests])),
        "reuse": _reuse(requests),
    }


def shared_tokens(requests: list[Request]) -> list[int]:
    """Of each request, how many tokens its prompt shares from the start on with one before it of the same salt.

    The requests are served one after the other, and nothing is forgotten: prompts, and answers but for their last
    token, which is never computed.
    """
    # A radix tree over texts for each salt: (text, start) leads to the length of an edge and to what follows it.
    roots: dict[str, dict[tuple[int, int], list[Any]]] = {}
    shared = []
    for request in requests:
        children, num_shared, is_known = roots.setdefault(request.salt, {}), 0, True
        for text, start, length in merged((*request.parts, Part(answer_text(request.id), 0, request.max_tokens - 1))):
            while length:
                edge = children.get((text, start))
                if edge is None:
                    edge = children[text, start] = [length, {}]
                    is_known = False
                common = min(length, edge[0])
                if common < edge[0]:
                    edge[:] = common, {(text, start + common): [edge[0] - common, edge[1]]}
                num_shared += common if is_known else 0
                children, start, length = edge[1], start + common, length - common
        shared.append(num_shared)
    return shared


def _reuse(requests: list[Request]) -> dict[str, dict[str, float]]:
    pairs = [(num, request.prompt_tokens) for num, request in zip(shared_tokens(requests), requests, strict=True)]
    total = sum(length for _, length in pairs)
    reuse = {}
    for size in BLOCK_SIZES:
        hits = sum(min(num, length - 1) // size * size for num, length in pairs)
        reuse[str(size)] = {"hit_tokens": hits, "hit_ratio": hits / total}
    return reuse


def _peak_to_mean(since_first_ns: Any, seconds: int) -> float | None:
    import numpy as np

    windows, counts = np.unique(since_first_ns // (seconds * 1_000_000_000), return_counts=True)
    num_windows = int(windows[-1]) + 1
    return float(counts.max() * num_windows / counts.sum()) if num_windows > 1 else None


def _lengths(tokens: Any) -> dict[str, float]:
    import numpy as np

    p50, p90, p99 = (float(value) for value in np.percentile(tokens, (50, 90, 99)))
    summary = {"mean": float(tokens.mean()), "p50": p50, "p90": p90, "p99": p99}
    return summary | {"max": int(tokens.max()), "total": int(tokens.sum())}
