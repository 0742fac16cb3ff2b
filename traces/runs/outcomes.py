"""What came of each request of a run, and statistics of those of a class: any percentile, the longest, their wait."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from operator import eq, ge, lt
from typing import Any, NamedTuple

from twinserve.policies import Sequence
from twinserve.traces.runs.metrics import SERVED, interpolated

METRICS = ("ttft", "tpot", "e2e", "queue")
"""What is measured of a request: time to first token, per output token, of the whole, and from its arrival until it was
first scheduled."""
_STATISTIC = re.compile(r"mean|max|p([0-9]{1,2}(?:\.[0-9]{1,3})?)")
_CLASS = re.compile(r"(tenant|priority|session|prompt)(>=|<|=)(.*)")


class Outcome(NamedTuple):
    """What came of a request; times in nanoseconds, named as a Sequence has them."""

    seq_id: int
    arrival_ns: int
    first_scheduled_ns: int | None
    first_token_ns: int | None
    finish_ns: int | None
    num_prompt_tokens: int
    num_completion_tokens: int
    finish_reason: str | None
    tenant: str
    priority: int
    session: int | None = None

    @classmethod
    def of(cls, seq: Sequence) -> Outcome:
        """That of a sequence that has ended; its session is not known."""
        return cls(*(getattr(seq, name) for name in cls._fields[:-1]))

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> Outcome:
        """That of a row of requests.jsonl."""
        return cls(
            row["id"],
            row["arrival_ns"],
            row["first_scheduled_ns"],
            row["first_token_ns"],
            row["finish_ns"],
            row["prompt_tokens"],
            row["output_tokens"],
            row["finish_reason"],
            row.get("tenant", ""),
            row.get("priority", 0),
            row["session"],
        )

    @property
    def is_served(self) -> bool:
        """Did it end as requests do whose latencies count?"""
        return self.finish_reason in SERVED

    def took_ns(self, metric: str) -> float | None:
        """One of METRICS; None where it has none, as the time per output token of an answer of one token."""
        if not self.is_served or self.first_token_ns is None or self.finish_ns is None:
            return None
        if metric == "tpot":
            gaps = self.num_completion_tokens - 1
            return (self.finish_ns - self.first_token_ns) / gaps if gaps else None
        ends = {"ttft": self.first_token_ns, "e2e": self.finish_ns, "queue": self.first_scheduled_ns}
        end_ns = ends[metric]
        return None if end_ns is None else end_ns - self.arrival_ns


def judged(outcomes: Iterable[Outcome], warm_up_s: float = 0.0, drain_s: float = 0.0) -> list[Outcome]:
    """By their arrival, those that do not come in the first seconds of the arrivals, nor in the last."""
    ordered = sorted(outcomes, key=lambda one: (one.arrival_ns, one.seq_id))
    if not ordered:
        return []
    first_ns, last_ns = ordered[0].arrival_ns + warm_up_s * 1e9, ordered[-1].arrival_ns - drain_s * 1e9
    return [one for one in ordered if first_ns <= one.arrival_ns <= last_ns]


class Class:
    """Requests that have something in common: a tenant, a priority, a session, or prompts of some length.

    Args:
        text: such as "tenant=a" or "prompt>=4000".

    Raises:
        ValueError: it has another form.
    """

    def __init__(self, text: str):
        found = _CLASS.fullmatch(text)
        if found is None or (found[1] != "prompt" and found[2] != "="):
            raise ValueError("expected tenant=NAME, priority=N, session=N, prompt>=TOKENS or prompt<TOKENS")
        if found[1] != "tenant" and not re.fullmatch(r"-?[0-9]{1,18}", found[3]):
            raise ValueError(f"{text}: expected a number of at most 18 digits")
        self._name = "num_prompt_tokens" if found[1] == "prompt" else found[1]
        self._compare = {"=": eq, ">=": ge, "<": lt}[found[2]]
        self._value: str | int = found[3] if found[1] == "tenant" else int(found[3])

    def has(self, one: Outcome) -> bool:
        """Is a request one of them?"""
        return bool(self._compare(getattr(one, self._name), self._value))


@dataclass(frozen=True)
class Measure:
    """A statistic of a metric of a class of requests.

    Attributes:
        statistic: "mean", "max", or a percentile such as "p99.9".
        metric: one of METRICS.
        of: the class in words, see `Class`; None: all.
    """

    statistic: str
    metric: str
    of: str | None = None

    def __post_init__(self) -> None:
        if _STATISTIC.fullmatch(self.statistic) is None:
            raise ValueError(f"{self.statistic!r}, expected mean, max, or a percentile from p0 to p99.999")
        if self.metric not in METRICS:
            raise ValueError(f"{self.metric!r}, expected one of {', '.join(METRICS)}")
        if self.of is not None:
            Class(self.of)

    def __str__(self) -> str:
        metric = "queue" if self.metric == "queue" else self.metric.upper()
        return f"{self.statistic} {metric}{'' if self.of is None else f' of {self.of}'}"

    def value(self, outcomes: Iterable[Outcome]) -> float | None:
        """In seconds; None where no request of the class has the metric."""
        chosen = outcomes if self.of is None else filter(Class(self.of).has, outcomes)
        return statistic_of([ns for one in chosen if (ns := one.took_ns(self.metric)) is not None], self.statistic)


def statistic_of(values_ns: Seq[float], statistic: str) -> float | None:
    """The mean, the largest or a percentile of values in nanoseconds, in seconds; None of no values.

    Percentiles are those of `metrics.distribution`.
    """
    if not values_ns:
        return None
    if statistic == "max":
        return max(values_ns) / 1e9
    if statistic == "mean":
        return math.fsum(values_ns) / len(values_ns) / 1e9
    ordered = sorted(values_ns)
    rank = float(statistic.removeprefix("p")) / 100 * (len(ordered) - 1)
    below = math.floor(rank)
    return interpolated(ordered[below], ordered[min(below + 1, len(ordered) - 1)], rank - below) / 1e9
