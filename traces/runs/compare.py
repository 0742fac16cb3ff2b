"""How far a simulation is from the run it predicts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from twinserve.settings.errors import InputError
from twinserve.settings.limits import plain
from twinserve.settings.own_class import identity
from twinserve.traces.runs.metrics import PERCENTILES
from twinserve.traces.runs.record import RunRecord

LATENCIES = ("ttft_s", "tpot_s", "itl_s", "e2e_s")
STATISTICS = ("mean", *(f"p{p}" for p in PERCENTILES))
METRICS = (
    *(f"{name}.{statistic}" for name in LATENCIES for statistic in STATISTICS),
    "output_tok_s",
    "total_tok_s",
    "duration_s",
    "cached_tokens",
    "preemptions",
    "device_wait_share",
    "steps",
)
_ADDED = ("device_wait_share", "p95")
"""Metrics, and statistics, that summaries written before them lack."""


@dataclass(frozen=True)
class Comparison:
    """One metric in both worlds; `error` is (sim - real) / real, None where that is not defined."""

    metric: str
    sim: float | None
    real: float | None

    @property
    def error(self) -> float | None:
        if self.sim is None or not self.real:
            return None
        return self.sim / self.real - 1.0

    def beyond(self, limit: float) -> str:
        """That the error exceeds a limit, or is not defined though one was set, in words."""
        error = "undefined" if self.error is None else f"{self.error:+.1%}"
        return f"{self.metric}: the error is {error}, expected within {limit:.1%}"


def value_of(summary: Mapping[str, Any], metric: str) -> float | None:
    """A metric of a summary by its dotted name, such as "ttft_s.p90"; None where the summary is older than it."""
    if metric in _ADDED:
        return summary.get(metric)
    name, _, statistic = metric.partition(".")
    if not statistic:
        return summary[name]
    return summary[name].get(statistic) if statistic in _ADDED else summary[name][statistic]


def name_of(metric: str) -> str:
    """A statistic of a latency as people write it, such as "p99 TTFT" of "ttft_s.p99"."""
    name, _, statistic = metric.partition(".")
    return f"{statistic} {name.removesuffix('_s').upper()}"


def compare(sim: RunRecord, real: RunRecord) -> list[Comparison]:
    """Every metric of two runs of the same trace.

    Raises:
        InputError: the runs did not replay the same requests.
    """
    check_same_trace(sim, real)
    return [
        Comparison(metric, value_of(sim.run["summary"], metric), value_of(real.run["summary"], metric))
        for metric in METRICS
    ]


def check_same_trace(one: RunRecord, other: RunRecord) -> None:
    """Raise InputError if two runs did not replay the same requests."""
    for field in ("sha256", "transforms"):
        mine, theirs = (record.told("facts", "trace", field) for record in (one, other))
        if mine != theirs:
            raise InputError(
                f"expected the trace of {other.path}, {theirs!r}",
                path=one.path / "run.json",
                field=f"facts.trace.{field}",
                value=mine,
            )


def differing_settings(records: Seq[RunRecord]) -> list[str]:
    """Names of the settings in which the records that know them disagree."""
    every = [record.run["settings"] for record in records]
    names = dict.fromkeys(name for settings in every for name in settings)
    return [name for name in names if differ([settings[name] for settings in every if name in settings])]


def differ(values: Seq[Any]) -> bool:
    """Whether values of records disagree; a class of one's own is its content, wherever its file lies."""
    same = [identity(value) if isinstance(value, str) else value for value in values]
    return any(value != same[0] for value in same)


def parse_limits(texts: list[str]) -> dict[str, float]:
    """Limits on errors from texts of the form METRIC=SHARE.

    Raises:
        InputError: a text has another form, or names no metric.
    """
    limits = {}
    for text in texts:
        metric, _, share = text.partition("=")
        try:
            limits[metric] = float(plain(share))
        except ValueError as error:
            raise InputError(
                "expected METRIC=SHARE, such as tpot_s.mean=0.25", field="max_error", value=text
            ) from error
        if metric not in METRICS:
            raise InputError(f"expected one of {', '.join(METRICS)}", field="metric", value=metric)
        if not 0 <= limits[metric] < math.inf:
            raise InputError("expected a share >= 0", field="max_error", value=text)
    return limits


def beyond(comparisons: list[Comparison], limits: Mapping[str, float]) -> list[Comparison]:
    """The metrics whose error exceeds its limit, or is not defined though one was set."""
    return [
        row
        for row in comparisons
        if row.metric in limits and (row.error is None or abs(row.error) > limits[row.metric])
    ]
