"""The requests of a run by class: latencies, what they took of the engine, and how even that is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import Any

from twinserve.planning.objectives import interval
from twinserve.policies import Batch, Sequence
from twinserve.settings.errors import InputError
from twinserve.traces.runs.outcomes import METRICS, Outcome, judged, statistic_of
from twinserve.traces.runs.record import RunRecord
from twinserve.traces.runs.replay import Hearer

BY = ("tenant", "priority", "session", "prompt")
STATISTICS = ("mean", "p50", "p90", "p99", "p99.9", "max")
BATCHES = 10
_FEWEST = 10
"""Requests in a batch, of fewer nothing is said about how sure a statistic is."""


def by_class(records: list[RunRecord], by: str, *, warm_up_s: float = 0.0, drain_s: float = 0.0) -> dict[str, Any]:
    """What came of the requests of a run, or of a fleet's replicas, all together and class by class.

    `all` and each of `classes` have the counts, each of METRICS with STATISTICS in seconds, and `intervals`: those of
    the mean and of p99 with a confidence of 95%, by the method of batch means (Law, Simulation Modeling and Analysis,
    chapter 9): the requests in the order of arrival in BATCHES batches, whose statistics are taken as independent. And
    what was computed for them: `computed_tokens`, of which `recomputed_tokens` had been computed before a preemption,
    and `kv_token_s`, the tokens of KV they held times how long. `fairness` is Jain's index of the classes' tokens and
    of their mean latencies: 1, where they are alike, down to 1 / classes (Jain, Chiu and Hawe, DEC-TR-301, 1984).

    Args:
        by: "tenant", "priority", "session", or "prompt": by the power of two that a prompt's length is below.
        warm_up_s, drain_s: requests that come in the first and the last seconds of the arrivals are left out.

    Raises:
        InputError: a record cannot be decided again, or no request is left.
    """
    if by not in BY:
        raise InputError(f"expected one of {', '.join(BY)}", field="by", value=by)
    rows = [row for record in records for row in record.requests if row["finish_reason"] is not None]
    chosen = judged(map(Outcome.of_row, rows), warm_up_s, drain_s)
    if not chosen:
        raise InputError("expected less than the arrivals last", field="warm_up_s + drain_s", value=warm_up_s + drain_s)
    work = _Work()
    for record in records:
        work.hear(record)
    names = {one.seq_id: _class_of(one, by) for one in chosen}
    classes = {
        name: _of([one for one in chosen if names[one.seq_id] == name], work)
        for name in sorted(set(names.values()), key=lambda name: (len(name), name) if by != "tenant" else (0, name))
    }
    return {"by": by, "all": _of(chosen, work), "classes": classes, "fairness": _fairness(classes.values())}


def _class_of(one: Outcome, by: str) -> str:
    if by == "prompt":
        return f"< {1 << one.num_prompt_tokens.bit_length()}"
    value = getattr(one, by)
    return "none" if value in (None, "") else str(value)


def _of(outcomes: Seq[Outcome], work: _Work) -> dict[str, Any]:
    found: dict[str, Any] = {
        "requests": len(outcomes),
        "served": sum(one.is_served for one in outcomes),
        "prompt_tokens": sum(one.num_prompt_tokens for one in outcomes),
        "output_tokens": sum(one.num_completion_tokens for one in outcomes),
        "computed_tokens": sum(work.computed[one.seq_id] for one in outcomes),
        "recomputed_tokens": sum(work.recomputed[one.seq_id] for one in outcomes),
        "kv_token_s": sum(work.held[one.seq_id] for one in outcomes) / 1e9,
    }
    limits = found["intervals"] = {}
    for metric in METRICS:
        took_ns = [ns for one in outcomes if (ns := one.took_ns(metric)) is not None]
        found[metric] = {statistic: statistic_of(took_ns, statistic) for statistic in STATISTICS}
        size = len(took_ns) // BATCHES
        if size >= _FEWEST:
            batches = [took_ns[size * number : size * (number + 1)] for number in range(BATCHES)]
            for statistic in ("mean", "p99"):
                values = [value for batch in batches if (value := statistic_of(batch, statistic)) is not None]
                limits[f"{metric}.{statistic}"] = interval(values)
    return found


def _fairness(classes: Iterable[dict[str, Any]]) -> dict[str, float | None]:
    tokens = [float(one["prompt_tokens"] + one["output_tokens"]) for one in classes]
    found = {"tokens": jain(tokens)}
    for metric in ("ttft", "e2e", "queue"):
        means = [one[metric]["mean"] for one in classes]
        found[metric] = None if None in means else jain(means)
    return found


def jain(values: Seq[float]) -> float | None:
    """Jain's index: the square of the sum over the number times the sum of squares; None where all are 0."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else None


class _Work(Hearer):
    """Hears runs decided again: what was computed for each request, by its id, and for how long its KV was held.

    Attributes:
        computed, recomputed: tokens; the second had been computed before.
        held: tokens of KV times nanoseconds, from one decision to the next.
    """

    def __init__(self) -> None:
        super().__init__()
        self.computed: Counter[int] = Counter()
        self.recomputed: Counter[int] = Counter()
        self.held: Counter[int] = Counter()

    def hear(self, record: RunRecord) -> None:
        self._record = record
        self._ends_ns = {row["id"]: row["finish_ns"] for row in record.requests}
        self._reached: dict[int, int] = {}
        self._latest_ns = 0
        self._holding: dict[Sequence, int] = {}
        super().hear(record)

    def finished(self, seq: Sequence) -> None:
        tokens = self._holding.pop(seq, 0)
        self.held[seq.seq_id] += tokens * max(0, (self._ends_ns[seq.seq_id] or 0) - self._latest_ns)

    def decided(self, batch: Batch) -> None:
        now_ns = self._record.steps[batch.decision]["decided_ns"]
        for seq, tokens in self._holding.items():
            self.held[seq.seq_id] += tokens * (now_ns - self._latest_ns)
        self._latest_ns = now_ns
        self._holding = {seq: seq.num_computed_tokens for seq in self.core.scheduler.running}
        for seq, start, count in zip(batch.seqs, batch.starts, batch.lengths, strict=True):
            reached = self._reached.get(seq.seq_id, 0)
            self.computed[seq.seq_id] += count
            self.recomputed[seq.seq_id] += max(0, min(reached, start + count) - start)
            self._reached[seq.seq_id] = max(reached, start + count)
