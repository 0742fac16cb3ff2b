"""What a metrics page says of a server, this one's or vLLM's, as numbers for a person."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from twinserve.serving.metrics import PREFIX
from twinserve.settings.errors import InputError


@dataclass(frozen=True)
class Reading:
    """A metrics page, read.

    Attributes:
        at_s: when it was read, in seconds of any clock.
        values: by name without "vllm:", added up over models and engines.
        buckets: (upper bound, observations up to it) of each histogram.
    """

    at_s: float
    values: dict[str, float] = field(default_factory=dict)
    buckets: dict[str, dict[float, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, page: str, at_s: float, url: str) -> Reading:
        """The reading of a page.

        Raises:
            InputError: it is no metrics page, or has none of vLLM's names.
        """
        values: dict[str, float] = defaultdict(float)
        buckets: dict[str, dict[float, float]] = defaultdict(lambda: defaultdict(float))
        try:
            for family in text_string_to_metric_families(page):
                for sample in family.samples:
                    if not sample.name.startswith(PREFIX):
                        continue
                    name = sample.name.removeprefix(PREFIX)
                    if name.endswith("_bucket"):
                        buckets[name.removesuffix("_bucket")][float(sample.labels["le"])] += sample.value
                    else:
                        values[name] += sample.value
        except ValueError as error:
            raise InputError(f"expected a metrics page: {error}", path=url) from error
        if not values:
            raise InputError("expected a metrics page with names that begin with vllm:", path=url)
        return cls(at_s, dict(values), {name: dict(found) for name, found in buckets.items()})


def rows(now: Reading, before: Reading | None) -> list[tuple[str, str]]:
    """What a person wants to see: a name and a text each.

    Args:
        before: an earlier reading; rates and latencies are of the time since then. None is since the server began, and
            there are no rates.
    """
    used = now.values.get("kv_cache_usage_perc")
    found = [
        ("running", _count(now.values.get("num_requests_running"))),
        ("waiting", _count(now.values.get("num_requests_waiting"))),
        ("KV cache used", "-" if used is None else f"{used:.1%}"),
        ("prefix hits", _share(now, before, "prefix_cache_hits_total", "prefix_cache_queries_total")),
        ("preemptions", _count(now.values.get("num_preemptions_total"))),
        ("prompt tokens/s", _rate(now, before, "prompt_tokens_total")),
        ("generated tokens/s", _rate(now, before, "generation_tokens_total")),
        ("requests/s", _rate(now, before, "request_success_total")),
    ]
    for text, names in (
        ("TTFT", ("time_to_first_token_seconds",)),
        ("TPOT", ("request_time_per_output_token_seconds", "time_per_output_token_seconds")),
        ("ITL", ("inter_token_latency_seconds", "time_per_output_token_seconds")),
        ("end to end", ("e2e_request_latency_seconds",)),
        ("queue", ("request_queue_time_seconds",)),
    ):
        name = next((name for name in names if name in now.buckets), names[0])
        percentiles = (_quantile(now, before, name, share) for share in (0.5, 0.95, 0.99))
        found.append((f"{text} p50 / p95 / p99", " / ".join(percentiles)))
    return found


def quantile(buckets: dict[float, float], share: float) -> float | None:
    """A quantile of a histogram, evenly spread within a bucket as Prometheus' histogram_quantile has it.

    Args:
        buckets: observations up to each upper bound.

    Returns:
        None where nothing was observed; the last finite bound where it lies beyond that.
    """
    bounds = sorted(buckets)
    total = buckets[bounds[-1]] if bounds else 0
    if total <= 0:
        return None
    low, below = 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= share * total:
            if math.isinf(bound):
                return low
            return low + (bound - low) * (share * total - below) / (buckets[bound] - below)
        low, below = bound, buckets[bound]
    return low


def _since(now: Reading, before: Reading | None, name: str) -> float | None:
    """How much a counter has grown."""
    value = now.values.get(name)
    return None if value is None else value - (before.values.get(name, 0.0) if before else 0.0)


def _rate(now: Reading, before: Reading | None, name: str) -> str:
    grown = _since(now, before, name)
    return "-" if grown is None or before is None else f"{grown / (now.at_s - before.at_s):,.1f}"


def _share(now: Reading, before: Reading | None, part: str, whole: str) -> str:
    some, of = _since(now, before, part), _since(now, before, whole)
    return f"{some / of:.1%}" if some is not None and of else "-"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _quantile(now: Reading, before: Reading | None, name: str, share: float) -> str:
    earlier = before.buckets.get(name, {}) if before else {}
    grown = {bound: count - earlier.get(bound, 0.0) for bound, count in now.buckets.get(name, {}).items()}
    value = quantile(grown, share)
    if value is None:
        return "-"
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"
