"""Runs as a page shows them: a label and a style each, and the columns that its figures draw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from twinserve.settings.errors import InputError
from twinserve.traces.runs.metrics import token_gaps
from twinserve.traces.runs.record import RunRecord

_TOTALS = ("tokens", "prompt_tokens", "decode_tokens", "used_blocks", "waiting", "running")
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Style:
    """How a run is drawn, everywhere on the page: shades of one accent, from full to pale, and a line."""

    full: str
    middle: str
    pale: str
    dash: str
    symbol: str


_STYLES = {
    "real": (
        Style("#1f5fa8", "#86afdc", "#d9e6f4", "solid", "circle"),
        Style("#0b3765", "#6d8fb4", "#d3dde8", "solid", "square"),
        Style("#4d94c9", "#a5cbe6", "#e2eff8", "solid", "triangle-up"),
    ),
    "sim": (
        Style("#c4560b", "#eeb085", "#fae5d6", "4px,2px", "diamond-open"),
        Style("#7e3304", "#c79a7f", "#efe0d7", "1px,2px", "cross-open"),
        Style("#e58a3c", "#f4c89f", "#fcefe1", "6px,2px,1px,2px", "x-open"),
    ),
}


@dataclass(frozen=True)
class Steps:
    """Columns of a run's steps, in the order of their starts; times in seconds from the run's first arrival."""

    start_s: np.ndarray
    duration_s: np.ndarray
    totals: dict[str, np.ndarray]


@dataclass(frozen=True)
class Run:
    """A run record with the name and the style that it has on the page."""

    record: RunRecord
    label: str
    style: Style

    @property
    def name(self) -> str:
        """The name of the record's folder."""
        return self.record.path.name or self.record.path.resolve().name

    @property
    def world(self) -> str:
        """Where it took place: "real" or "sim"."""
        return self.record.run["world"]

    @property
    def summary(self) -> dict[str, Any]:
        """The record's summary."""
        return self.record.run["summary"]

    @property
    def settings(self) -> dict[str, Any]:
        """The record's settings."""
        return self.record.run["settings"]

    @property
    def facts(self) -> dict[str, Any]:
        """The record's facts."""
        return self.record.run["facts"]

    @property
    def trace_key(self) -> tuple[Any, Any] | None:
        """What is equal for runs of the same requests; None where the record does not tell which those were."""
        trace = self.facts.get("trace")
        if not isinstance(trace, dict) or not {"sha256", "transforms"} <= trace.keys():
            return None
        return trace["sha256"], trace["transforms"]

    @property
    def pool(self) -> int | None:
        """KV blocks of the pool; None where it has no end, or the settings do not say it."""
        blocks = self.settings.get("num_gpu_blocks")
        return blocks if type(blocks) is int and blocks > 0 else None

    @cached_property
    def origin_ns(self) -> int:
        """The first arrival: time 0 of the figures."""
        return min((row["arrival_ns"] for row in self.record.requests), default=0)

    @cached_property
    def finished(self) -> list[dict[str, Any]]:
        """Rows of the requests whose latencies count."""
        return [row for row in self.record.requests if row["finish_reason"] in ("stop", "length")]

    @cached_property
    def has_decisions(self) -> bool:
        """Whether there are steps, and they say what was decided and not only when."""
        rows = self.record.steps
        return bool(rows) and all(field in row for row in rows for field in (*_TOTALS, "preempted"))

    @cached_property
    def steps(self) -> Steps:
        """The steps as columns; `totals` is empty where the record keeps no decisions."""
        rows = self.record.steps
        start_ns, end_ns = (_column(rows, field) for field in ("start_ns", "end_ns"))
        order = np.argsort(start_ns, kind="stable")
        return Steps(
            self.seconds(start_ns[order]),
            (end_ns - start_ns)[order] / 1e9,
            {field: _column(rows, field)[order] for field in _TOTALS} if self.has_decisions else {},
        )

    @cached_property
    def idle_from_s(self) -> np.ndarray:
        """When the run ran out of work: after each of these instants nothing runs until the next request comes in.

        A step that was launched before the last request's end was known still runs out.
        """
        served = [row for row in self.record.requests if row["finish_reason"] != "refused"]
        ended_ns = [_NEVER if row["finish_ns"] is None else row["finish_ns"] for row in served]
        latest_ns = np.maximum.accumulate(np.array(ended_ns, dtype=np.int64))
        upcoming_ns = np.append(_column(served, "ingested_ns")[1:], _NEVER)
        latest_s, upcoming_s = self.seconds(latest_ns), self.seconds(upcoming_ns)
        ends_s = np.maximum.accumulate(np.append(-np.inf, self.steps.start_s + self.steps.duration_s))
        idle_s = np.maximum(latest_s, ends_s[np.searchsorted(self.steps.start_s, upcoming_s[: len(served)])])
        return idle_s[idle_s < upcoming_s[: len(served)]]

    @cached_property
    def preemptions(self) -> list[tuple[float, list[int]]]:
        """Each decision that preempted: its time in seconds, and the ids of the requests."""
        if not self.has_decisions:
            return []
        return [
            ((row["decided_ns"] - self.origin_ns) / 1e9, row["preempted"])
            for row in self.record.steps
            if row["preempted"]
        ]

    def seconds(self, times_ns: np.ndarray) -> np.ndarray:
        """Times as seconds from the first arrival."""
        return (times_ns - self.origin_ns) / 1e9

    def latencies_s(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """The values of "ttft_s", "tpot_s", "itl_s" or "e2e_s", sorted, and how often each occurs."""
        values: Iterable[float]
        if metric == "itl_s":
            gaps = token_gaps({row["id"]: row["output_tokens"] for row in self.finished}, self.record.steps)
            values, counts = gaps.keys(), list(gaps.values())
        else:
            values = [ns for row in self.finished if (ns := _LATENCY_NS[metric](row)) is not None]
            counts = [1] * len(values)
        values_s = np.array(list(values), dtype=np.float64) / 1e9
        order = np.argsort(values_s, kind="stable")
        return values_s[order], np.array(counts, dtype=np.int64)[order]


def _tpot_ns(row: dict[str, Any]) -> float | None:
    gaps = row["output_tokens"] - 1
    return (row["finish_ns"] - row["first_token_ns"]) / gaps if gaps > 0 else None


_LATENCY_NS = {
    "ttft_s": lambda row: row["first_token_ns"] - row["arrival_ns"],
    "tpot_s": _tpot_ns,
    "e2e_s": lambda row: row["finish_ns"] - row["arrival_ns"],
}


def runs_of(records: list[RunRecord]) -> list[Run]:
    """The runs of a page, real ones first.

    Raises:
        InputError: there is none.
    """
    if not records:
        raise InputError("expected at least one run record")
    worlds = Counter(record.run["world"] for record in records)
    met: Counter[str] = Counter()
    runs = []
    for record in sorted(records, key=lambda record: record.run["world"]):
        world = record.run["world"]
        styles = _STYLES[world]
        label = world if worlds[world] == 1 else f"{world} {met[world] + 1}"
        runs.append(Run(record, label, styles[met[world] % len(styles)]))
        met[world] += 1
    return runs


def same_trace(runs: list[Run]) -> list[list[Run]]:
    """The runs in groups that replayed the same requests; a run that does not say what it replayed is alone."""
    groups: list[list[Run]] = []
    for run in runs:
        for group in groups:
            if run.trace_key is not None and run.trace_key == group[0].trace_key:
                group.append(run)
                break
        else:
            groups.append([run])
    return groups


def _column(rows: list[dict[str, Any]], field: str) -> np.ndarray:
    return np.fromiter((row[field] for row in rows), np.int64, len(rows))
