"""Two policies over seeds: what their runs differ by, pair by pair, and how sure that is."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from twinserve.planning.objectives import interval
from twinserve.settings.errors import InputError
from twinserve.traces.runs.compare import METRICS, check_same_trace, differing_settings, value_of
from twinserve.traces.runs.record import RunRecord


@dataclass(frozen=True)
class PairedDifference:
    """One metric of two sides.

    Attributes:
        a, b: means over the runs of a side; None, as all below, where a run lacks the metric.
        difference: the mean of b - a over the pairs.
        interval: holds it with a confidence of 95%, by Student's t over the pairs; None for one pair alone.
    """

    metric: str
    a: float | None
    b: float | None
    difference: float | None
    interval: tuple[float, float] | None


def paired(a: list[RunRecord], b: list[RunRecord]) -> list[PairedDifference]:
    """Every metric of two sides; a's first run and b's first are a pair, and so on.

    What both runs of a pair have in common, the requests and their arrivals above all, is no part of a difference.

    Raises:
        InputError: one side has more runs, a pair has not replayed the same requests, or a side's runs differ in a
            setting.
    """
    if len(a) != len(b):
        raise InputError("expected as many", field=f"runs: {len(a)} before -- and {len(b)} after it")
    for side in (a, b):
        for record in side:
            if names := differing_settings([side[0], record]):
                raise InputError(
                    f"expected that of {side[0].path}",
                    path=record.path / "run.json",
                    field=f"settings.{names[0]}",
                    value=record.run["settings"][names[0]],
                )
    for one, other in zip(a, b, strict=True):
        check_same_trace(one, other)
    of_a, of_b = ([record.run["summary"] for record in side] for side in (a, b))
    return [paired_difference(metric, of_a, of_b) for metric in METRICS]


def paired_difference(metric: str, a: list[dict[str, Any]], b: list[dict[str, Any]]) -> PairedDifference:
    """One metric of two sides, from the summaries of their runs, pair by pair."""
    pairs = [tuple(value_of(summary, metric) for summary in pair) for pair in zip(a, b, strict=True)]
    known = [(one, other) for one, other in pairs if one is not None and other is not None]
    if len(known) < len(pairs):
        return PairedDifference(metric, None, None, None, None)
    mean_a, mean_b = (statistics.fmean(values) for values in zip(*known, strict=True))
    differences = [other - one for one, other in known]
    return PairedDifference(metric, mean_a, mean_b, statistics.fmean(differences), interval(differences))
