"""What a trace holds: lengths, rate, burstiness, reuse."""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Any

from twinserve.traces.request import Part, Request, answer_text, merged
from twinserve.traces.requests import Requests, as_requests

BLOCK_SIZES = (16, 32, 64, 128, 256, 512)
PEAK_WINDOWS_S = (1, 10, 60)
_PIECE = 1 << 20


def trace_statistics(requests: Seq[Request]) -> dict[str, Any]:
    """Counts, lengths in tokens, rate in requests a second, burstiness, and reuse by block size.

    The rate is (n - 1) / (last - first arrival); percentiles interpolate linearly. Burstiness: `gap_cv`, the population
    standard deviation of the gaps between arrivals divided by their mean; `peak_to_mean`, the most arrivals within
    so many seconds, divided by the mean over the windows of as many seconds from the first arrival on. `reuse`: what a
    prefix cache without end would hit, in blocks of so many tokens, see `shared_tokens`; a request's last token is
    always computed. What is not defined is None.
    """
    requests = as_requests(requests)
    arrivals = requests.column("arrival_ns")
    arrivals.sort()
    span_ns = int(arrivals[-1] - arrivals[0])
    return {
        "requests": len(requests),
        "span_s": span_ns / 1e9,
        "rate": (len(requests) - 1) / (span_ns / 1e9) if span_ns else None,
        "gap_cv": _gap_cv(arrivals, span_ns) if span_ns else None,
        "peak_to_mean": {f"{seconds}s": _peak_to_mean(arrivals, seconds) for seconds in PEAK_WINDOWS_S},
        "sessions": len({request.session for request in requests.others.values()} - {None}),
        "prompt_tokens": _lengths(requests.column("prompt_tokens")),
        "output_tokens": _lengths(requests.column("max_tokens")),
        "reuse": _reuse(requests),
    }


def shared_tokens(requests: Seq[Request]) -> list[int]:
    """Of each request, how many tokens its prompt shares from the start on with one before it of the same salt.

    The requests are served one after the other, and nothing is forgotten: prompts, and answers but for their last
    token, which is never computed.
    """
    shared = [0] * len(requests)
    for number, num_shared in _shared(as_requests(requests)):
        shared[number] = num_shared
    return shared


def _shared(requests: Requests) -> Iterator[tuple[int, int]]:
    """The places of requests, with how many tokens each shares; those that are left out share none."""
    # A radix tree over texts for each salt: (text, start) leads to the length of an edge and to what follows it.
    roots: dict[str, dict[tuple[int, int], list[Any]]] = {}
    told_of = {part.text for request in requests.others.values() for part in request.parts}
    for number, request in enumerate(requests) if told_of else ():
        if number not in requests.others and told_of.isdisjoint((request.parts[0].text, answer_text(request.id))):
            continue
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
        yield number, num_shared


def _reuse(requests: Requests) -> dict[str, dict[str, float]]:
    pairs = [(num_shared, requests[number].prompt_tokens) for number, num_shared in _shared(requests)]
    total = int(requests.column("prompt_tokens").sum())
    reuse = {}
    for size in BLOCK_SIZES:
        hits = sum(min(num, length - 1) // size * size for num, length in pairs)
        reuse[str(size)] = {"hit_tokens": hits, "hit_ratio": hits / total}
    return reuse


def _gap_cv(arrivals_ns: Any, span_ns: int) -> float:
    """The standard deviation of the gaps between sorted arrivals, divided by their mean."""
    mean, squares = span_ns / (len(arrivals_ns) - 1), 0.0
    for piece in _pieces(arrivals_ns, 1):
        differences = piece[1:] - piece[:-1] - mean
        squares += float(differences @ differences)
    return math.sqrt(squares / (len(arrivals_ns) - 1)) / mean


def _peak_to_mean(arrivals_ns: Any, seconds: int) -> float | None:
    """The most of sorted arrivals in a window, divided by the mean over all windows."""
    num_windows = int(arrivals_ns[-1] - arrivals_ns[0]) // (seconds * 1_000_000_000) + 1
    return most_arrivals(arrivals_ns, seconds) * num_windows / len(arrivals_ns) if num_windows > 1 else None


def most_arrivals(arrivals_ns: Any, seconds: int) -> int:
    """The most of sorted arrivals within so many seconds, its end not included, wherever those begin."""
    import numpy as np

    most, begin = 0, 0
    for piece in _pieces(arrivals_ns, 0):
        ends = np.searchsorted(arrivals_ns, piece + seconds * 1_000_000_000, "left")
        most = max(most, int((ends - np.arange(begin, begin + len(piece))).max()))
        begin += len(piece)
    return most


def load_of(arrivals_ns: Any) -> tuple[float, float, float | None]:
    """The load of sorted arrivals: seconds from the first to the last, requests a second, and those of the busiest
    minute, None where there is no more than one. The rate is 0 where all come at once."""
    span_s = int(arrivals_ns[-1] - arrivals_ns[0]) / 1e9
    rate = (len(arrivals_ns) - 1) / span_s if span_s else 0.0
    return span_s, rate, most_arrivals(arrivals_ns, 60) / 60 if span_s > 60 else None


def _pieces(values: Any, overlap: int) -> Iterator[Any]:
    """The values in pieces, of which each begins with the last ones before it: millions take no more memory so."""
    for begin in range(0, max(len(values) - overlap, 1), _PIECE):
        yield values[begin : begin + _PIECE + overlap]


def _lengths(tokens: Any) -> dict[str, float]:
    import numpy as np

    percentiles = (50, 90, 95, 99)
    found = zip(percentiles, np.percentile(tokens, percentiles), strict=True)
    summary = {"mean": float(tokens.mean())} | {f"p{p}": float(value) for p, value in found}
    return summary | {"max": int(tokens.max()), "total": int(tokens.sum())}
