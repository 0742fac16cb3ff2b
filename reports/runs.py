"""Runs as a page shows them: a label and a style each, and the columns that its figures draw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from html import escape
from itertools import zip_longest
from typing import Any

import numpy as np

from twinserve.settings.errors import InputError
from twinserve.traces.formats.recorded import replica_place
from twinserve.traces.runs.fleet_record import is_fleet, load_replicas
from twinserve.traces.runs.metrics import SERVED, token_gaps
from twinserve.traces.runs.pools import Cached
from twinserve.traces.runs.record import RunRecord
from twinserve.traces.runs.tables import LATENCY_NS

_TOTALS = ("tokens", "prompt_tokens", "decode_tokens", "used_blocks", "waiting", "running")
STORED = "stored_blocks"
_NEVER = np.iinfo(np.int64).max
_LONGEST_LABEL = 32

COLORS = ("#2777c9", "#cc5c10", "#25855a", "#9259c9", "#c8323a", "#7d6f64", "#867a10", "#bf4490")
"""Of runs, in their order: each tells itself apart from the others, on white as on black."""

_DASHES = (
    *("4px,2px", "8px,3px", "6px,2px,1px,2px", "2px,2px"),
    *("10px,2px,2px,2px", "5px,5px", "3px,3px,1px,3px", "1px,2px"),
)
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x", "pentagon", "star")


@dataclass(frozen=True)
class Style:
    """How a run is drawn, everywhere on the page: one color, from full to pale, a line and a symbol."""

    full: str
    dash: str
    symbol: str

    @property
    def middle(self) -> str:
        """The color, half of it."""
        return self._shade(0.55)

    @property
    def pale(self) -> str:
        """The color, a fifth of it."""
        return self._shade(0.22)

    def _shade(self, share: float) -> str:
        red, green, blue = (int(self.full[at : at + 2], 16) for at in (1, 3, 5))
        return f"rgba({red},{green},{blue},{share})"


def style_of(number: int, *, is_real: bool) -> Style:
    """The style of the so-manieth run of a page; real runs are solid lines, simulations broken ones."""
    place = number % len(COLORS)
    symbol = _SYMBOLS[place] if is_real else f"{_SYMBOLS[place]}-open"
    return Style(COLORS[place], "solid" if is_real else _DASHES[place], symbol)


@dataclass(frozen=True)
class Steps:
    """Columns of steps, in the order of their starts; times in seconds from the run's first arrival."""

    start_s: np.ndarray
    duration_s: np.ndarray
    totals: dict[str, np.ndarray]


@dataclass(frozen=True)
class Part:
    """What a run did in one place: all of it, or one replica of a fleet while it was up.

    Attributes:
        origin_ns: time 0 of the figures.
        replica: its number.
        died_s: when it went down with all that it held; None where it did not.
        cached: None where the record was not decided again exactly.
    """

    record: RunRecord
    origin_ns: int
    replica: int = 0
    died_s: float | None = None
    cached: Cached | None = None

    @cached_property
    def has_decisions(self) -> bool:
        """Whether the steps say what was decided and not only when."""
        return all(field in row for row in self.record.steps for field in (*_TOTALS, "preempted"))

    @cached_property
    def steps(self) -> Steps:
        """The steps as columns; `totals` is empty where the record keeps no decisions."""
        rows, order = self.record.steps, self._order
        start_ns, end_ns = (_column(rows, field)[order] for field in ("start_ns", "end_ns"))
        return Steps(
            self.seconds(start_ns),
            (end_ns - start_ns) / 1e9,
            {field: _column(rows, field)[order] for field in (*_TOTALS, "kv_tokens") if self._has(field)},
        )

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(_column(self.record.steps, "start_ns"), kind="stable")

    def _has(self, field: str) -> bool:
        return self.has_decisions and all(field in row for row in self.record.steps)

    @cached_property
    def idle_from_s(self) -> np.ndarray:
        """When it ran out of work: after each of these instants nothing runs until the next request comes in.

        A step that was launched before the last request's end was known still runs out.
        """
        served = [row for row in self.record.requests if row["finish_reason"] != "refused"]
        ended_ns = [_NEVER if row["finish_ns"] is None else row["finish_ns"] for row in served]
        latest_ns = np.maximum.accumulate(np.array(ended_ns, dtype=np.int64))
        upcoming_ns = np.append(_column(served, "ingested_ns")[1:], _NEVER)
        latest_s, upcoming_s = self.seconds(latest_ns), self.seconds(upcoming_ns)
        ends_s = np.maximum.accumulate(np.append(-np.inf, self.steps.start_s + self.steps.duration_s))
        idle_s = np.maximum(latest_s, ends_s[np.searchsorted(self.steps.start_s, upcoming_s[: len(served)])])
        idle_s = idle_s[idle_s < upcoming_s[: len(served)]]
        return idle_s if self.died_s is None else np.append(idle_s[idle_s < self.died_s], self.died_s)

    def over_time(self, total: str) -> tuple[np.ndarray, np.ndarray]:
        """When a total changed, and to what: each step's value holds until the next one starts, and 0 while idle.

        That of STORED is the blocks in use and those that are cached, which stay while nothing runs.
        """
        values, idle = self._stored() if total == STORED else (self.steps.totals[total], 0 * self.idle_from_s)
        x = np.concatenate([self.steps.start_s, self.idle_from_s])
        y = np.concatenate([values, idle.astype(np.int64)])
        order = np.argsort(x, kind="stable")
        if self.died_s is not None:
            order = order[x[order] <= self.died_s]  # a step may have been due later
        return x[order], y[order]

    def _stored(self) -> tuple[np.ndarray, np.ndarray]:
        """Blocks with content in each step, and from each instant on from which nothing runs."""
        assert self.cached is not None
        behind, left = (np.array(counts, np.int64)[self._order] for counts in (self.cached.behind, self.cached.left))
        at = np.searchsorted(self.steps.start_s, self.idle_from_s, "right") - 1
        idle = np.where(at >= 0, left[np.maximum(at, 0)], 0)
        if self.died_s is not None:
            idle[-1] = 0
        return self.steps.totals["used_blocks"] + behind, idle

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


@dataclass(frozen=True)
class Run:
    """A run record with the name and the style that it has on the page.

    Attributes:
        label: the name of the record's folder, with as much of its path as tells it from the others.
        replicas: of a fleet, the records of its replicas.
        cached: of the record, or of each of its replicas; none where they were not decided again exactly.
    """

    record: RunRecord
    label: str
    style: Style
    replicas: tuple[RunRecord, ...] = ()
    cached: tuple[Cached, ...] = ()

    @property
    def text(self) -> str:
        """The label as HTML, and as plotly takes it."""
        return escape(self.label)

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
    def fleet(self) -> dict[str, Any]:
        """Of a fleet, what the facts say of its router, replicas and outages; else nothing."""
        fleet = self.facts.get("fleet")
        return fleet if isinstance(fleet, dict) else {}

    @property
    def num_replicas(self) -> int:
        """How many replicas the facts name; 1 where there is no fleet."""
        replicas = self.fleet.get("replicas")
        return len(replicas) if isinstance(replicas, list) and replicas else 1

    @property
    def trace_key(self) -> tuple[Any, Any] | None:
        """What is equal for runs of the same requests; None where the record does not tell which those were."""
        trace = self.facts.get("trace")
        if not isinstance(trace, dict) or not {"sha256", "transforms"} <= trace.keys():
            return None
        return trace["sha256"], trace["transforms"]

    @property
    def pool(self) -> int | None:
        """KV blocks of the pool, of all replicas together; None where it has no end, or the settings do not say it."""
        pools = {part.replica: part.record.run["settings"].get("num_gpu_blocks") for part in self.parts}.values()
        return sum(pools) if all(type(blocks) is int and blocks > 0 for blocks in pools) else None

    @cached_property
    def origin_ns(self) -> int:
        """The first arrival: time 0 of the figures."""
        return min((row["arrival_ns"] for row in self.record.requests), default=0)

    @cached_property
    def parts(self) -> list[Part]:
        """Where it took place: itself, or every replica of a fleet for each time that it was up."""
        if not self.replicas:
            return [Part(self.record, self.origin_ns, cached=next(iter(self.cached), None))]
        outages: dict[int, list[float]] = {}
        for replica, begin_s, _ in self.outages:
            if begin_s > 0:
                outages.setdefault(replica, []).append(begin_s)
        parts = []
        for record, cached in zip_longest(self.replicas, self.cached):
            replica, life = replica_place(record.path) or (0, 0)
            deaths = sorted(outages.get(replica, ()))
            died_s = deaths[life] if life < len(deaths) else None
            parts.append(Part(record, self.origin_ns, replica, died_s, cached))
        return parts

    @cached_property
    def outages(self) -> list[tuple[int, float, float | None]]:
        """When replicas of a fleet were down: which, from and to, in seconds; None is for good."""
        told = self.fleet.get("outages")
        found = []
        for outage in told if isinstance(told, list) else ():
            fields = [
                outage.get(name) if isinstance(outage, dict) else None for name in ("replica", "from_ns", "to_ns")
            ]
            replica, from_ns, to_ns = fields
            if type(replica) is int and type(from_ns) is int and (to_ns is None or type(to_ns) is int):
                end_s = None if to_ns is None else (to_ns - self.origin_ns) / 1e9
                found.append((replica, (from_ns - self.origin_ns) / 1e9, end_s))
        return found + self._unleased()

    def _unleased(self) -> list[tuple[int, float, float | None]]:
        """When replicas of a fleet that scales were not up."""
        leases = self.summary.get("leases")
        found: list[tuple[int, float, float | None]] = []
        for replica in range(self.num_replicas if isinstance(leases, list) else 0):
            gone_ns: int | None = 0
            for lease in (lease for lease in leases or () if lease["replica"] == replica):
                if lease["up_ns"] is not None and gone_ns is not None:
                    if lease["up_ns"] > gone_ns:
                        begin_s, end_s = ((ns - self.origin_ns) / 1e9 for ns in (gone_ns, lease["up_ns"]))
                        found.append((replica, begin_s, end_s))
                    gone_ns = lease["to_ns"]
            if gone_ns is not None:
                found.append((replica, (gone_ns - self.origin_ns) / 1e9, None))
        return found

    @cached_property
    def requests(self) -> list[dict[str, Any]]:
        """The rows of all requests in the order in which they came in, whenever a fleet's replicas had them."""
        return sorted(self.record.requests, key=lambda row: (row["arrival_ns"], row["id"]))

    @cached_property
    def finished(self) -> list[dict[str, Any]]:
        """Rows of the requests whose latencies count."""
        return [row for row in self.record.requests if row["finish_reason"] in SERVED]

    @cached_property
    def has_decisions(self) -> bool:
        """Whether there are steps, and they say what was decided and not only when."""
        return any(part.record.steps for part in self.parts) and all(part.has_decisions for part in self.parts)

    @cached_property
    def steps(self) -> Steps:
        """The steps of all parts as columns, see `Part.steps`."""
        every = [part.steps for part in self.parts]
        if len(every) == 1:
            return every[0]
        order = np.argsort(np.concatenate([steps.start_s for steps in every]), kind="stable")
        totals = [steps.totals for steps in every if len(steps.start_s)]
        names = set.intersection(*map(set, totals)) if totals else set()
        return Steps(
            np.concatenate([steps.start_s for steps in every])[order],
            np.concatenate([steps.duration_s for steps in every])[order],
            {name: np.concatenate([of[name] for of in totals])[order] for name in sorted(names)},
        )

    def over_time(self, total: str) -> tuple[np.ndarray, np.ndarray]:
        """When a total, of all parts together, changed, and to what; see `Part.over_time`."""
        every = [part.over_time(total) for part in self.parts if part.record.steps]
        if len(every) == 1:
            return every[0]
        x = np.concatenate([x for x, _ in every])
        changes = np.concatenate([np.diff(y, prepend=0) for _, y in every])
        order = np.argsort(x, kind="stable")
        return x[order], np.cumsum(changes[order])

    @cached_property
    def preemptions(self) -> list[tuple[float, list[int]]]:
        """Each decision that preempted: its time in seconds, and the ids of the requests."""
        return sorted((entry for part in self.parts for entry in part.preemptions), key=lambda entry: entry[0])

    def seconds(self, times_ns: np.ndarray) -> np.ndarray:
        """Times as seconds from the first arrival."""
        return (times_ns - self.origin_ns) / 1e9

    def latencies_s(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """The values of "ttft_s", "tpot_s", "itl_s" or "e2e_s", sorted, and how often each occurs."""
        values: Iterable[float]
        if metric == "itl_s":
            gaps: Counter[int] = Counter()
            for part in self.parts:
                served = [row for row in part.record.requests if row["finish_reason"] in SERVED]
                gaps.update(token_gaps({row["id"]: row["output_tokens"] for row in served}, part.record.steps))
            values, counts = gaps.keys(), list(gaps.values())
        else:
            values = [ns for row in self.finished if (ns := LATENCY_NS[metric](row)) is not None]
            counts = [1] * len(values)
        values_s = np.array(list(values), dtype=np.float64) / 1e9
        order = np.argsort(values_s, kind="stable")
        return values_s[order], np.array(counts, dtype=np.int64)[order]


def runs_of(records: list[RunRecord]) -> list[Run]:
    """The runs of a page, real ones first; of fleets, with their replicas.

    Raises:
        InputError: there is none, or a replica of a fleet cannot be read.
    """
    if not records:
        raise InputError("expected at least one run record")
    chosen = sorted(records, key=lambda record: record.run["world"])
    runs = []
    for number, (record, label) in enumerate(zip(chosen, _labels(chosen), strict=True)):
        style = style_of(number, is_real=record.run["world"] == "real")
        runs.append(Run(record, label, style, tuple(load_replicas(record.path)) if is_fleet(record.path) else ()))
    return runs


def _labels(records: list[RunRecord]) -> list[str]:
    """A name each: the folder's, with as many folders before it as tell all apart, or else a number behind it."""
    places = [record.path if record.path.name else record.path.resolve() for record in records]
    every = [["/".join(place.parts[-depth:]) for place in places] for depth in range(1, 4)]
    names = next((names for names in every if len(set(names)) == len(names)), every[0])
    cut = [name if len(name) <= _LONGEST_LABEL else f"{name[: _LONGEST_LABEL - 9]}…{name[-8:]}" for name in names]
    return [name if cut.count(name) == 1 else f"{name} ({cut[: at + 1].count(name)})" for at, name in enumerate(cut)]


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
